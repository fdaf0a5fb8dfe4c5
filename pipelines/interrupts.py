"""Ctrl-C and SIGTERM as a flag, for loops whose every turn is in the midst of other people's code.

An exception that a signal raises there may get lost, and with it the user's wish.
"""

import signal
import threading
from types import FrameType, TracebackType
from typing import Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """While entered: the first signal is remembered, the second raises KeyboardInterrupt on the spot."""

    def __init__(self) -> None:
        self._seen = threading.Event()
        self._before: dict[signal.Signals, signal._HANDLER] = {}

    def __enter__(self) -> Self:
        # Only the main thread may; in others nobody is interrupted.
        if threading.current_thread() is threading.main_thread():
            # What the command was told to ignore, such as Ctrl-C in the background of a shell, stays so.
            heard = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._take) for number in heard}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def wait(self, seconds: float) -> None:
        """KeyboardInterrupt if a signal came, before or meanwhile."""
        if self._seen.wait(seconds):
            raise KeyboardInterrupt

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self._seen.is_set():
            raise KeyboardInterrupt
        self._seen.set()
