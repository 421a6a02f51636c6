"""Whether a second pass may be answered otherwise: the first one drew random numbers, or left other buffers behind."""

from __future__ import annotations

import torch
from torch import nn

from captum_sdi.borrow import RandomState


def sources_of_change(model: nn.Module) -> tuple[object, ...]:
    """Return what a pass of a model changes that does not depend on its input alone.

    The states of torch's, numpy's and Python's generators, and of those that modules keep; which buffers there are,
    and how often each has been written to.

    Example:
        >>> model = nn.Dropout()
        >>> before = sources_of_change(model)
        >>> _ = model.eval()(torch.ones(2))
        >>> sources_of_change(model) == before
        True
        >>> _ = model.train()(torch.ones(2))
        >>> sources_of_change(model) == before
        False
    """
    state = RandomState.now()
    own_generators = []
    for module in model.modules():
        own_generators += [kept for kept in vars(module).values() if isinstance(kept, torch.Generator)]
    states = [state.torch_state, *(state.cuda_states or []), *(each.get_state() for each in own_generators)]
    buffers = [(id(buffer), 0 if buffer.is_inference() else buffer._version) for buffer in model.buffers()]
    numpy_key, numpy_place = state.numpy_state[1:3]
    numbers = [each.numpy().tobytes() for each in states]
    return *numbers, state.python_state, numpy_key.tobytes(), numpy_place, *buffers
