"""Random calls of every operator: results checked against float64, and bad arguments refused by name."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

import swin_kernels
from swin_kernels import backends
from swin_kernels.ops import OPERATORS
from swin_kernels.ops.layer_norm import layer_norm
from swin_kernels.ops.projected_window_attention import projected_window_attention

from ..ops import cases as attention
from ..ops import test_convolution as convolution
from ..ops import test_instance_norm_act as instance_norm
from ..ops import test_layer_norm as norm
from ..ops import test_projected_window_attention as projected
from ..ops import test_window_partition as partition
from ..ops.tolerances import ARITHMETIC, assert_close, largest
from .mutation import NUMBERS, Draw, Fault, one_of

# PyTorch's oneDNN keeps the code of a thousand shapes, which looks like a leak. It is read at the first use.
ONEDNN_CACHES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16", "LRU_CACHE_CAPACITY": "16"}

MOST_SCORES = 40_000
"""Elements of the score tensor: a case takes about ten milliseconds."""
POOLED = 8
"""Draws of a case whose errors are combined where one was too far off: on a few elements plain PyTorch may happen to
be exact, on many it is not."""
SIXTEEN_BITS = (torch.bfloat16, torch.float16)
DTYPES = (torch.float64, torch.float32, *SIXTEEN_BITS)
ROUNDINGS = 4
"""Roundings of a score in float32, each half a unit in the last place of the largest score: the relative error of a
weight, however it is computed."""
ISAS = ("baseline", "avx2", "avx512", "amx")


@dataclass(frozen=True)
class Compared:
    """A result, and what it is checked against (`tolerances.assert_close`)."""

    value: torch.Tensor
    plain: torch.Tensor
    truth: torch.Tensor
    scale: float


def prepare(folder: Path) -> Callable[[Draw, Path], str]:
    os.environ.update(ONEDNN_CACHES)
    operators = {f"{namespace}.{name}": op for namespace in NAMESPACES for name, op in _operators(namespace).items()}
    engines = [name for name, backend in backends.BACKENDS.items() if not backend.unavailable()]
    isas = [isa for isa in ISAS if _runs(isa)] if "cpu" in engines else []

    def case(draw: Draw, place: Path) -> str:
        torch.manual_seed(draw.randrange(2**31))
        torch.set_num_threads(draw.choice((1, 1, 1, 1, 2, 3)))
        if isas:
            os.environ["SWIN_KERNELS_ISA"] = isa = draw.choice(isas)
            draw.note(f"instruction set {isa}, {torch.get_num_threads()} threads")
        kinds = (
            (5, partial(_numbers, engines=engines)),
            (3, _bad_call),
            (2, partial(_bad_raw_call, operators=operators)),
        )
        return one_of(draw, kinds)(draw)

    return case


def _runs(isa: str) -> bool:
    os.environ["SWIN_KERNELS_ISA"] = isa
    try:
        torch.ops.swin_kernels_cpu.isa()
    except RuntimeError:
        return False
    finally:
        del os.environ["SWIN_KERNELS_ISA"]
    return True


# --- numbers ---


def _numbers(draw: Draw, engines: list[str]) -> str:
    make = draw.choice((_attention, _attention, _projected, _convolution, _instance_norm, _layer_norm, _partition))
    dtype, engine = draw.choice(DTYPES), draw.choice(engines)
    results = make(draw, dtype, engine)
    draw.note(f"{dtype} on {engine}")
    if results is None:
        return "not on this backend"
    _hold_pooled(results)
    return "right"


def _hold_pooled(results: Callable[[int], dict[str, Compared]]) -> None:
    """Check the first draw of a case against the truth; if it is too far off, several together."""
    try:
        _hold(results(0))
    except AssertionError:
        draws = [results(number) for number in range(POOLED)]
        _hold({name: _pooled([drawn[name] for drawn in draws]) for name in draws[0]})


def _hold(compared: dict[str, Compared]) -> None:
    for name, of in compared.items():
        assert_close(name, of.value, of.plain, of.truth, of.scale)


def _pooled(draws: list[Compared]) -> Compared:
    tensors = (torch.stack([getattr(of, name) for of in draws]) for name in ("value", "plain", "truth"))
    return Compared(*tensors, max(of.scale for of in draws))


def _declined(engine: str, operator: str, dtype: torch.dtype, **fields) -> bool:
    call = OPERATORS[operator].call_type(device="cpu", dtype=dtype, **fields)
    return backends.decline_reason(engine, call) is not None


def _grid(draw: Draw) -> dict[str, Any]:
    """Fields of `attention.Case`: a volume, its windows, heads, values."""
    axes = draw.choice((2, 3, 3))
    most = 20 if axes == 2 else 10
    window = tuple(draw.choice((1, 2, 3, 4, 5, 6, 7)) for _ in range(axes))
    shift = tuple(draw.choice((0, w // 2, draw.randrange(w))) for w in window)
    fields = {
        "name": str(draw.random()),
        "spatial": tuple(draw.randint(1, most) for _ in range(axes)),
        "window": window,
        "shift": shift,
        "batch": draw.choice((0, 1, 1, 1, 2, 3)),
        "heads": draw.choice((1, 2, 3, 4, 6)),
        "head_dim": draw.choice((1, 2, 3, 4, 5, 7, 8, 12, 16, 16, 16, 17, 20, 32, 33, 48, 64)),
        "pad": draw.chance(0.7),
        "magnitude": draw.choice((1e-3, 0.3, 1.0, 1.0, 1.0, 3.0, 10.0, 30.0)),
        "bias": draw.choice((0.0, 0.1, 1.0, 1.0, 10.0, 100.0)),
    }
    while attention.Case(**fields).scores > MOST_SCORES:
        fields["spatial"] = tuple(max(1, extent - 1) for extent in fields["spatial"])
    return fields


def _attention(draw: Draw, dtype: torch.dtype, engine: str):
    case = attention.Case(
        **_grid(draw),
        scale=draw.choice((None, None, None, 0.7, -0.3, 0.0, 2.0)),
        layout=draw.choice(("contiguous", "channels_first", "strided")),
        dropout_p=draw.choice((0.0, 0.0, 0.0, 0.3, 0.9)),
        float_table=dtype in SIXTEEN_BITS and draw.chance(0.3),
    )
    draw.note(str(case))
    window = tuple(min(s, w) for s, w in zip(case.spatial, case.window, strict=True))
    dropout = case.dropout_p > 0
    fields = {"window": window, "head_dim": case.head_dim, "dropout": dropout, "backward": True}
    if _declined(engine, "window_attention", dtype, **fields):
        return None

    def results(number: int) -> dict[str, Compared]:
        drawn = replace(case, name=f"{case.name} {number}")
        inputs = attention.make_inputs(drawn, dtype)
        out = attention.run(engine, drawn, inputs)
        values = [out.detach(), *attention.gradients(out, inputs)]
        plain, truth = attention.expected.__wrapped__(drawn, dtype)
        wide = inputs.double()
        with torch.no_grad():
            _, lse = attention.plain_attention(wide.qkv, wide.bias_table, wide.pad_qkv, drawn)
        scales = [largest(truth[0]), *[max(map(largest, truth[1:]))] * len(inputs.leaves)]
        compared = {}
        for name, *columns, scale in zip(attention.NAMES, values, plain, truth, scales, strict=False):
            parts = 3 if name == "grad of qkv" else 1
            for part, *of in zip("qkv", *(column.chunk(parts, dim=-1) for column in columns), strict=False):
                label = f"grad of {part}" if parts > 1 else name
                compared[label] = Compared(*of, scale + _rounding(lse, of[2]))
        return compared

    return results


def _rounding(lse: torch.Tensor, truth: torch.Tensor) -> float:
    """What the rounding of scores adds to the scale of a result."""
    return ROUNDINGS * torch.finfo(torch.float32).eps / 2 * largest(lse) * largest(truth) / ARITHMETIC[torch.float32]


def _projected(draw: Draw, dtype: torch.dtype, engine: str):
    case = attention.Case(**_grid(draw))
    if case.heads * case.head_dim > 128:
        case = replace(case, head_dim=16)
    draw.note(f"projected {case}")
    window = tuple(min(s, w) for s, w in zip(case.spatial, case.window, strict=True))
    fields = {"window": window, "heads": case.heads, "head_dim": case.head_dim, "backward": dtype not in SIXTEEN_BITS}
    if _declined(engine, "projected_window_attention", dtype, **fields):
        return None

    def results(number: int) -> dict[str, Compared]:
        # Its own generator is seeded by the length of the name.
        drawn = replace(case, name="x" * (number + 1 + int(float(case.name) * 10_000)))
        inputs = projected.make(drawn, dtype)
        wide = projected.in_float64(inputs)
        with torch.no_grad():
            x = F.layer_norm(wide["x"], wide["x"].shape[-1:], wide["norm_weight"], wide["norm_bias"], projected.EPS)
            qkv = F.linear(x, wide["weight"], wide["bias"])
            _, lse = attention.plain_attention(qkv, wide["bias_table"], wide["bias"], drawn)
        with swin_kernels.use_backend(engine):
            if dtype in SIXTEEN_BITS:
                with torch.no_grad():
                    value = {"out": projected.attend(inputs, drawn)}
                    plain = {"out": projected.plainly(inputs, drawn)}
                    truth = {"out": projected.plainly(wide, drawn)}
            else:
                value, plain, truth = (
                    projected.gradients(compute, given, drawn)
                    for compute, given in (
                        (projected.attend, inputs),
                        (projected.plainly, inputs),
                        (projected.plainly, wide),
                    )
                )
        scale = max(map(largest, truth.values()))
        return {n: Compared(value[n], plain[n], t, scale + _rounding(lse, t)) for n, t in truth.items()}

    return results


def _convolution(draw: Draw, dtype: torch.dtype, engine: str):
    axes = draw.choice((2, 3, 3))
    # PyTorch's own 16-bit gradients of weights are undefined for some volumes of one or two voxels on an axis.
    least = 3 if dtype in SIXTEEN_BITS else 1
    case = convolution.Case(
        str(draw.random()),
        tuple(draw.randint(least, 12) for _ in range(axes)),
        channels=draw.choice((1, 2, 3, 5, 8, 16, 17, 24, 48)),
        skip=draw.choice((0, 0, 1, 3, 8, 16, 24)),
        out=draw.choice((1, 2, 4, 5, 12, 16, 17, 24, 33, 48, 50)),
        kernel=draw.choice((1, 3, 3)),
        batch=draw.choice((1, 1, 1, 2, 3)),
        layout=draw.choice(("channels_last", "contiguous", "strided")),
    )
    draw.note(f"convolution {case}")
    channels = case.channels, case.skip, case.out
    if _declined(engine, "convolution", dtype, window=(case.kernel,) * axes, channels=channels, backward=True):
        return None

    def results(number: int) -> dict[str, Compared]:
        leaves, grad_out = convolution.make_inputs(replace(case, name=f"{case.name} {number}"), dtype)
        runs = (partial(swin_kernels.convolution, backend=engine), convolution.plain, convolution.plain)
        columns = _differentiated(runs, (leaves, leaves, _wide(leaves)), grad_out)
        names = ("out", "grad of x", "grad of weight", "grad of skip")
        return {n: Compared(v, p, t, largest(t)) for n, v, p, t in zip(names, *columns, strict=False)}

    return results


def _instance_norm(draw: Draw, dtype: torch.dtype, engine: str):
    spatial = [draw.randint(1, 9) for _ in range(draw.choice((1, 2, 3, 3)))]
    spatial[-1] += all(extent == 1 for extent in spatial)  # a norm needs more than one voxel
    case = instance_norm.Case(
        str(draw.random()),
        (draw.choice((0, 1, 1, 2, 3)), draw.choice((1, 2, 3, 5, 8, 16, 17, 33, 48)), *spatial),
        residual=draw.choice(("none", "plain", "normalized")),
        slope=draw.choice((0.0, 1e-4, 1e-3, 0.01, 0.01, 0.2, 1.0, 2.0)),
        eps=draw.choice((1e-5, 1e-5, 1e-3, 0.7)),
        mean=draw.choice((0.0, 0.5, -2.0)),
        deviation=draw.choice((1e-2, 1.0, 1.0, 30.0)),
        layout=draw.choice(("channels_last", "contiguous", "strided")),
    )
    draw.note(f"instance_norm_act {case}")
    if _declined(engine, "instance_norm_act", dtype, backward=True):
        return None

    def results(number: int) -> dict[str, Compared]:
        leaves, grad_out = instance_norm.make_inputs(replace(case, name=f"{case.name} {number}"), dtype)
        fused, plain = (
            lambda *t: instance_norm.fused(case, t, engine),
            lambda *t: instance_norm.plain(case, t),
        )
        columns = _differentiated((fused, plain, plain), (leaves, leaves, _wide(leaves)), grad_out)
        truth = columns[2]
        scales = [largest(truth[0]), *[max(map(largest, truth[1:]))] * 2]
        names = ("out", "grad of x", "grad of residual")
        return {n: Compared(*of) for n, *of in zip(names, *columns, scales, strict=False)}

    return results


def _layer_norm(draw: Draw, dtype: torch.dtype, engine: str):
    shape = [draw.randint(0 if i == 0 else 1, 6) for i in range(draw.randint(0, 3))]
    case = norm.Case(
        str(draw.random()),
        (*shape, draw.choice((2, 3, 5, 16, 17, 48, 96, 200))),
        weight=draw.chance(0.7),
        bias=draw.chance(0.7),
        eps=draw.choice((1e-5, 1e-3, 0.7)),
        mean=draw.choice((0.0, 0.5, -2.0)),
        deviation=draw.choice((1e-2, 1.0, 1.0, 30.0)),
        strided=draw.chance(0.3) and bool(shape),
    )
    draw.note(f"layer_norm {case}")
    if _declined(engine, "layer_norm", dtype, backward=True):
        return None

    def results(number: int) -> dict[str, Compared]:
        inputs, grad_out = norm.make_inputs(replace(case, name=f"{case.name} {number}"), dtype)
        leaves = [t for t in inputs if t is not None]
        given = [t is not None for t in inputs]

        def run(compute, *leaves):
            rest = iter(leaves)
            return compute(*(next(rest) if there else None for there in given))

        def plain(x, weight, bias):
            return F.layer_norm(x, x.shape[-1:], weight, bias, case.eps)

        fused = partial(run, lambda *t: layer_norm(*t, case.eps, backend=engine))
        columns = _differentiated(
            (fused, partial(run, plain), partial(run, plain)), (leaves, leaves, _wide(leaves)), grad_out
        )
        wide = leaves[0].detach().double()
        steepest = largest((wide.var(-1, correction=0) + case.eps).rsqrt())
        factor = largest(inputs[1].detach()) if given[1] else 1.0
        truth, of_gradient = columns[2], largest(grad_out)
        scales = [max(largest(truth[0]), abs(case.mean)), steepest * of_gradient * factor]
        scales += [max(largest(t), of_gradient) for t in truth[2:]]
        names = ["out", "grad of x", *(n for n, there in zip(("weight", "bias"), given[1:], strict=True) if there)]
        return {n: Compared(*of) for n, *of in zip(names, *columns, scales, strict=True)}

    return results


def _partition(draw: Draw, dtype: torch.dtype, engine: str):
    grid, channels = attention.Case(**_grid(draw)), draw.choice((1, 2, 3, 8, 16, 17, 48))
    dtype = draw.choice(partition.ANY_DTYPE)
    draw.note(f"window_partition {grid}, {channels} channels, {dtype}")
    if _declined(engine, "window_partition", dtype, window=grid.window):
        return None

    def results(number: int) -> dict[str, Compared]:
        x = partition.values((grid.batch, *grid.spatial, channels), dtype)
        x = attention.laid_out(x, "channels_first") if draw.chance(0.5) else x
        windows = swin_kernels.window_partition(x, grid.window, grid.shift, backend=engine)
        if not torch.equal(windows, partition.expected_windows(x, grid.window, grid.shift)):
            raise Fault("window_partition: other windows than MONAI's")
        back = swin_kernels.window_reverse(windows, grid.window, grid.shift, grid.spatial, backend=engine)
        if not torch.equal(back, x):
            raise Fault("window_reverse: another volume than was partitioned")
        return {}

    return results


def _wide(leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    return [leaf.detach().double().requires_grad_() for leaf in leaves]


def _differentiated(runs, inputs, grad_out: torch.Tensor) -> list[list[torch.Tensor]]:
    """For each run, its output and the gradients of its leaves."""
    columns = []
    for run, leaves in zip(runs, inputs, strict=True):
        out = run(*leaves)
        columns.append([out.detach(), *torch.autograd.grad(out, leaves, grad_out.to(out.dtype))])
    return columns


# --- bad arguments of public functions ---


def _good_call(draw: Draw) -> tuple[str, Callable, dict[str, Any]]:
    """A public function and arguments that it accepts."""
    grid = _grid(draw)
    case = attention.Case(**grid | {"head_dim": min(grid["head_dim"], 16), "magnitude": 1.0})
    channels, batch = case.heads * case.head_dim, case.batch
    windows = {"window_size": case.window, "shift_size": case.shift, "backend": draw.choice((None, None, "reference"))}
    table = torch.randn(len(attention.position_index(case.window).unique()), case.heads)
    x = torch.randn(batch, *case.spatial, channels)
    name = draw.choice(
        ("window_attention", "explain", "window_partition", "window_reverse", "projected_window_attention",
         "convolution", "instance_norm_act", "layer_norm")
    )  # fmt: skip
    if name in ("window_attention", "explain"):
        arguments = {"qkv": torch.randn(batch, *case.spatial, 3 * channels), "bias_table": table, **windows}
        arguments |= {"pad_qkv": torch.randn(3 * channels), "dropout_p": draw.choice((0.0, 0.3))}
        if name == "explain":
            del arguments["backend"]
            return "window_attention", swin_kernels.explain, arguments
        return name, swin_kernels.window_attention, arguments | {"scale": draw.choice((None, 0.5))}
    if name == "window_partition":
        return name, swin_kernels.window_partition, {"x": x, **windows}
    if name == "window_reverse":
        cut = swin_kernels.window_partition(x, case.window, case.shift)
        return name, swin_kernels.window_reverse, {"windows": cut, **windows, "spatial_shape": case.spatial}
    if name == "projected_window_attention":
        given = projected.make(case) | {"bias": torch.randn(3 * channels), "norm_eps": draw.choice((1e-5, None))}
        return name, projected_window_attention, given | windows | {"scale": draw.choice((None, 0.5))}
    if name == "layer_norm":
        given = {"x": x, "weight": torch.randn(channels), "bias": torch.randn(channels), "eps": 1e-5}
        return name, layer_norm, given | {"dtype": draw.choice((None, torch.bfloat16)), "backend": windows["backend"]}
    volume = torch.randn(batch, channels, *case.spatial, 1)[..., 0]
    if name == "instance_norm_act":
        volume = torch.randn(batch, channels, *(extent + 1 for extent in case.spatial))
        given = {"x": volume, "residual": torch.randn_like(volume), "normalize_residual": draw.chance(0.5)}
        given |= {"eps": 1e-5, "negative_slope": 0.01, "inplace": draw.chance(0.3), "backend": windows["backend"]}
        return name, swin_kernels.instance_norm_act, given
    kernel = draw.choice((1, 3))
    weight = torch.randn(4, 2 * channels, *[kernel] * len(case.spatial))
    given = {"x": volume, "weight": weight, "skip": torch.randn_like(volume), "backend": windows["backend"]}
    return name, swin_kernels.convolution, given


def _bad_call(draw: Draw) -> str:
    name, function, arguments = _good_call(draw)
    for changed in draw.sample(list(arguments), draw.choice((0, 1, 1, 1, 1, 2, 3))):
        arguments[changed] = _changed(draw, arguments[changed])
        draw.note(f"{name}: {changed} is {_described(arguments[changed])}")
    try:
        out = function(**arguments)
        if isinstance(out, torch.Tensor) and out.requires_grad and out.device.type == "cpu":
            out.sum().backward()
    except (TypeError, ValueError, RuntimeError) as error:
        return _refused(error, re.escape(f"{name}: "))
    return "taken"


def _refused(error: Exception, pattern: str) -> str:
    if "can't allocate memory" in str(error):
        return "too large"
    if not re.search(pattern, str(error)):
        says = f"{type(error).__name__}: {str(error)[:300]}"
        raise Fault(f"the message has no {pattern!r}: {says}") from error
    return "refused"


SENSELESS = (None, True, "a", b"a", 1.5, 2j, (), [], (1,), [[1]], {}, object(), np.ones(3), *NUMBERS)


def _changed(draw: Draw, value: Any) -> Any:
    """A replacement for a good argument: a value of another kind, or one nearly right."""
    if draw.chance(0.2):
        return draw.choice(SENSELESS)
    if isinstance(value, torch.Tensor):
        return draw.choice(_TENSORS)(draw, value)
    if isinstance(value, (tuple, list)):
        edited = [draw.choice((*value, *NUMBERS, None, True)) if draw.chance(0.4) else item for item in value]
        return type(value)(draw.choice((edited, edited[1:], [*edited, 1])))
    if isinstance(value, bool):
        return not value
    if isinstance(value, str) or value is None:
        return draw.choice(("", "reference", "cpu", "cuda", "triton", "gpu", 0.0, 1, torch.ones(2)))
    return draw.choice(NUMBERS)


def _another_shape(draw: Draw, x: torch.Tensor) -> torch.Tensor:
    shape = list(x.shape)
    for _ in range(draw.choice((1, 1, 2))):
        at = draw.randrange(len(shape) + 1)
        edit = draw.choice(("insert", "delete", "change", "change"))
        if edit == "insert":
            shape.insert(at, draw.randrange(4))
        elif at < len(shape):
            shape[at : at + 1] = [] if edit == "delete" else [draw.choice((0, 1, 2, 3, 5, shape[at] + 1))]
    return torch.randn(shape).to(x.dtype)


def _odd_value(draw: Draw, x: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    if x.numel() and x.is_floating_point():
        x.view(-1)[draw.randrange(x.numel())] = draw.choice((float("nan"), float("inf"), -float("inf"), 1e38, 1e-40))
    return x


_TENSORS = (
    _another_shape,
    _another_shape,
    _odd_value,
    lambda draw, x: x.to(draw.choice((*DTYPES, torch.int64, torch.uint8, torch.bool, torch.complex64))),
    lambda draw, x: x.to("meta"),
    lambda draw, x: x.to_sparse(),
    lambda draw, x: x.detach().clone().requires_grad_(x.is_floating_point()),
    lambda draw, x: x.mT if x.dim() > 1 else x.flip(0),
    lambda draw, x: torch.stack([x, x], -1)[..., 0],
    lambda draw, x: x[:1].expand(x.shape) if x.dim() and x.shape[0] else x,
    lambda draw, x: x[..., :0] if x.dim() else x,
    lambda draw, x: x.new_zeros(1).as_strided(x.shape, [0] * x.dim()),
)


def _described(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        grad = ", requires grad" if value.requires_grad else ""
        strides = value.stride() if value.layout == torch.strided else value.layout
        return f"{value.dtype} {tuple(value.shape)}, strides {strides} on {value.device}{grad}"
    return f"{type(value).__name__} {value!r}"[:100]


# --- the operators below them ---


def _operators(namespace: str) -> dict[str, Any]:
    names = {s.name.partition("::")[2] for s in torch._C._jit_get_all_schemas() if s.name.startswith(f"{namespace}::")}
    return {name: getattr(getattr(torch.ops, namespace), name) for name in sorted(names)}


NAMESPACES = ("swin_kernels", "swin_kernels_cpu")
ODD = (-(2**63), -(2**31), -1, 0, 1, 2, 3, 7, 2**31, 2**40, 2**62, 2**63 - 1)
"""Nothing between a few and 2³¹, where a request could be met and would take long."""


def _bad_raw_call(draw: Draw, operators: dict[str, Any]) -> str:
    """An operator called without its public function, with arguments of the kinds in its schema."""
    recorded = _recorded(draw, operators)
    without = {name: None for name in operators if name not in recorded}
    name = draw.choice(sorted({**recorded, **without}))
    operator = operators[name]
    schema = operator.default._schema.arguments
    arguments = list(recorded.get(name) or [_of_type(draw, str(a.type)) for a in schema])
    for at in draw.sample(range(len(arguments)), min(len(arguments), draw.choice((0, 1, 1, 1, 2, 3)))):
        arguments[at] = _changed_raw(draw, arguments[at], str(schema[at].type))
        draw.note(f"{name}: {schema[at].name} is {_described(arguments[at])}")
    try:
        operator(*arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        stem = re.sub(r"(_forward|_backward)?(_input|_weight|_inplace)?_?$", "", name.partition(".")[2])
        return _refused(error, re.escape(stem))
    return "taken"


def _recorded(draw: Draw, operators: dict[str, Any]) -> dict[str, tuple]:
    """The arguments with which a good call of a public function and its backward call `operators`."""
    _, function, arguments = _good_call(draw)
    arguments = {
        name: t.detach().clone().requires_grad_(not arguments.get("inplace")) if isinstance(t, torch.Tensor) else t
        for name, t in arguments.items()
    }
    calls: dict[str, tuple] = {}

    def recording(name: str, operator: Any) -> Callable:
        def call(*given):
            calls[name] = tuple(t.detach().clone() if isinstance(t, torch.Tensor) else t for t in given)
            return operator(*given)

        return call

    places = [(getattr(torch.ops, name.partition(".")[0]), name.partition(".")[2], name) for name in operators]
    try:
        for place, attribute, name in places:
            setattr(place, attribute, recording(name, operators[name]))
        out = function(**arguments)
        if isinstance(out, torch.Tensor) and out.requires_grad:
            out.sum().backward()
    finally:
        for place, attribute, name in places:
            setattr(place, attribute, operators[name])
    return calls


def _of_type(draw: Draw, kind: str) -> Any:
    """A value of a schema's type, small."""
    if kind.startswith("Optional") and draw.chance(0.3):
        return None
    if "Tensor" in kind:
        shape = [draw.randint(0, 4) for _ in range(draw.randint(0, 5))]
        return torch.randint(0, 9, shape).to(draw.choice((torch.float32, torch.float32, torch.int64)))
    if kind in ("List[int]", "Optional[List[int]]"):
        return [draw.randint(0, 5) for _ in range(draw.randint(0, 3))]
    if kind == "List[bool]":
        return [draw.chance(0.5) for _ in range(3)]
    return {"bool": True, "float": 0.5, "str": "reference"}.get(kind, draw.randint(0, 6))


def _changed_raw(draw: Draw, value: Any, kind: str) -> Any:
    if isinstance(value, torch.Tensor):
        return draw.choice(_TENSORS)(draw, value)
    if "List[int]" in kind:
        edited = [draw.choice((*ODD, 4, 5)) if draw.chance(0.5) else item for item in value or ()]
        return draw.choice((edited, edited[1:], [*edited, 1]))
    if kind.endswith("int"):
        return draw.choice(ODD)
    if "float" in kind:
        return float(draw.choice([n for n in NUMBERS if abs(n) < 1e308 or n != n]))
    return _of_type(draw, kind)
