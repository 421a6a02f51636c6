"""What repeats in a model, and which parameters count.

Imports go down this list: finding, presets, table, repetition, tied, clock, watch, saved,
parameters, kinds.
"""

from captum_sdi.loop.finding import find_loop
from captum_sdi.loop.presets import PRESETS
from captum_sdi.loop.table import FoundLoop, Row

__all__ = ["PRESETS", "FoundLoop", "Row", "find_loop"]
