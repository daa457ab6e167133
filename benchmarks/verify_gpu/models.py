"""The whole Swin UNETR, inference and a training step: MONAI's unchanged, with its flash attention, compiled, and in a
CUDA graph; ours on fused kernels, compiled, and in a CUDA graph.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F

from .device import device_of
from .measure import compare
from .reporter import Reporter
from .result import Row
from .tasks import Task

SIZES = ((96, 1), (128, 1), (96, 2))
"""Extents of the image in voxels, and volumes."""

MODES = ("inference", "training step")
COMPILED = ("MONAI compiled", "ours compiled")
GRAPH, MONAI_GRAPH = "ours in a CUDA graph", "MONAI in a CUDA graph"
EAGER = {
    "inference": ("ours", "MONAI", GRAPH, MONAI_GRAPH, "MONAI flash"),  # its flash path is for inference alone
    "training step": ("ours", "MONAI", GRAPH, MONAI_GRAPH),
}
COMPILED_SIZE = SIZES[0]
"""The size that is compiled: that takes minutes on a processor, before times are taken."""

FIRST_CALL_LIMIT = 60.0
"""Seconds that a compiled variant may be silent: it is traced again, and its kernels come from the cache on disk."""

DEAREST = 40
LABELS = 14
LEARNED = 4
"""The last parameters, whose gradients are compared: all others are upstream of some of them."""


def tasks(simulated: bool, compiled: tuple[tuple[str, str], ...]) -> list[Task]:
    """Every size and mode, the most useful first.

    Args:
        compiled: variant and mode of those whose kernels are compiled.
    """
    sizes = SIZES[:1] if simulated else SIZES
    found = [_task(size, mode, EAGER[mode], simulated) for size in sizes for mode in MODES]
    for mode in MODES:  # tracing them takes half a minute, which must not cost other rows their time
        variants = tuple(variant for variant, its in compiled if its == mode)
        found += [_task(COMPILED_SIZE, mode, ("ours", "MONAI", *variants), simulated)] if variants else []
    return found


def not_compiled(simulated: bool, compiled: tuple[tuple[str, str], ...]) -> list[Row]:
    """Rows that say which variants are missing."""
    status = "skipped: torch.compile was not done in time, or failed"
    missing = [(variant, mode) for mode in MODES for variant in COMPILED if (variant, mode) not in compiled]
    return [
        replace(_row("model", *COMPILED_SIZE, mode, simulated), variant=variant, status=status)
        for variant, mode in missing
    ]


def _row(part: str, extent: int, batch: int, mode: str, simulated: bool) -> Row:
    feature_size = 12 if simulated else 48
    return Row(part, f"model, {mode}", f"f{feature_size} {extent}³ batch {batch}", "ours")


def _task(size: tuple[int, int], mode: str, variants: tuple[str, ...], simulated: bool) -> Task:
    arguments = {"extent": size[0], "batch": size[1], "mode": mode, "variants": variants, "simulated": simulated}
    row = _row("model", *size, mode, simulated)
    if variants[-1] in COMPILED:
        row = replace(row, variant=variants[-1])
    return Task("models.time_model", arguments, row, 8, timed=True)


def preparations(simulated: bool) -> list[Task]:
    """Compilations for the cache on disk, which `torch.compile` finds there afterwards; they run beside the tests."""
    return [
        Task(
            "models.prepare",
            {"variant": variant, "mode": mode, "simulated": simulated},
            replace(_row("correctness", *COMPILED_SIZE, mode, simulated), measure=f"compile, {mode}", variant=variant),
            100,
        )
        for mode in MODES
        for variant in COMPILED
    ]


class Models:
    """Networks with the same weights, and what they are run on."""

    def __init__(self, extent: int, batch: int, simulated: bool) -> None:
        from monai.networks.nets import SwinUNETR

        self.device = device_of(simulated)
        self.low = not simulated
        torch.manual_seed(0)
        settings: dict[str, Any] = {"feature_size": 48, "window_size": 7}
        if simulated:
            settings = {"feature_size": 12, "window_size": 2, "depths": (1, 1, 1, 1)}
        image = (extent,) * 3 if not simulated else (64, 32, 32)
        self._build = partial(SwinUNETR, 1, LABELS, **settings)
        self.monai = self._build().to(self.device.name)
        self.image = torch.randn(batch, 1, *image, device=self.device.name)
        self.target = torch.randint(LABELS, (batch, *image), device=self.device.name)

    def network(self, variant: str) -> torch.nn.Module:
        """A separate network for `variant`."""
        import swin_kernels

        if variant == "MONAI flash":
            flash = self._build(use_flash_attention=True).to(self.device.name)
            flash.load_state_dict(self.monai.state_dict())
            return flash
        network = copy.deepcopy(self.monai)
        if variant.startswith("ours"):
            swin_kernels.accelerate(network)
        return cast(torch.nn.Module, torch.compile(network)) if variant in COMPILED else network

    def _inferring(self, variant: str) -> Callable[[torch.Tensor], Any]:
        """What `variant` is in inference: ours in a graph as users get it."""
        import swin_kernels

        network = self.network(variant).eval()
        return swin_kernels.graphed(network) if variant == GRAPH and not self.device.simulated else network

    def call(self, variant: str, mode: str, low: bool | None = None) -> Callable[[], list[torch.Tensor]]:
        """What `variant` computes in `mode`: the output, or the gradients that `LEARNED` says.

        The network is built when it is first called: where that fails, it is the variant's failure.
        """
        ready: list[Callable] = []

        def run() -> list[torch.Tensor]:
            if not ready:
                own = self.low if low is None else low
                if mode == "inference":
                    call = partial(self._inference, self._inferring(variant), own)
                else:
                    call = partial(self._training_step, self.network(variant), own)
                captured = variant == MONAI_GRAPH or (variant == GRAPH and mode != "inference")
                ready.append(self.device.graph(call) if captured else call)
            return ready[0]()

        return run

    def truth(self, mode: str) -> list[torch.Tensor]:
        """What MONAI's network computes in true float32."""
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return [value.double() for value in self.call("MONAI", mode, low=False)()]

    def _autocast(self, low: bool) -> torch.autocast:
        # The 16-bit weights that autocast caches would belong to the capture of a CUDA graph, and be gone after it.
        kind = torch.bfloat16 if low else None
        return torch.autocast(self.device.name, kind, enabled=low, cache_enabled=False)

    def _inference(self, network: Callable[[torch.Tensor], torch.Tensor], low: bool) -> list[torch.Tensor]:
        with torch.no_grad(), self._autocast(low):
            return [network(self.image)]

    def _training_step(self, network: torch.nn.Module, low: bool) -> list[torch.Tensor]:
        network.zero_grad(set_to_none=True)
        with self._autocast(low):
            loss = F.cross_entropy(network(self.image).float(), self.target)
        loss.backward()
        return [p.grad for p in network.parameters() if p.grad is not None][-LEARNED:]


