"""Requests to stop: from a scheduler (SIGTERM, SIGUSR1), the keyboard (SIGINT), or a terminal that is closed
(SIGHUP)."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType

SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
PATIENCE = 5.0
"""Seconds: how long a step may take to end by itself, and after how long a second signal is meant as one.

Closing a terminal, Ctrl-C under torchrun and many wrappers send a signal twice within moments."""


class Interrupted(KeyboardInterrupt):
    """A signal asked to stop. As a `KeyboardInterrupt` it passes through all handlers of errors."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number

    def __str__(self) -> str:
        return f"interrupted by {signal.Signals(self.number).name}"


def status(number: int) -> int:
    """Exit status after signal `number`: 130 as shells have it for SIGINT, else 75, to be started again."""
    return 130 if number == signal.SIGINT else 75


@contextmanager
def exiting() -> Iterator[None]:
    """Within this context a signal ends the process: there is nothing to lose yet.

    Meant for imports: some libraries swallow whatever is raised while they are imported.
    """
    with _handling(lambda number, frame: os._exit(status(number))):
        yield


@contextmanager
def raising() -> Iterator[None]:
    """Within this context a signal raises `Interrupted`; an immediate repetition is ignored."""
    last = -PATIENCE

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal last
        repeats, last = time.monotonic() - last < PATIENCE, time.monotonic()
        if not repeats:
            raise Interrupted(number)

    with _handling(interrupt):
        yield


class Interruption:
    """Within this context a signal to stop only sets `asked`, and interrupts what runs under `breaking`.

    Attributes:
        asked: the first signal that arrived; None until then.
    """

    def __init__(self) -> None:
        self.asked: int | None = None
        self._since = 0.0
        self._breaks: Callable[[], bool] = _never

    def __enter__(self) -> Interruption:
        with ExitStack() as stack:
            stack.enter_context(_handling(self._ask))
            stack.enter_context(_handling(self._insist, (signal.SIGALRM,)))
            self._until = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self.hold()
        self._until.close()

    @contextmanager
    def breaking(self, at_once: bool) -> Iterator[None]:
        """Within this context a signal raises `Interrupted`: `at_once`, or if the context is not left within `PATIENCE`
        seconds.

        Catch it around the context, and call `hold` first.
        """
        self._breaks = (lambda: self.asked is not None) if at_once else self._is_late
        try:
            self._break()
            yield
        finally:
            self._breaks = _never

    def hold(self) -> None:
        """From here on nothing is interrupted."""
        self._breaks = _never
        if _is_main_thread():
            signal.setitimer(signal.ITIMER_REAL, 0)

    def _is_late(self) -> bool:
        return self.asked is not None and time.monotonic() - self._since >= PATIENCE

    def _break(self) -> None:
        if self.asked is not None and self._breaks():
            raise Interrupted(self.asked)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked is None:
            self.asked, self._since = number, time.monotonic()
            # Repeatedly: an exception raised in a destructor, for example, is lost.
            signal.setitimer(signal.ITIMER_REAL, PATIENCE, 1.0)
        elif number == signal.SIGINT and self._is_late():
            raise KeyboardInterrupt  # a second Ctrl-C: the user does not want to wait for a checkpoint
        self._break()

    def _insist(self, number: int, frame: FrameType | None) -> None:
        self._break()


def _never() -> bool:
    return False


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


@contextmanager
def _handling(handler: Callable[[int, FrameType | None], None], signals: tuple[int, ...] = SIGNALS) -> Iterator[None]:
    """Handle `signals` by `handler`, except those that are ignored (under nohup, for example). Does nothing outside the
    main thread."""
    before = {}
    if _is_main_thread():
        before = {number: signal.getsignal(number) for number in signals}
    before = {number: old for number, old in before.items() if old is not None and old != signal.SIG_IGN}
    try:
        for number in before:
            signal.signal(number, handler)
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
