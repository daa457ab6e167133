"""CUDA C++ kernels for NVIDIA GPUs (`csrc/cuda`)."""

from __future__ import annotations

from typing import ClassVar

import torch

from .. import Call, Package, register
from . import library


class Cuda(Package):
    summary = (
        "NVIDIA GPUs, compute capability ≥ 8.0",
        "CUDA C++, built wherever `nvcc` is ([docs/cuda.md](docs/cuda.md)); see "
        "[what is not there yet](#what-is-not-there-yet)",
    )
    ranks: ClassVar[dict[str, int]] = {"cuda": 0}

    def unavailable(self) -> str | None:
        return library.unavailable()

    def declines_any(self, call: Call) -> str | None:
        if call.device != "cuda":
            return f"the volume is on {call.device}, the kernels run on cuda"
        capability = library.capability(torch.cuda.current_device())
        return f"compute capability {capability} is below {library.OLDEST}" if capability < library.OLDEST else None


register(Cuda(__name__))
