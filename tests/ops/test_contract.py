"""What every operator of the grid promises, on every backend: the rows and the columns come from the registry."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.flop_counter import flop_registry

import swin_kernels
from swin_kernels.backends import BACKENDS, ENTRY_POINTS, REFERENCE, decline_reason, kernel_of
from swin_kernels.doctor import call_of, evaluate
from swin_kernels.ops import OPERATORS, Operator, explain
from swin_kernels.ops._operator import Example

from .tolerances import ARITHMETIC, STORAGE, largest

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ON_CPU = [name for name, backend in BACKENDS.items() if name == REFERENCE or "cpu" in backend.ranks]
ROWS = [(name, example.name) for name, operator in OPERATORS.items() for example in operator.examples]


@pytest.fixture(params=OPERATORS)
def operator(request) -> Operator:
    return OPERATORS[request.param]


def check_contract(operator: Operator, example: Example, backend: str, dtype: torch.dtype, device: str) -> None:
    """Check output and gradients of `backend` against the float64 reference: no worse than the reference in `dtype`."""
    call = call_of(operator, example, dtype, device)
    if reason := decline_reason(backend, replace(call, backward=False)):
        with pytest.raises(RuntimeError, match=re.escape(f"{operator.name}: backend {backend!r} cannot run")) as caught:
            evaluate(operator, example, example.tensors(dtype, device), backend, gradients=False)
        assert reason in str(caught.value)
        return
    gradients = decline_reason(backend, replace(call, backward=True)) is None
    tensors = example.tensors(dtype, device)
    found = evaluate(operator, example, tensors, backend, gradients)
    plain = evaluate(operator, example, tensors, REFERENCE, gradients)
    if operator.exact:
        for what, value in found.items():
            assert torch.equal(value, plain[what]), what
        return
    truth = evaluate(operator, example, {n: t.double() for n, t in tensors.items()}, REFERENCE, gradients)
    scale = max(map(largest, truth.values()))
    for what, true in truth.items():
        assert found[what].dtype == plain[what].dtype, what
        error, plain_error = (largest(values[what].double() - true) for values in (found, plain))
        granted = 4 * plain_error + 4 * (ARITHMETIC[dtype] + STORAGE[dtype]) * scale
        assert error <= granted, f"{what}: error {error:.3e}, the reference in {dtype} has {plain_error:.3e}"


def example_of(name: str, example: str) -> tuple[Operator, Example]:
    operator = OPERATORS[name]
    return operator, next(e for e in operator.examples if e.name == example)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", [name for name in ON_CPU if name != REFERENCE])
@pytest.mark.parametrize(("name", "example"), ROWS, ids=str)
def test_backends_agree(name, example, backend, dtype):
    check_contract(*example_of(name, example), backend, dtype, "cpu")


def smallest(operator: Operator) -> Example:
    return min(operator.examples, key=lambda example: sum(map(math.prod, example.shapes.values())))


def test_gradients_of_the_reference(operator):
    example = smallest(operator)
    tensors = example.tensors(torch.float64)
    leaves = [t.requires_grad_() for t in tensors.values()]

    def run(*values):
        torch.manual_seed(0)  # the same dropout
        return operator.public(**dict(zip(tensors, values, strict=True)), **example.options, backend=REFERENCE)

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


def test_raw_operators_pass_opcheck(operator):
    example = smallest(operator)
    leaves = {n: t.requires_grad_() for n, t in example.tensors(torch.float32).items()}
    arguments = operator.prepare(**leaves, **example.options)
    torch.library.opcheck(getattr(torch.ops.swin_kernels, operator.name).default, (*arguments, ""))


def test_schemas_match_the_reference(operator):
    """Each backend's kernel has the entry points of the reference's, with the same parameters."""
    kernel = operator.call_type.kernel
    twin = BACKENDS[REFERENCE].kernel(kernel)
    assert twin is not None, f"{operator.name} has no reference"
    assert any(hasattr(twin, entry) for entry in ENTRY_POINTS)
    for name, backend in BACKENDS.items():
        if name == "triton" and backend.unavailable():
            continue  # its modules need Triton; tests/triton has them
        kernel_of(backend, kernel)


def test_public_function(operator):
    assert operator.name in swin_kernels.__all__
    assert getattr(swin_kernels, operator.name) is operator.public
    assert operator.public.__doc__
    assert operator.summary
    assert set(operator.timed) == {"cpu", "cuda"}


def test_explain_names_every_backend(operator):
    example = operator.examples[0]
    tensors = example.tensors(torch.float32)
    for asked in (operator.public, operator.name):
        reasons = explain(asked, **tensors, **example.options)
        assert set(reasons) == set(BACKENDS)
        assert reasons[REFERENCE] is None
        assert all(reason is None or reason for reason in reasons.values())
    with pytest.raises(ValueError, match=f"operator: got 'matmul'; accepted are .*{operator.name}"):
        explain("matmul", **tensors)


def test_choice_is_logged(operator, caplog):
    caplog.set_level("DEBUG", logger="swin_kernels")
    example = operator.examples[0]
    operator.public(**example.tensors(torch.float32), **example.options)
    assert re.search(rf"{operator.call_type.__name__}\(.*\) runs on \w+", caplog.text)


def test_forced_backend_that_cannot_raises(operator, monkeypatch):
    backend = BACKENDS["cpu"]
    monkeypatch.setattr(backend, "unavailable", lambda: "not today")
    example = operator.examples[0]
    with pytest.raises(RuntimeError, match=f"{operator.name}: backend 'cpu' cannot run this call: not today"):
        operator.public(**example.tensors(torch.float32), **example.options, backend="cpu")
    with pytest.raises(ValueError, match=f"{operator.name}: backend: got 'gpu'; accepted are "):
        operator.public(**example.tensors(torch.float32), **example.options, backend="gpu")


def test_strides_do_not_matter(operator):
    example = operator.examples[0]
    tensors = example.tensors(torch.float32)
    torch.manual_seed(0)
    expected = operator.public(**tensors, **example.options)
    torch.manual_seed(0)
    spread = {n: torch.stack([t, t], -1)[..., 0] for n, t in tensors.items()}
    assert not any(t.is_contiguous() for t in spread.values())
    assert torch.equal(operator.public(**spread, **example.options), expected)


def test_empty_batch(operator):
    """Empty results; gradients of arguments without a batch are 0."""
    example = operator.examples[0]
    first = next(iter(example.shapes))
    batched = (first, *example.batched)
    shapes = {n: (0, *shape[1:]) if n in batched else shape for n, shape in example.shapes.items()}
    results = evaluate(
        operator, replace(example, shapes=shapes), replace(example, shapes=shapes).tensors(torch.float32), None
    )
    assert results["output"].numel() == 0
    for what, gradient in results.items():
        assert not gradient.any(), what


def test_meta_tensors_have_the_same_shapes(operator):
    example = operator.examples[0]
    tensors = example.tensors(torch.float32)
    out = operator.public(**tensors, **example.options)
    meta = operator.public(**{n: t.to("meta") for n, t in tensors.items()}, **example.options)
    assert (meta.shape, meta.dtype, meta.stride()) == (out.shape, out.dtype, out.stride())


def test_compiles_without_a_graph_break(operator):
    example = operator.examples[0]
    tensors = example.tensors(torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda t: operator.public(**t, **example.options).square(), fullgraph=True, backend="aot_eager"
    )
    torch.manual_seed(0)
    expected = operator.public(**tensors, **example.options).square()
    torch.manual_seed(0)
    torch.testing.assert_close(compiled(tensors), expected)


def test_transforms_compile_without_a_graph_break(operator):
    example = smallest(operator)
    tensors = example.tensors(torch.float32)
    argument = next(iter(tensors))
    batch = torch.stack([tensors[argument], -tensors[argument]])

    def mapped(batch):
        return torch.vmap(lambda x: operator.public(**(tensors | {argument: x}), **example.options))(batch)

    torch._dynamo.reset()
    compiled = torch.compile(mapped, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(batch), mapped(batch))


def test_second_derivative_is_refused_or_right(operator):
    example = operator.examples[0]
    leaves = {n: t.requires_grad_() for n, t in example.tensors(torch.float32).items()}
    out = operator.public(**leaves, **example.options)
    (gradient,) = torch.autograd.grad(out.square().sum(), next(iter(leaves.values())), create_graph=True)
    if operator.exact:  # linear: the backward is a separate operator
        gradient.sum().backward()
        return
    with pytest.raises(RuntimeError, match=f"{operator.name}: differentiable once"):
        gradient.sum().backward()


def test_forward_mode(operator):
    """The public function has the derivative; the operator below raises instead of losing it."""
    example = operator.examples[0]
    tensors = example.tensors(torch.float64)
    argument = next(iter(tensors))
    tangent = torch.randn(tensors[argument].shape, dtype=torch.float64)

    def run(x):
        torch.manual_seed(0)
        return operator.public(**(tensors | {argument: x}), **example.options)

    step = 1e-6
    quotient = (run(tensors[argument] + step * tangent) - run(tensors[argument] - step * tangent)) / (2 * step)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(tensors[argument], tangent)
        derivative = forward_ad.unpack_dual(run(dual)).tangent
        arguments = operator.prepare(**(tensors | {argument: dual}), **example.options)
        with pytest.raises(RuntimeError, match=f"swin_kernels.{operator.name}: has no forward-mode derivative"):
            getattr(torch.ops.swin_kernels, operator.name)(*arguments, "")
    torch.testing.assert_close(derivative, quotient, rtol=1e-5, atol=1e-6)


def test_vmap(operator):
    example = operator.examples[0]
    tensors = example.tensors(torch.float64)
    argument = next(iter(tensors))
    batch = torch.stack([tensors[argument], -tensors[argument]])

    def run(x):
        return operator.public(**(tensors | {argument: x}), **example.options)

    torch.testing.assert_close(torch.vmap(run)(batch), torch.stack([run(x) for x in batch]), rtol=1e-9, atol=1e-9)


def test_autocast_returns_one_dtype(operator):
    """Whatever an operator does with autocast, the public function and its definition do the same."""
    example = operator.examples[0]
    tensors = example.tensors(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = operator.public(**tensors, **example.options)
        defined = operator.define(*operator.prepare(**tensors, **example.options))
    defined = defined if isinstance(defined, torch.Tensor) else defined[0]
    assert out.dtype == defined.dtype == (torch.bfloat16 if operator.autocast else torch.float32)
    torch.testing.assert_close(out, defined, rtol=0.1, atol=0.1)


def test_flops_are_counted(operator):
    for ending in ("", "_" if operator.in_place else "", "" if isinstance(operator.backward, str) else "_backward"):
        assert getattr(torch.ops.swin_kernels, operator.name + ending) in flop_registry


def test_bad_arguments_are_named(operator):
    """Each tensor argument in turn with a wrong value; the message begins with the operator and names the argument."""
    example = operator.examples[0]
    tensors = example.tensors(torch.float32)
    first, names = next(iter(tensors)), "|".join(tensors)
    for name, good in tensors.items():
        for bad in ("text", [1.0], 3.0, good.to_sparse(), good.to(torch.complex64), good[..., None, None, None, None]):
            if operator.exact and isinstance(bad, torch.Tensor) and bad.is_complex():
                continue  # any dtype is copied
            with pytest.raises((TypeError, ValueError)) as caught:
                operator.public(**(tensors | {name: bad}), **example.options)
            told = names if isinstance(bad, torch.Tensor) else name  # a wrong shape may be reported for another tensor
            assert re.match(rf"{operator.name}: .*\b({told})\b", str(caught.value)), caught.value
        if name != first:
            with pytest.raises(ValueError, match=f"{operator.name}: {name} is on meta"):
                operator.public(**(tensors | {name: good.to("meta")}), **example.options)
    for option, good in example.options.items():
        if isinstance(good, float):
            with pytest.raises((TypeError, ValueError), match=f"^{operator.name}: {option} is"):
                operator.public(**tensors, **(example.options | {option: math.nan}))
        with pytest.raises((TypeError, ValueError), match=f"^{operator.name}: {option} is"):
            operator.public(**tensors, **(example.options | {option: object()}))
