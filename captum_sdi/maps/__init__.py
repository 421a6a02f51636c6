"""Influence split along any axes, for chosen pairs, and token by token for the whole train set."""

from captum_sdi.maps.axes import AXES, MapAxes
from captum_sdi.maps.compute import influence_map

__all__ = ["AXES", "MapAxes", "influence_map"]
