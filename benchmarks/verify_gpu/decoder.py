"""What surrounds the attention, against PyTorch's, at the shapes of 96³, f48: norms, and the decoder's convolutions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from swin_kernels import convolution, instance_norm_act, use_backend
from swin_kernels.ops.layer_norm import layer_norm

from .device import device_of
from .measure import compare
from .reporter import Reporter
from .result import Row
from .tasks import Task

CHANNELS = 48
LIMIT = 2e-2
"""Largest error of a sound result in bfloat16, relative, in the mean."""


@dataclass(frozen=True)
class Work:
    """One operator.

    Attributes:
        shapes: of its inputs; the first has the extents of the output.
        ours, plain: compute it.
        last: whether inputs are volumes, which are channels last for ours.
    """

    shapes: tuple[tuple[int, ...], ...]
    ours: Callable[..., torch.Tensor]
    plain: Callable[..., torch.Tensor]
    last: bool = True


def works(extent: int) -> dict[str, Work]:
    """Operators by name, for volumes of `extent` voxels per axis."""
    volume, weight = (1, CHANNELS, *(extent,) * 3), (CHANNELS, CHANNELS, 3, 3, 3)
    tokens, parameter = ((extent // 2) ** 3, CHANNELS), (CHANNELS,)

    def normed(x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return F.leaky_relu(F.instance_norm(x) + F.instance_norm(residual), 0.01)

    return {
        "instance norm + LeakyReLU": Work(
            (volume,), instance_norm_act, lambda x: F.leaky_relu(F.instance_norm(x), 0.01)
        ),
        "two instance norms + LeakyReLU": Work(
            (volume, volume), partial(instance_norm_act, normalize_residual=True), normed
        ),
        "layer norm": Work(
            (tokens, parameter, parameter), layer_norm, lambda x, w, b: F.layer_norm(x, x.shape[-1:], w, b), last=False
        ),
        "convolution": Work((volume, weight), lambda x, w: convolution(x, w), lambda x, w: F.conv3d(x, w, padding=1)),
        "convolution of a concatenation": Work(
            (volume, volume, (CHANNELS, 2 * CHANNELS, 3, 3, 3)),
            lambda x, skip, w: convolution(x, w, skip),
            lambda x, skip, w: F.conv3d(torch.cat([x, skip], 1), w, padding=1),
        ),
    }


DIRECTIONS = ("forward", "forward + backward")


def tasks(simulated: bool) -> list[Task]:
    """Every operator in both directions."""
    extent = 8 if simulated else 96
    names = list(works(extent))[:1] if simulated else list(works(extent))
    return [
        Task(
            "decoder.time_work",
            {"name": name, "direction": direction, "extent": extent, "simulated": simulated},
            Row("decoder", f"{name}, {direction}", f"{extent}³ voxels, {CHANNELS} channels", "ours"),
            2,
            timed=True,
        )
        for direction in DIRECTIONS
        for name in names
    ]


def tiles() -> list:
    """Other cuts of Triton's convolution."""
    from swin_kernels.backends.triton.convolution import Tile

    cuts = [(128, 4, 64, 3), (128, 8, 64, 3), (256, 8, 16, 5), (128, 4, 16, 5)]
    return [Tile(*cut) for cut in cuts]


def under(tile, call: Callable[[], list[torch.Tensor]]) -> Callable[[], list[torch.Tensor]]:
    """`call`, its convolutions on Triton's kernel cut by `tile`."""
    from swin_kernels.backends.triton import convolution as kernel

    def run() -> list[torch.Tensor]:
        with kernel.override(tile), use_backend("triton"):
            return call()

    return run


def small_calls(device: str, dtype: torch.dtype) -> None:
    """Every operator once, forward and backward, on a volume divided among many programs, and on a small one."""
    for extent in (18, 8):
        for work in works(extent).values():
            inputs = [torch.randn(shape, device=device, dtype=dtype).requires_grad_() for shape in work.shapes]
            work.ours(*inputs).sum().backward()


def time_work(
    reporter: Reporter, row: dict, name: str, direction: str, extent: int, simulated: bool, seconds: float
) -> None:
    """One operator in one direction against PyTorch's on contiguous volumes, as MONAI's are, and on channels last."""
    device, work = device_of(simulated), works(extent)[name]
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator).to(device.name, torch.bfloat16) for shape in work.shapes]
    grad = torch.randn(work.shapes[0], generator=generator).to(device.name, torch.bfloat16)

    def call(compute: Callable[..., torch.Tensor], last: bool, wide: bool = False) -> Callable[[], list[torch.Tensor]]:
        def laid_out(t: torch.Tensor) -> torch.Tensor:
            t = t.double() if wide else t
            return t.contiguous(memory_format=torch.channels_last_3d) if last and t.dim() == 5 else t.clone()

        inputs, grad_out = [laid_out(t).requires_grad_(direction != "forward") for t in values], laid_out(grad)

        def run() -> list[torch.Tensor]:
            with torch.set_grad_enabled(direction != "forward"):
                out = compute(*inputs)
            if direction == "forward":
                return [out]
            return [out.detach(), *torch.autograd.grad(out, inputs, grad_out)]

        return run

    variants = {"ours": call(work.ours, work.last), "PyTorch": call(work.plain, False)}
    if work.last:
        variants["PyTorch, channels last"] = call(work.plain, True)
    if name == "convolution" and direction == "forward" and not simulated:
        variants |= {f"{tile}": under(tile, call(work.ours, True)) for tile in tiles()}
    compare(
        reporter,
        device,
        Row(**row),
        variants,
        call(work.plain, False, wide=True),
        lambda errors: max(2 * errors.get("PyTorch", 0.0), LIMIT),
        seconds,
        profiled=("ours",),
    )
