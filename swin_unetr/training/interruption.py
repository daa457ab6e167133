"""Being asked to stop: SIGTERM, and SIGUSR1 which Slurm can be told to send before it preempts."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Interruption:
    """Within this context a signal to stop does nothing but set `asked`.

    Attributes:
        asked: whether a signal came.
    """

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> Interruption:
        self._before = {number: signal.signal(number, self._ask) for number in SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: object) -> None:
        self.asked = True


@contextmanager
def held_back() -> Iterator[None]:
    """Signals to stop wait until the end of this context, and never reach processes that are started in it.

    ``torchrun`` and Slurm signal a rank's whole process group: data workers that died of it would leave the rank
    without the batch that it needs to finish its step.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
