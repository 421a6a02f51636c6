"""One question at a time for each model: passes hook it, freeze it and may load other weights into it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

from torch import nn

_LOCKS: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
_REGISTRY = threading.Lock()


@contextmanager
def exclusive(model: nn.Module) -> Iterator[None]:
    """Hold the model's lock; a question in another thread waits for its turn."""
    with _REGISTRY:
        lock = _LOCKS.setdefault(model, threading.RLock())
    with lock:
        yield
