"""One question at a time for each model: passes hook it, freeze it and may load other weights into it.

Questions in other threads wait for their turn. A plain ``model(...)`` in another thread cannot wait inside the model:
it is refused there by a hook, before it can add loop steps to the pass or compute with another checkpoint's weights.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import nn

_HOLDERS: dict[int, int] = {}
"""By a module's id: the thread that holds it."""
_CHANGED = threading.Condition()


@contextmanager
def exclusive(model: nn.Module) -> Iterator[None]:
    """Hold a model and all its modules; a question in another thread about one of them waits for its turn."""
    thread = threading.get_ident()
    modules = {id(module): module for module in model.modules()}  # alive, so that no id is used again

    def is_free() -> bool:
        return all(_HOLDERS.get(module_id, thread) == thread for module_id in modules)

    with _CHANGED:
        _CHANGED.wait_for(is_free)
        added = [module_id for module_id in modules if module_id not in _HOLDERS]
        _HOLDERS.update(dict.fromkeys(added, thread))
    try:
        with ExitStack() as stack:
            for module_id in added:
                guard = partial(refuse_other_threads, thread)
                stack.callback(modules[module_id].register_forward_pre_hook(guard, prepend=True).remove)
            yield
    finally:
        with _CHANGED:
            for module_id in added:
                del _HOLDERS[module_id]
            _CHANGED.notify_all()


def refuse_other_threads(thread: int, module: nn.Module, args: object) -> None:
    """Refuse a call in another thread than the one that holds the model.

    Raises:
        RuntimeError: If it is one, and none of autograd's, in which activation checkpointing calls modules again.
    """
    if threading.get_ident() == thread:
        return
    caller = threading.current_thread()
    # Autograd has a thread of its own for each GPU, which no Python code started.
    is_autograds = isinstance(caller, threading._DummyThread) and torch._C._current_graph_task_id() != -1
    if is_autograds:
        return
    raise RuntimeError(
        f"{type(module).__name__} was called in the thread {caller.name!r} while a question of "
        "captum_sdi in another thread holds the model: until that is answered the model is hooked and may hold another "
        "checkpoint's weights. Wait for the answer, or call a copy.deepcopy(model) made before."
    )
