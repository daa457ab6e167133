"""A backend of one operator, asked before all others."""

from __future__ import annotations

from typing import ClassVar

from swin_kernels.backends import Call, Package, register


class Toy(Package):
    summary = ("every processor", "for tests")
    ranks: ClassVar[dict[str, int]] = {"cpu": -1}

    def declines_any(self, call: Call) -> str | None:
        return None if call.device == "cpu" else "it is for processors"


register(Toy(__name__))
