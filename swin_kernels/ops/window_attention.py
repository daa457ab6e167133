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

import torch
from torch.utils.flop_counter import register_flop_formula

from ..backends import IMPLEMENTED, Call, decline_reason, forced_name, select
from ..backends.reference import window_attention as definition
from ..geometry import WindowGrid, bias_table_length
from ._library import (
    FLOATING,
    NAMESPACE,
    autocast_is_on,
    check_number,
    check_saved,
    check_tensor,
    check_volume,
    check_windows,
    define,
    implement,
    library,
    runs_definition,
)

define(
    "window_attention(Tensor qkv, Tensor bias_table, Tensor? pad_qkv, Tensor? seed, int[] window_size, "
    "int[] shift_size, float scale, float dropout_p, str backend) -> (Tensor, Tensor)"
)
define(
    "window_attention_backward(Tensor grad_out, Tensor qkv, Tensor bias_table, Tensor? pad_qkv, Tensor? seed, "
    "Tensor out, Tensor lse, int[] window_size, int[] shift_size, float scale, float dropout_p, str backend) "
    "-> (Tensor, Tensor, Tensor)"
)


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
        window_size: nominal window, an int or one per axis. On an axis no longer than it, the
            window becomes the axis and the shift 0.
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
        ValueError: shapes or devices that do not belong together, window < 1, shift or dropout out of
            range, unknown backend.
        RuntimeError: the forced backend cannot run the call.
    """
    window, shift = _check(qkv, bias_table, window_size, shift_size, pad_qkv, dropout_p)
    if scale is None:
        scale = (qkv.shape[-1] // (3 * bias_table.shape[1])) ** -0.5
    scale = check_number(_NAME, "scale", scale)
    seed = torch.randint(2**62, (1,), device=qkv.device) if dropout_p > 0 else None
    if runs_definition(_NAME, backend):
        if autocast_is_on(qkv.device):
            qkv, bias_table, pad_qkv = _autocast_inputs(qkv, bias_table, pad_qkv)
        grid = WindowGrid.of(qkv.shape[1:-1], window, shift)
        return definition.forward(qkv, bias_table, pad_qkv, seed, grid, scale, float(dropout_p))[0]
    out, _ = torch.ops.swin_kernels.window_attention(
        qkv, bias_table, pad_qkv, seed, window, shift, scale, float(dropout_p), forced_name(_NAME, backend)
    )
    return out


def explain(
    qkv: torch.Tensor,
    bias_table: torch.Tensor,
    window_size: int | Sequence[int],
    shift_size: int | Sequence[int] = 0,
    *,
    pad_qkv: torch.Tensor | None = None,
    dropout_p: float = 0.0,
) -> dict[str, str | None]:
    """Why each backend would decline this `window_attention` call: name to reason, None if it runs it."""
    window, shift = _check(qkv, bias_table, window_size, shift_size, pad_qkv, dropout_p)
    call = _call(qkv, bias_table, WindowGrid.of(qkv.shape[1:-1], window, shift), dropout_p, backward=False)
    return {name: decline_reason(name, call) for name in IMPLEMENTED}


_NAME = "window_attention"


def _check(qkv, bias_table, window_size, shift_size, pad_qkv, dropout_p) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Check the arguments of the public function; returns nominal window and shift per axis."""
    check_tensor(_NAME, "qkv", qkv, FLOATING)
    check_volume(_NAME, "qkv", qkv)
    window, shift = check_windows(_NAME, qkv.dim() - 2, window_size, shift_size)
    _check_bias_table(qkv, bias_table, window)
    if pad_qkv is not None:
        _check_pad_qkv(qkv, pad_qkv)
    if not 0 <= check_number(_NAME, "dropout_p", dropout_p) < 1:
        raise ValueError(f"{_NAME}: dropout_p is {dropout_p}; accepted is 0 ≤ dropout_p < 1")
    return window, shift


