"""Train sketches on disk: written once, resumed after anything, read by every later question.

A folder holds ``manifest.json``, what the index is of, and one folder of shards per checkpoint. Nothing here knows how
features are computed; what is missing is asked of a `captum_sdi.passes.Point`. Imports go down this list: build,
verify, source, search, faiss, table, reader, folder, merge, writer, lock, place, identity, weights,
manifest, shards, processes.
"""

from captum_sdi.index.build import TrainIndex
from captum_sdi.index.faiss import Faiss
from captum_sdi.index.folder import SketchIndex

__all__ = ["Faiss", "SketchIndex", "TrainIndex"]
