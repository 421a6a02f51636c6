"""Examples: batches (`captum_sdi.data.batch` has the contract), losses, collation, streams and fingerprints."""

from captum_sdi.data.batch import ForwardKwargs
from captum_sdi.data.collate import Collator
from captum_sdi.data.losses import IGNORED, LossFn, TokenCrossEntropy

__all__ = ["IGNORED", "Collator", "ForwardKwargs", "LossFn", "TokenCrossEntropy"]