def _check_bias_table(qkv: torch.Tensor, bias_table: torch.Tensor, window: tuple[int, ...]) -> None:
    autocast = autocast_is_on(qkv.device)
    check_tensor(_NAME, "bias_table", bias_table, FLOATING if autocast else (*{qkv.dtype: 0, torch.float32: 0},))
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


def _check_pad_qkv(qkv: torch.Tensor, pad_qkv: torch.Tensor) -> None:
    autocast = autocast_is_on(qkv.device)
    check_tensor(_NAME, "pad_qkv", pad_qkv, FLOATING if autocast else (qkv.dtype,))
    if pad_qkv.shape != qkv.shape[-1:]:
        raise ValueError(f"{_NAME}: pad_qkv has shape {tuple(pad_qkv.shape)}; accepted is ({qkv.shape[-1]},)")
    if pad_qkv.device != qkv.device:
        raise ValueError(f"{_NAME}: pad_qkv is on {pad_qkv.device}, qkv on {qkv.device}; one device is accepted")


def _call(qkv: torch.Tensor, bias_table: torch.Tensor, grid: WindowGrid, dropout_p: float, backward: bool) -> Call:
    return Call(
        operator=_NAME,
        device=qkv.device.type,
        dtype=qkv.dtype,
        head_dim=qkv.shape[-1] // (3 * bias_table.shape[1]),
        window=grid.window,
        dropout=dropout_p > 0,
        backward=backward,
    )


def _check_raw(qkv, bias_table, pad_qkv, seed, window, shift, dropout_p) -> None:
    """Check the arguments of the operator below the public function, which whoever calls it may have made up."""
    _check(qkv, bias_table, window, shift, pad_qkv, dropout_p)
    if dropout_p > 0 and seed is None:
        raise ValueError(f"{_NAME}: seed is None; dropout needs one, int64 of shape (1,)")
    if seed is not None:
        check_tensor(_NAME, "seed", seed, (torch.int64,))
        if seed.shape != (1,):
            raise ValueError(f"{_NAME}: seed has shape {tuple(seed.shape)}; accepted is (1,)")


def _check_results(grad_out, qkv, bias_table, out, lse) -> None:
    """Check what the backward is given beside the arguments of the forward."""
    volume, channels, heads = qkv.shape[:-1], qkv.shape[-1] // 3, bias_table.shape[1]
    for name, tensor, last, dtype in (
        ("grad_out", grad_out, channels, qkv.dtype),
        ("out", out, channels, qkv.dtype),
        ("lse", lse, heads, torch.promote_types(qkv.dtype, torch.float32)),
    ):
        check_saved(f"{_NAME}_backward", name, tensor, (*volume, last), (dtype,), qkv)


