"""A piece of work for a separate child."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from .result import Row

SILENCE = 30.0
"""Seconds that a child may be silent before it counts as hung."""


@dataclass(frozen=True)
class Task:
    """``function(reporter, row, **arguments)`` in a child.

    Attributes:
        function: ``module.function`` of this package.
        arguments: plain values.
        row: the row it is about; its rows take part, measure and shape from it.
        seconds: how long it is expected to take on a GPU, besides starting and timing.
        timed: whether it takes times, for as many ``seconds`` as its argument of that name says.
    """

    function: str
    arguments: dict
    row: Row
    seconds: float
    timed: bool = False

    def filled(self, seconds: float) -> dict:
        """The arguments of a call that has that many seconds for timing."""
        return {"row": asdict(self.row), **self.arguments, **({"seconds": seconds} if self.timed else {})}
