"""Ctrl-C and SIGTERM ask a run to stop after its step; a second one stops it at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """Whether a signal came, and which: ``signal`` is its number, or None."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __call__(self) -> bool:
        return self.signal is not None


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """While the block runs, note the first SIGINT or SIGTERM, and let the second do what it would do without us.

    Outside the main thread, where Python delivers no signals, nothing is noted.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    signals = (signal.SIGINT, signal.SIGTERM)
    before = {s: signal.getsignal(s) for s in signals}

    def restore() -> None:
        for s, handler in before.items():
            signal.signal(s, handler)

    def note(number: int, frame: FrameType | None) -> None:
        request.signal = number
        restore()

    try:
        for s in signals:
            signal.signal(s, note)
        yield request
    finally:
        restore()
