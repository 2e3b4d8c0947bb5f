"""Asked to end: what a scheduler sends before it takes the machine away is remembered, and heeded at the next boundary.

    with listening():
        …
        heed("after 3 of 8 items")        raises Unfinished once SIGTERM, SIGUSR1 or SIGUSR2 has come

A training saves a checkpoint and ends after its current step, a reading after its current chunk. The command then leaves with
exit code 75, and the same command goes on from there.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lesion.trial import Unfinished

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
_asked = threading.Event()
_handlers: dict[int, Any] = {}  # those that stood before ours, while we listen


@contextmanager
def listening() -> Iterator[None]:
    """Remembers signals for the length of a `with` block. Blocks may lie in each other; only the main thread can listen."""
    if _handlers or threading.current_thread() is not threading.main_thread():
        yield
        return
    _asked.clear()
    _handlers.update({number: signal.signal(number, lambda *_: _asked.set()) for number in SIGNALS})
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # what came before we listened was held back
    try:
        yield
    finally:
        for number, handler in _handlers.items():
            signal.signal(number, handler)
        _handlers.clear()
        _asked.clear()


def asked() -> bool:
    return _asked.is_set()


def heed(where: str) -> None:
    """Raises Unfinished where this process was asked to end. Everything must be saved at this point."""
    if asked():
        raise Unfinished(where)
