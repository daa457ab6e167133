"""The cases of the `window_attention` contract, their float64 truth, and the check of a backend against it.

Nothing here uses `swin_kernels.geometry`: `plain_attention` pads, rolls, partitions and masks a volume the way MONAI
does, and `test_window_attention.py` compares it with a version in Python loops and with MONAI itself.
"""

from __future__ import annotations

import functools
import math
import zlib
from dataclasses import dataclass, replace

import numpy as np
import torch

from swin_kernels import window_attention

from .tolerances import assert_close, largest

SEED = 0x1234_5678_9ABC


@dataclass(frozen=True)
class Case:
    """One call of `window_attention`.

    Attributes:
        name: id of the test.
        spatial, window, shift: extents of the volume, nominal window and shift, one entry per axis.
        batch, heads, head_dim: the other extents.
        pad: whether `pad_qkv` is given.
        scale: the factor on ``q · k``; None for the default.
        magnitude: standard deviation of `qkv`; 30 makes scores of a few thousand.
        bias: standard deviation of `bias_table`.
        layout: memory of `qkv` and of the output's gradient: "contiguous", "channels_first" (a permuted ``(B, C, *S)``)
            or "strided" (every second element of a larger buffer, NaN between).
        dropout_p: attention dropout, drawn from `SEED`.
        float_table: whether `bias_table` stays float32 with a 16-bit `qkv`.
    """

    name: str
    spatial: tuple[int, ...]
    window: tuple[int, ...]
    shift: tuple[int, ...] | None = None
    batch: int = 1
    heads: int = 2
    head_dim: int = 4
    pad: bool = True
    scale: float | None = None
    magnitude: float = 1.0
    bias: float = 1.0
    layout: str = "contiguous"
    dropout_p: float = 0.0
    float_table: bool = False

    def __post_init__(self):
        if self.shift is None:
            object.__setattr__(self, "shift", (0,) * len(self.spatial))

    @property
    def scores(self) -> int:
        """Elements of the score tensor that a fused kernel does not write: a measure of the work."""
        window = [min(s, w) for s, w in zip(self.spatial, self.window, strict=True)]
        windows = math.prod(-(-s // w) for s, w in zip(self.spatial, window, strict=True))
        return self.batch * windows * self.heads * math.prod(window) ** 2


BASE = Case("base", (5, 4, 6), (3, 2, 3), (1, 1, 0))  # pads axis 0, shifts axes 0 and 1

CASES = (
    # windows: 2D and 3D, padded, clipped, both at once, shifted and not
    Case("2d", (6, 4), (3, 2)),
    Case("2d shifted", (6, 4), (3, 2), (1, 1)),
    Case("2d padded", (7, 5), (3, 2)),
    Case("2d padded shifted", (7, 5), (3, 2), (2, 1)),
    Case("2d clipped", (2, 3), (3, 3), (1, 1)),
    Case("2d clipped padded shifted", (2, 8), (3, 3), (1, 1)),
    Case("2d without pad", (7, 5), (3, 2), (2, 1), pad=False),
    Case("3d", (4, 4, 6), (2, 2, 3)),
    Case("3d shifted", (4, 4, 6), (2, 2, 3), (1, 1, 1)),
    Case("3d padded", (5, 4, 7), (2, 2, 3)),
    Case("3d padded shifted", (5, 4, 7), (2, 2, 3), (1, 1, 2)),
    Case("3d clipped", (2, 3, 3), (4, 3, 5), (2, 1, 2)),
    Case("3d clipped padded shifted", (3, 7, 4), (4, 3, 4), (2, 2, 1)),
    Case("3d without pad", (5, 4, 7), (2, 2, 3), (1, 1, 2), pad=False),
    Case("3d one axis shifted", (4, 6, 4), (2, 3, 2), (0, 1, 0)),
    Case("padding only window", (5, 3, 3), (3, 3, 3), (2, 0, 0)),
    Case("window 1", (3, 2, 3), (1, 1, 1)),
    Case("window 1 on one axis", (3, 4, 4), (1, 3, 2), (0, 2, 1)),
    Case("long window", (2, 17, 2), (1, 16, 2), (0, 8, 1)),
    Case("window 4", (5, 8, 4), (4, 4, 4), (2, 2, 2)),
    Case("window 5", (6, 5, 4), (5, 5, 5), (2, 2, 2), heads=1),
    Case("window 6 clipped in 7", (6, 6, 6), (7, 7, 7), (3, 3, 3), heads=1, head_dim=16),
    Case("window 7", (9, 8, 7), (7, 7, 7), (3, 3, 3), heads=2, head_dim=16),
    Case("window 7 2d", (15, 9), (7, 7), (3, 3), heads=3, head_dim=8),
    # head_dim 16 on matrix units: heads that are taken three at a time or singly, scores at both ends of their range
    Case("six heads of 16", (5, 8, 6), (4, 4, 4), (2, 2, 2), heads=6, head_dim=16),
    Case("four heads of 16", (5, 8, 6), (4, 4, 4), (2, 2, 0), heads=4, head_dim=16, batch=2, pad=False),
    Case("scores of some hundred", (5, 8, 6), (4, 4, 4), (2, 2, 2), heads=3, head_dim=16, magnitude=4.0),
    # batch, heads, head_dim
    replace(BASE, name="batch 0", batch=0),
    replace(BASE, name="batch 2", batch=2),
    replace(BASE, name="batch 2 2d", spatial=(7, 5), window=(3, 2), shift=(2, 1), batch=2),
    *(replace(BASE, name=f"heads {h}", heads=h) for h in (1, 3, 4)),
    *(replace(BASE, name=f"head_dim {d}", head_dim=d) for d in (1, 3, 5, 8, 12, 16, 20, 32, 33, 64)),
    # values
    replace(BASE, name="scale", scale=0.7),
    replace(BASE, name="negative scale", scale=-0.3),
    replace(BASE, name="large scores", magnitude=30.0, head_dim=16),
    replace(BASE, name="large scores fill the mask", magnitude=10.0, bias=120.0),
    replace(BASE, name="zero table", bias=0.0),
    # memory
    replace(BASE, name="channels first", layout="channels_first", batch=2),
    replace(BASE, name="strided", layout="strided", batch=2),
    replace(BASE, name="strided without pad", layout="strided", pad=False),
    # dropout
    replace(BASE, name="dropout", dropout_p=0.3, batch=2, heads=3),
    Case("dropout window 7", (8, 7, 7), (7, 7, 7), (3, 3, 3), heads=1, head_dim=8, dropout_p=0.1),
    replace(BASE, name="dropout most", dropout_p=0.9),
)
"""Cases for every dtype."""

LOW_PRECISION_CASES = (
    replace(BASE, name="float32 table", float_table=True),
    Case("float32 table window 7", (8, 7, 7), (7, 7, 7), (3, 3, 3), heads=1, head_dim=16, float_table=True),
)
"""Cases for the 16-bit dtypes only."""

SATURATED_CASES = tuple(
    replace(case, name=f"{case.name}, qkv x{magnitude:g}", magnitude=magnitude)
    for magnitude in (1.0, 3.0, 10.0, 30.0)
    for case in (
        Case("saturated", (16, 12), (4, 4), (2, 2), head_dim=16),
        Case("saturated several tiles", (9, 9), (9, 9), heads=1, head_dim=16),
    )
)
"""Cases for the 16-bit dtypes' gradients (`assert_gradients_in_16_bits`); at x30 nearly every query has one key.

There is no padding: its keys are all the same, so the rounding of ds in kernels that multiply in 16 bits would add up.
"""

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def cases(dtype: torch.dtype, most_scores: float = math.inf) -> list[Case]:
    """The cases for `dtype` of at most `most_scores` score elements (for slow engines)."""
    low = dtype in (torch.bfloat16, torch.float16)
    chosen = CASES + (LOW_PRECISION_CASES if low else ())
    return [case for case in chosen if case.scores <= most_scores]


@dataclass(frozen=True)
class Inputs:
    """The tensors of a case; every one is a leaf that requires grad."""

    qkv: torch.Tensor
    bias_table: torch.Tensor
    pad_qkv: torch.Tensor | None
    grad_out: torch.Tensor

    @property
    def leaves(self) -> list[torch.Tensor]:
        return [t for t in (self.qkv, self.bias_table, self.pad_qkv) if t is not None]

    def double(self) -> Inputs:
        """The same values in float64."""
        wide = [None if t is None else t.detach().double().requires_grad_() for t in vars(self).values()]
        return Inputs(*wide)


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The values of `x` ``(B, *S, C)`` in memory of another `layout` (see `Case.layout`)."""
    if layout == "channels_first":
        return x.movedim(-1, 1).contiguous().movedim(1, -1)
    if layout == "strided":
        buffer = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), math.nan)
        buffer[..., ::2] = x
        return buffer[..., ::2]
    return x


def make_inputs(case: Case, dtype: torch.dtype, device: str = "cpu") -> Inputs:
    """Random inputs of `case`, the same values on every device and run."""
    generator = torch.Generator().manual_seed(zlib.crc32(case.name.encode()))
    channels = case.heads * case.head_dim

    def normal(*shape: int, std: float = 1.0) -> torch.Tensor:
        return std * torch.randn(shape, generator=generator, dtype=torch.float64)

    def leaf(x: torch.Tensor, dtype: torch.dtype, layout: str = "contiguous") -> torch.Tensor:
        return laid_out(x.to(device, dtype), layout).detach().requires_grad_()

    rows = math.prod(2 * w - 1 for w in case.window)
    return Inputs(
        qkv=leaf(normal(case.batch, *case.spatial, 3 * channels, std=case.magnitude), dtype, case.layout),
        bias_table=leaf(normal(rows, case.heads, std=case.bias), torch.float32 if case.float_table else dtype),
        pad_qkv=leaf(normal(3 * channels, std=case.magnitude), dtype) if case.pad else None,
        grad_out=leaf(normal(case.batch, *case.spatial, channels), dtype, case.layout),
    )


def partition(x: torch.Tensor, window: tuple[int, ...]) -> torch.Tensor:
    """Windows ``(B·nW, n, C)`` of a volume ``(B, *S, C)`` whose extents are multiples of `window`."""
    axes = len(window)
    split = [e for s, w in zip(x.shape[1:-1], window, strict=True) for e in (s // w, w)]
    x = x.reshape(x.shape[0], *split, x.shape[-1])  # (B, c0, w0, c1, w1, …, C)
    x = x.permute(0, *range(1, 2 * axes, 2), *range(2, 2 * axes + 1, 2), 2 * axes + 1)  # (B, c0, c1, …, w0, w1, …, C)
    return x.flatten(axes + 1, -2).flatten(0, axes)  # (B·nW, n, C)


def reverse(windows: torch.Tensor, window: tuple[int, ...], batch: int, padded: tuple[int, ...]) -> torch.Tensor:
    """The volume ``(B, *padded, C)`` of its windows ``(B·nW, n, C)``."""
    axes = len(window)
    counts = [p // w for p, w in zip(padded, window, strict=True)]
    x = windows.reshape(batch, *counts, *window, windows.shape[-1])  # (B, c0, c1, …, w0, w1, …, C)
    x = x.permute(0, *(i for axis in range(axes) for i in (1 + axis, 1 + axes + axis)), 2 * axes + 1)
    return x.reshape(batch, *padded, windows.shape[-1])  # (B, *padded, C)


def region_mask(padded: tuple[int, ...], window: tuple[int, ...], shift: tuple[int, ...]) -> torch.Tensor:
    """-100 between tokens of different regions of the shifted volume, else 0: ``(nW, n, n)``."""
    regions = torch.zeros(1, *padded, 1)
    for axis, (p, w, s) in enumerate(zip(padded, window, shift, strict=True)):
        cut = torch.zeros(p)
        if s:
            cut[p - w : p - s], cut[p - s :] = 1, 2
        shape = [1] * regions.dim()
        shape[1 + axis] = p
        regions = 3 * regions + cut.view(shape)
    labels = partition(regions, window)[..., 0]  # (nW, n)
    return torch.where(labels[:, :, None] == labels[:, None, :], 0.0, -100.0)


def position_index(window: tuple[int, ...]) -> torch.Tensor:
    """Row of the bias table for each pair of tokens of a full window: ``(n, n)``."""
    coordinates = torch.stack(torch.meshgrid(*(torch.arange(w) for w in window), indexing="ij")).flatten(1)  # (axes, n)
    index = torch.zeros(coordinates.shape[1], coordinates.shape[1], dtype=torch.long)
    for c, w in zip(coordinates, window, strict=True):
        index = index * (2 * w - 1) + (c[:, None] - c[None, :] + w - 1)
    return index


def plain_attention(
    qkv: torch.Tensor,
    bias_table: torch.Tensor,
    pad_qkv: torch.Tensor | None,
    case: Case,
    keep: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output ``(B, *S, C)`` and log-sum-exp of the scores ``(B, *S, heads)``, computed in the dtype of the inputs."""
    batch, spatial, heads = qkv.shape[0], tuple(qkv.shape[1:-1]), case.heads
    window = tuple(min(s, w) for s, w in zip(spatial, case.window, strict=True))
    shift = tuple(0 if s <= w else d for s, w, d in zip(spatial, case.window, case.shift, strict=True))
    padded = tuple(-(-s // w) * w for s, w in zip(spatial, window, strict=True))
    crop = (slice(None), *(slice(0, s) for s in spatial))
    axes = tuple(range(1, 1 + len(spatial)))
    tokens = math.prod(window)

    fill = qkv.new_zeros(qkv.shape[-1]) if pad_qkv is None else pad_qkv
    volume = fill.expand(batch, *padded, -1).clone()  # (B, *padded, 3C)
    volume[crop] = qkv
    volume = torch.roll(volume, [-s for s in shift], axes)
    windows = partition(volume, window)  # (B·nW, n, 3C)
    q, k, v = windows.unflatten(-1, (3, heads, case.head_dim)).permute(2, 0, 3, 1, 4)  # 3 × (B·nW, heads, n, head_dim)

    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    scores = (q * scale) @ k.transpose(-2, -1)  # (B·nW, heads, n, n)
    index = position_index(case.window)[:tokens, :tokens].to(qkv.device)
    scores = scores + bias_table[index.reshape(-1)].reshape(tokens, tokens, heads).permute(2, 0, 1)
    if any(shift):
        mask = region_mask(padded, window, shift).to(scores)  # (nW, n, n)
        scores = scores + mask.repeat(batch, 1, 1)[:, None]
    lse = torch.logsumexp(scores, dim=-1)  # (B·nW, heads, n)
    weights = torch.softmax(scores, dim=-1)
    if keep is not None:
        weights = torch.where(keep, weights / (1 - case.dropout_p), 0)
    out = (weights.to(v.dtype) @ v).transpose(1, 2).flatten(2)  # (B·nW, n, C)

    def natural(x: torch.Tensor) -> torch.Tensor:
        return torch.roll(reverse(x, window, batch, padded), shift, axes)[crop]

    return natural(out), natural(lse.transpose(1, 2))


def _mix(x: np.ndarray) -> np.ndarray:
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
    return x ^ (x >> np.uint32(16))


def hashed_keep(seed: int, rows: np.ndarray, tokens: int, dropout_p: float) -> np.ndarray:
    """Which scores survive dropout, by the hash of `swin_kernels.geometry` in 32-bit numpy: ``(*rows.shape, n)``."""
    low, high = np.uint32(seed & 0xFFFFFFFF), np.uint32(seed >> 32 & 0xFFFFFFFF)
    row_low, row_high = rows.astype(np.uint32), (rows >> 32).astype(np.uint32)
    row_hash = _mix(_mix(row_low ^ low) + row_high + high)
    keys = np.arange(tokens, dtype=np.uint32) * np.uint32(0x9E3779B9)
    return _mix(row_hash[..., None] + keys) >= np.uint32(min(int(dropout_p * 2**32), 2**32 - 1))


def survivors(case: Case) -> torch.Tensor | None:
    """The dropout mask of a case under `SEED`, ``(B·nW, heads, n, n)``, or None without dropout."""
    if case.dropout_p == 0:
        return None
    tokens = math.prod(min(s, w) for s, w in zip(case.spatial, case.window, strict=True))
    shape = (-1, case.heads, tokens)
    rows = np.arange(case.scores // tokens, dtype=np.int64).reshape(shape)
    return torch.from_numpy(hashed_keep(SEED, rows, tokens, case.dropout_p))


def run(backend: str, case: Case, inputs: Inputs) -> torch.Tensor:
    """`window_attention` on `backend`; with a fixed seed if the case has dropout."""
    if case.dropout_p == 0:
        return window_attention(
            inputs.qkv,
            inputs.bias_table,
            case.window,
            case.shift,
            pad_qkv=inputs.pad_qkv,
            scale=case.scale,
            backend=backend,
        )
    seed = torch.tensor([SEED], device=inputs.qkv.device)
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    return torch.ops.swin_kernels.window_attention(
        inputs.qkv, inputs.bias_table, inputs.pad_qkv, seed, case.window, case.shift, scale, case.dropout_p, backend
    )[0]


def gradients(out: torch.Tensor, inputs: Inputs) -> list[torch.Tensor]:
    """Gradients of the leaves of `inputs`."""
    return list(torch.autograd.grad(out, inputs.leaves, inputs.grad_out.detach()))


@functools.lru_cache(maxsize=512)
def expected(case: Case, dtype: torch.dtype) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Output and gradients by plain PyTorch in `dtype`, and the float64 truth of the same inputs (on the CPU)."""
    return expected_of(case, make_inputs(case, dtype))


def expected_of(case: Case, narrow: Inputs) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """As `expected`, for inputs that need not be those of `make_inputs`."""
    keep = survivors(case)
    results = []
    for inputs in (narrow, narrow.double()):
        out, _ = plain_attention(*(inputs.qkv, inputs.bias_table, inputs.pad_qkv), case, keep)
        results.append([out.detach(), *gradients(out, inputs)])
    return results[0], results[1]


NAMES = ("output", "grad of qkv", "grad of bias_table", "grad of pad_qkv")


def check_forward_backward(backend: str, case: Case, dtype: torch.dtype, device: str = "cpu") -> None:
    """Check output and all gradients of `backend` against the float64 truth (`tolerances.assert_close`)."""
    inputs = make_inputs(case, dtype, device)
    out = run(backend, case, inputs)
    values = [out, *gradients(out, inputs)]
    plain, truth = expected(case, dtype)
    scales = [largest(truth[0]), *[max(map(largest, truth[1:]))] * len(inputs.leaves)]
    like = [inputs.grad_out, *inputs.leaves]
    for name, value, p, t, leaf, scale in zip(NAMES, values, plain, truth, like, scales, strict=False):
        assert (value.dtype, value.device) == (leaf.dtype, leaf.device), f"{name}: {value.dtype} on {value.device}"
        assert_close(name, value.cpu(), p, t, scale)


def assert_gradients_in_16_bits(case: Case, inputs: Inputs, grads: list[torch.Tensor]) -> None:
    """Allow 16-bit gradients twice the error of plain PyTorch that computes the same inputs in float32 and rounds.

    Plain PyTorch in 16 bits is not a useful measure where one key has nearly all the weight: its rounded scores alone
    are off by more than one. What fused kernels keep in float32 has float32 accuracy.
    """
    truth, plain = [], []
    for results, dtype in ((truth, torch.float64), (plain, torch.float32)):
        wide = Inputs(*(None if t is None else t.detach().to(dtype).requires_grad_() for t in vars(inputs).values()))
        out, _ = plain_attention(wide.qkv, wide.bias_table, wide.pad_qkv, case, survivors(case))
        results += gradients(out, wide)
    scale = max(map(largest, truth))
    for name, grad, p, t, leaf in zip(NAMES[1:], grads, plain, truth, inputs.leaves, strict=False):
        assert_close(name, grad, p.to(leaf.dtype), t, scale)


def check_gradients_in_16_bits(backend: str, case: Case, dtype: torch.dtype, device: str = "cpu") -> None:
    """As `assert_gradients_in_16_bits`, for what `backend` computes on `device`."""
    inputs = make_inputs(case, dtype, device)
    grads = gradients(run(backend, case, inputs), inputs)
    on_cpu = Inputs(*(None if t is None else t.detach().cpu().requires_grad_() for t in vars(inputs).values()))
    assert_gradients_in_16_bits(case, on_cpu, [grad.cpu() for grad in grads])