def _contiguous(*tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    return tuple(None if t is None else t.contiguous() for t in tensors)


def _forward(qkv, bias_table, pad_qkv, seed, window, shift, scale, dropout_p, backend):
    _check_raw(qkv, bias_table, pad_qkv, seed, window, shift, dropout_p)
    grid = WindowGrid.of(qkv.shape[1:-1], window, shift)
    engine = select(_call(qkv, bias_table, grid, dropout_p, backward=False), backend)
    inputs = _contiguous(qkv, bias_table, pad_qkv, seed)
    return engine.window_attention.forward(*inputs, grid, scale, dropout_p)


def _backward(grad_out, qkv, bias_table, pad_qkv, seed, out, lse, window, shift, scale, dropout_p, backend):
    _check_raw(qkv, bias_table, pad_qkv, seed, window, shift, dropout_p)
    _check_results(grad_out, qkv, bias_table, out, lse)
    grid = WindowGrid.of(qkv.shape[1:-1], window, shift)
    engine = select(_call(qkv, bias_table, grid, dropout_p, backward=True), backend)
    inputs = _contiguous(grad_out, qkv, bias_table, pad_qkv, seed, out, lse)
    return engine.window_attention.backward(*inputs, grid, scale, dropout_p)


implement("window_attention", _forward)
implement("window_attention_backward", _backward)


@torch.library.register_fake(f"{NAMESPACE}::window_attention", lib=library)
def _(qkv, bias_table, pad_qkv, seed, window, shift, scale, dropout_p, backend):
    _check_raw(qkv, bias_table, pad_qkv, seed, window, shift, dropout_p)
    out = qkv.new_empty((*qkv.shape[:-1], qkv.shape[-1] // 3))
    lse_dtype = torch.promote_types(qkv.dtype, torch.float32)
    return out, qkv.new_empty((*qkv.shape[:-1], bias_table.shape[1]), dtype=lse_dtype)


@torch.library.register_fake(f"{NAMESPACE}::window_attention_backward", lib=library)
def _(grad_out, qkv, bias_table, pad_qkv, seed, out, lse, window, shift, scale, dropout_p, backend):
    _check_raw(qkv, bias_table, pad_qkv, seed, window, shift, dropout_p)
    _check_results(grad_out, qkv, bias_table, out, lse)
    return qkv.new_empty(qkv.shape), bias_table.new_empty(bias_table.shape), qkv.new_empty(qkv.shape[-1:])


def _setup_context(ctx, inputs, output):
    qkv, bias_table, pad_qkv, seed, *ctx.settings = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(qkv, bias_table, pad_qkv, seed, out, lse)


def _autograd_backward(ctx, grad_out, grad_lse):
    grad_qkv, grad_bias_table, grad_pad_qkv = torch.ops.swin_kernels.window_attention_backward(
        grad_out, *ctx.saved_tensors, *ctx.settings
    )
    return grad_qkv, grad_bias_table, grad_pad_qkv if ctx.needs_input_grad[2] else None, None, *[None] * 5


torch.library.register_autograd(
    f"{NAMESPACE}::window_attention", _autograd_backward, setup_context=_setup_context, lib=library
)


def _second_backward(ctx, *grads):
    raise RuntimeError(f"{_NAME}: differentiable once; a second derivative was asked for (create_graph=True)")


torch.library.register_autograd(f"{NAMESPACE}::window_attention_backward", _second_backward, lib=library)


def _autocast_inputs(qkv, bias_table, pad_qkv):
    dtype = torch.get_autocast_dtype(qkv.device.type)
    if qkv.dtype != torch.float64:
        qkv = qkv.to(dtype)
        bias_table = bias_table if bias_table.dtype == dtype else bias_table.float()
    return qkv, bias_table, None if pad_qkv is None else pad_qkv.to(qkv.dtype)


def _autocast(device: str):
    """The operator under autocast on `device`: `qkv` and `pad_qkv` in the autocast dtype."""
    key = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device.upper()}"))

    def run(qkv, bias_table, pad_qkv, *rest):
        with torch._C._ExcludeDispatchKeyGuard(key):
            inputs = _autocast_inputs(qkv, bias_table, pad_qkv)
            return torch.ops.swin_kernels.window_attention(*inputs, *rest)

    return run


library.impl("window_attention", _autocast("cpu"), "AutocastCPU")
library.impl("window_attention", _autocast("cuda"), "AutocastCUDA")


@register_flop_formula(torch.ops.swin_kernels.window_attention)
def _forward_flops(qkv_shape, bias_table_shape, pad_qkv_shape, seed_shape, window, shift, *args, out_shape=None) -> int:
    return 2 * product_flops(qkv_shape, window, shift)  # scores, values


@register_flop_formula(torch.ops.swin_kernels.window_attention_backward)
def _backward_flops(
    grad_shape, qkv_shape, bias_table_shape, pad_qkv_shape, seed_shape, attended_shape, lse_shape, window, shift, *args,
    out_shape=None,
) -> int:  # fmt: skip
    return 5 * product_flops(qkv_shape, window, shift)  # scores again, gradients of weights, q, k and v


def product_flops(qkv_shape: Sequence[int], window: Sequence[int], shift: Sequence[int]) -> int:
    """Of one product of all pairs of tokens of a window, padding included, over C channels."""
    grid = WindowGrid.of(qkv_shape[1:-1], window, shift)
    return 2 * qkv_shape[0] * grid.num_windows * grid.tokens**2 * (qkv_shape[-1] // 3)
