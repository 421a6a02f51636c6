"""How one parameter's per-example gradient becomes a row of numbers: the only randomness in a score."""

from captum_sdi.sketch.base import Projection, Sketch
from captum_sdi.sketch.exact import Exact
from captum_sdi.sketch.tensor_sketch import TensorSketch

__all__ = ["Exact", "Projection", "Sketch", "TensorSketch"]
