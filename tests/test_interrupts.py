"""A signal is not lost, whatever swallows exceptions; the second one does not wait."""

import contextlib
import os
import signal

import pytest

from pipelines.interrupts import Interrupts


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_remembered(number: int) -> None:
    before = signal.getsignal(number)
    with Interrupts() as interrupts:
        interrupts.wait(0.0)
        with contextlib.suppress(BaseException):
            os.kill(os.getpid(), number)
        with pytest.raises(KeyboardInterrupt):
            interrupts.wait(10.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
            interrupts.wait(0.0)
    assert signal.getsignal(number) is before
