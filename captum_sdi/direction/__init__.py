"""Questions answered by forward passes alone: the gradient of a group of training examples is one direction."""

from captum_sdi.direction.direction import Direction

__all__ = ["Direction"]
