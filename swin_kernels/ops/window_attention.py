"""`window_attention`: multi-head attention inside the (shifted) windows of a volume.

Contract, for every window and head, with ``t`` over the window's tokens (padding included)::

    scores = scale · q kᵀ + bias + mask
    out    = dropout(softmax(scores)) v

``bias[i, j] = bias_table[geometry.bias_index(...)[i, j], head]``; ``mask`` is ``geometry.MASK_VALUE``
between tokens of different ``geometry.region_labels``. Which token lies where is
``geometry.token_index``; a padding token carries `pad_qkv`, is attended to, and its output is dropped.
Scores, softmax and sums are computed in float32 (float64 for float64). Source: Liu et al., "Swin
Transformer", https://arxiv.org/abs/2103.14030; padding, clipping and the finite mask follow MONAI's
Swin UNETR (`monai.networks.nets.swin_unetr`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..backends import Call
from ..geometry import WindowGrid, bias_table_length
from ._checks import (
    FLOATING,
    autocast_is_on,
    check_number,
    check_saved,
    check_tensor,
    check_volume,
    check_windows,
)
from ._operator import Example, Operator, Pass

_NAME = "window_attention"


@dataclass(frozen=True, kw_only=True)
class WindowAttentionCall(Call):
    """A call of `window_attention`.

    Attributes:
        head_dim: channels of a head.
        window: window size after clipping.
        dropout: whether attention dropout is on.
    """

    operator = kernel = _NAME
    head_dim: int
    window: tuple[int, ...]
    dropout: bool = False


def window_attention(
    qkv: torch.Tensor,
    bias_table: torch.Tensor,
    window_size: int | Sequence[int],
    shift_size: int | Sequence[int] = 0,
    *,
    pad_qkv: torch.Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> torch.Tensor:
    """Attend inside the (shifted) windows of a volume that stays in its natural layout.

    Args:
        qkv: ``(B, *S, 3C)`` with ``S`` = (D, H, W) or (H, W), channels ordered q, k, v, then heads,
            then head_dim; float32, float64, bfloat16 or float16.
        bias_table: relative position bias ``(prod(2w - 1), heads)`` of the nominal window, in the
            dtype of `qkv` or float32; its second extent sets the number of heads.
        window_size: nominal window, an int or one per axis. On an axis that is no
            longer, the window is the whole axis and the shift 0.
        shift_size: cyclic shift, an int or one per axis, ``0 ≤ shift < window``.
        pad_qkv: ``(3C,)``, what a padding token carries (upstream: the bias of the qkv projection);
            zeros if None. Same dtype as `qkv`.
        scale: factor on ``q · k``; ``head_dim ** -0.5`` if None.
        dropout_p: probability of dropping an attention weight, ``0 ≤ dropout_p < 1``. The caller
            passes 0 in evaluation. Drawn from PyTorch's generator of the device.
        backend: force a backend; None takes the first that supports the call.

    Returns:
        ``(B, *S, C)`` in the dtype of `qkv`. Differentiable once in `qkv`, `bias_table` and `pad_qkv`.

    Under autocast, `qkv` and `pad_qkv` are cast to the autocast dtype; `bias_table` keeps its own.

    Raises:
        TypeError: an argument of the wrong type, dtype or layout.
        ValueError: shapes or devices that do not match, window < 1, shift or dropout out of
            range, unknown backend.
        RuntimeError: the forced backend cannot run the call.
    """
    arguments = _prepare(qkv, bias_table, window_size, shift_size, pad_qkv=pad_qkv, scale=scale, dropout_p=dropout_p)
    return _OPERATOR(_with_seed(*arguments), backend)[0]


def _prepare(
    qkv, bias_table, window_size, shift_size=0, *, pad_qkv=None, scale=None, dropout_p=0.0
) -> tuple:  # the operator's arguments, with None for the seed
    mixed = isinstance(qkv, torch.Tensor) and autocast_is_on(qkv.device)
    window, shift = _check(qkv, bias_table, window_size, shift_size, pad_qkv, dropout_p, mixed)
    if scale is None:
        scale = (qkv.shape[-1] // (3 * bias_table.shape[1])) ** -0.5
    scale = check_number(_NAME, "scale", scale)
    return qkv, bias_table, pad_qkv, None, window, shift, scale, float(dropout_p)


def _with_seed(qkv, bias_table, pad_qkv, _, window, shift, scale, dropout_p) -> tuple:
    seed = torch.randint(2**62, (1,), device=qkv.device) if dropout_p > 0 else None
    return qkv, bias_table, pad_qkv, seed, window, shift, scale, dropout_p


def _check(
    qkv, bias_table, window_size, shift_size, pad_qkv, dropout_p, mixed: bool = False
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Check the arguments of the public function; returns nominal window and shift per axis.

    Mixed dtypes are accepted where autocast is about to cast them.
    """
    check_tensor(_NAME, "qkv", qkv, FLOATING)
    check_volume(_NAME, "qkv", qkv)
    window, shift = check_windows(_NAME, qkv.dim() - 2, window_size, shift_size)
    _check_bias_table(qkv, bias_table, window, mixed)
    if pad_qkv is not None:
        _check_pad_qkv(qkv, pad_qkv, mixed)
    if not 0 <= check_number(_NAME, "dropout_p", dropout_p) < 1:
        raise ValueError(f"{_NAME}: dropout_p is {dropout_p}; accepted is 0 ≤ dropout_p < 1")
    return window, shift


