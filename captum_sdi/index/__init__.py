"""Train sketches on disk: written once, resumed after anything, read by every later question.

A folder holds ``manifest.json``, what the index is of, and one folder of shards per checkpoint. Imports go down this
list: build, search, nearest, folder, manifest, shards.
"""

from captum_sdi.index.build import TrainIndex
from captum_sdi.index.faiss import Faiss
from captum_sdi.index.folder import SketchIndex

__all__ = ["Faiss", "SketchIndex", "TrainIndex"]
