"""C++ kernels for the processor, one build for several vector widths (`csrc/cpu`)."""

from __future__ import annotations

from typing import ClassVar

from .. import Call, Package, register
from . import library


class Cpu(Package):
    summary = (
        "x86-64 and other CPUs under Linux",
        "C++, one source built for AVX-512, AVX2 and the plain baseline, chosen at run time; with AMX, float32 "
        "attention of head_dim 16 on the matrix unit (three bfloat16 parts a number, errors as in float32)",
    )
    ranks: ClassVar[dict[str, int]] = {"cpu": 0}

    def unavailable(self) -> str | None:
        return library.unavailable()

    def declines_any(self, call: Call) -> str | None:
        return None if call.device == "cpu" else f"the volume is on {call.device}, this backend runs on the CPU"


register(Cpu(__name__))