def time_model(
    reporter: Reporter,
    row: dict,
    extent: int,
    batch: int,
    mode: str,
    variants: list[str],
    simulated: bool,
    seconds: float,
) -> None:
    """`variants` against MONAI's network in float32, then timed; the most expensive kernels of ours and of MONAI's."""
    about = Row(**row)
    reporter.step(replace(about, variant="MONAI"), "build")
    models = Models(extent, batch, simulated)
    eager = (extent, batch) == COMPILED_SIZE and not set(variants) & set(COMPILED)
    compare(
        reporter,
        models.device,
        about,
        {variant: models.call(variant, mode) for variant in variants},
        partial(models.truth, mode),
        lambda errors: max(2 * errors.get("MONAI", 1e-2), 1e-2),
        seconds,
        profiled=(GRAPH, "MONAI") if eager else (),
        limits=dict.fromkeys(COMPILED, FIRST_CALL_LIMIT),
        most_kernels=DEAREST,
    )


def prepare(reporter: Reporter, row: dict, variant: str, mode: str, simulated: bool) -> None:
    """Compile `variant`, for the cache on disk."""
    about = Row(**row)
    if not reporter.wants(about):
        return
    reporter.step(about, "compile", limit=600)
    models = Models(*COMPILED_SIZE, simulated)
    models.call(variant, mode)()
    models.device.check()
    reporter.row(about)