def _check_bias_table(qkv: torch.Tensor, bias_table: torch.Tensor, window: tuple[int, ...], mixed: bool) -> None:
    check_tensor(_NAME, "bias_table", bias_table, FLOATING if mixed else (*{qkv.dtype: 0, torch.float32: 0},))
    if bias_table.dim() != 2 or bias_table.shape[0] != bias_table_length(window) or bias_table.shape[1] < 1:
        raise ValueError(
            f"{_NAME}: bias_table has shape {tuple(bias_table.shape)}; window_size {window} needs "
            f"({bias_table_length(window)}, heads)"
        )
    heads, channels = bias_table.shape[1], qkv.shape[-1]
    if channels % (3 * heads):
        raise ValueError(
            f"{_NAME}: qkv has 3·C = {channels} channels; with {heads} heads it must be a multiple of {3 * heads}"
        )
    if bias_table.device != qkv.device:
        raise ValueError(f"{_NAME}: bias_table is on {bias_table.device}, qkv on {qkv.device}; one device is accepted")


def _check_pad_qkv(qkv: torch.Tensor, pad_qkv: torch.Tensor, mixed: bool) -> None:
    check_tensor(_NAME, "pad_qkv", pad_qkv, FLOATING if mixed else (qkv.dtype,))
    if pad_qkv.shape != qkv.shape[-1:]:
        raise ValueError(f"{_NAME}: pad_qkv has shape {tuple(pad_qkv.shape)}; accepted is ({qkv.shape[-1]},)")
    if pad_qkv.device != qkv.device:
        raise ValueError(f"{_NAME}: pad_qkv is on {pad_qkv.device}, qkv on {qkv.device}; one device is accepted")


def _check_raw(qkv, bias_table, pad_qkv, seed, window, shift, scale, dropout_p) -> None:
    """Check the arguments of the operator below the public function, which can be called with anything."""
    _check(qkv, bias_table, window, shift, pad_qkv, dropout_p)
    if dropout_p > 0 and seed is None:
        raise ValueError(f"{_NAME}: seed is None; dropout needs one, int64 of shape (1,)")
    if seed is not None:
        check_tensor(_NAME, "seed", seed, (torch.int64,))
        if seed.shape != (1,):
            raise ValueError(f"{_NAME}: seed has shape {tuple(seed.shape)}; accepted is (1,)")


def _check_backward(grad_out, qkv, bias_table, pad_qkv, seed, out, lse, window, shift, scale, dropout_p) -> None:
    _check_raw(qkv, bias_table, pad_qkv, seed, window, shift, scale, dropout_p)
    volume, channels, heads = qkv.shape[:-1], qkv.shape[-1] // 3, bias_table.shape[1]
    for name, tensor, last, dtype in (
        ("grad_out", grad_out, channels, qkv.dtype),
        ("out", out, channels, qkv.dtype),
        ("lse", lse, heads, torch.promote_types(qkv.dtype, torch.float32)),
    ):
        check_saved(f"{_NAME}_backward", name, tensor, (*volume, last), (dtype,), qkv)


def _call(qkv, bias_table, pad_qkv, seed, window, shift, scale, dropout_p, *, backward: bool = False) -> Call:
    return WindowAttentionCall(
        device=qkv.device.type,
        dtype=qkv.dtype,
        backward=backward,
        head_dim=qkv.shape[-1] // (3 * bias_table.shape[1]),
        window=WindowGrid.clip(qkv.shape[1:-1], window),
        dropout=dropout_p > 0,
    )


def _call_backward(grad_out, qkv, bias_table, pad_qkv, seed, out, lse, *settings) -> Call:
    return _call(qkv, bias_table, pad_qkv, seed, *settings, backward=True)


def _forward(kernel, qkv, bias_table, pad_qkv, seed, window, shift, scale, dropout_p):
    grid = WindowGrid.of(qkv.shape[1:-1], window, shift)
    return kernel.forward(qkv, bias_table, pad_qkv, seed, grid, scale, dropout_p)


def _backward(kernel, grad_out, qkv, bias_table, pad_qkv, seed, out, lse, window, shift, scale, dropout_p):
    grid = WindowGrid.of(qkv.shape[1:-1], window, shift)
    return kernel.backward(grad_out, qkv, bias_table, pad_qkv, seed, out, lse, grid, scale, dropout_p)


def _fake(qkv, bias_table, *_):
    out = qkv.new_empty((*qkv.shape[:-1], qkv.shape[-1] // 3))
    lse_dtype = torch.promote_types(qkv.dtype, torch.float32)
    return out, qkv.new_empty((*qkv.shape[:-1], bias_table.shape[1]), dtype=lse_dtype)


def _fake_backward(grad_out, qkv, bias_table, *_):
    return qkv.new_empty(qkv.shape), bias_table.new_empty(bias_table.shape), qkv.new_empty(qkv.shape[-1:])


def _saved(arguments, results):
    qkv, bias_table, pad_qkv, seed, *settings = arguments
    return qkv, bias_table, pad_qkv, seed, *results, *settings


def _autocast(dtype, qkv, bias_table, pad_qkv, *rest):
    """`qkv` and `pad_qkv` in the autocast dtype, the table in its own or float32."""
    if qkv.dtype != torch.float64:
        qkv = qkv.to(dtype)
        bias_table = bias_table if bias_table.dtype == dtype else bias_table.float()
    return qkv, bias_table, None if pad_qkv is None else pad_qkv.to(qkv.dtype), *rest


def _forward_flops(qkv_shape, bias_table_shape, pad_qkv_shape, seed_shape, window, shift, *_) -> int:
    return 2 * product_flops(qkv_shape, window, shift)  # scores, values


def _backward_flops(
    grad_shape, qkv_shape, bias_table_shape, pad_qkv_shape, seed_shape, attended_shape, lse_shape, window, shift, *_
) -> int:
    return 5 * product_flops(qkv_shape, window, shift)  # scores again, gradients of weights, q, k and v


def product_flops(qkv_shape: Sequence[int], window: Sequence[int], shift: Sequence[int]) -> int:
    """FLOPs of one product of all pairs of tokens of each window, padding included, over C channels."""
    grid = WindowGrid.of(qkv_shape[1:-1], window, shift)
    return 2 * qkv_shape[0] * grid.num_windows * grid.tokens**2 * (qkv_shape[-1] // 3)


def example(
    name: str,
    spatial: tuple[int, ...],
    window: tuple[int, ...],
    shift: tuple[int, ...],
    heads: int,
    head_dim: int,
    batch: int = 1,
    **options,
) -> Example:
    """A call with all tensors given."""
    channels = heads * head_dim
    return Example(
        name,
        {
            "qkv": (batch, *spatial, 3 * channels),
            "bias_table": (bias_table_length(window), heads),
            "pad_qkv": (3 * channels,),
        },
        {"window_size": window, "shift_size": shift, **options},
    )


_OPERATOR = Operator(
    public=window_attention,
    summary="`qkv (B, *S, 3C)` → `(B, *S, C)`: multi-head attention inside the (shifted) windows, with relative "
    "position bias; differentiable in `qkv`, `bias_table` and `pad_qkv`",
    call_type=WindowAttentionCall,
    prepare=_prepare,
    forward=Pass(
        "(Tensor qkv, Tensor bias_table, Tensor? pad_qkv, Tensor? seed, int[] window_size, int[] shift_size, "
        "float scale, float dropout_p) -> (Tensor, Tensor)",
        check=_check_raw,
        call=_call,
        run=_forward,
        fake=_fake,
        flops=_forward_flops,
    ),
    backward=Pass(
        "(Tensor grad_out, Tensor qkv, Tensor bias_table, Tensor? pad_qkv, Tensor? seed, Tensor out, Tensor lse, "
        "int[] window_size, int[] shift_size, float scale, float dropout_p) -> (Tensor, Tensor, Tensor)",
        check=_check_backward,
        call=_call_backward,
        run=_backward,
        fake=_fake_backward,
        flops=_backward_flops,
    ),
    saved=_saved,
    differentiable=(0, 1, 2),
    autocast=_autocast,
    examples=(
        example("3D, padded, shifted", (9, 8, 7), (7, 7, 7), (3, 3, 3), heads=1, head_dim=16),
        example("3D, pads one axis, clips one", (3, 9, 8), (4, 4, 4), (2, 2, 2), heads=2, head_dim=32),
        example("3D, dropout", (5, 8, 4), (4, 4, 4), (2, 2, 2), heads=2, head_dim=16, dropout_p=0.2),
        example("2D, padded, shifted", (10, 9), (7, 7), (3, 3), heads=2, head_dim=8, batch=2),
        example("3D, clipped", (6, 6, 6), (7, 7, 7), (3, 3, 3), heads=1, head_dim=16),
        example("3D, odd head_dim", (5, 4, 6), (3, 2, 3), (1, 1, 0), heads=3, head_dim=5),
    ),
    timed={  # the shifted block of stage 1 of Swin UNETR (feature_size 48), at 24³ and 96³ voxels
        "cpu": example("12³ tokens, window 7³", (12,) * 3, (7,) * 3, (3,) * 3, heads=3, head_dim=16),
        "cuda": example("48³ tokens, window 7³", (48,) * 3, (7,) * 3, (3,) * 3, heads=3, head_dim=16),
    },
)
