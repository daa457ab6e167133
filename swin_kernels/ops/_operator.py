"""An operator is a row of the grid: declared once, in its own file, which says all that is needed around its kernels.

`Operator` registers its functions with `torch.library` and gives each of them argument checks, the choice of a backend
with reasons and a line in the log, contiguous arguments, the results for an empty batch, shapes for tracing (the fake
function), autograd, autocast and a count of FLOPs. What an operator cannot do raises an error that says so: a second
derivative, forward-mode AD below the public function, ONNX. Under the transforms of `torch.func` the public function
runs the operator's definition, which is the reference's kernel.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch._functorch import eager_transforms
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from ..backends import (
    BACKENDS,
    REFERENCE,
    Call,
    decline_reason,
    forced_name,
    forced_or_environment,
    log,
    select,
)
from ..backends.in_place import guard_write
from ._checks import autocast_is_on

T = TypeVar("T", bound=Callable[..., Any])

NAMESPACE = "swin_kernels"
library = torch.library.Library(NAMESPACE, "DEF")

OPERATORS: dict[str, Operator] = {}
"""Every operator, by the name of its public function."""

WANTED = object()
"""Placeholder among the arguments that `Operator.saved` returns, for a list that says of each differentiable argument
whether its gradient is needed."""


def _no_flops(*shapes, out_shape=None) -> int:
    return 0  # PyTorch's counter counts only products of matrices


@dataclass(frozen=True)
class Pass:
    """A function of `torch.library`: a forward, a backward, or a forward in place.

    Attributes:
        schema: its arguments and results, without the last argument, the backend's name.
        check: raises TypeError or ValueError for arguments that do not fit; a raw call may pass anything.
        call: the `Call` of the arguments.
        run: called with a backend's kernel and the arguments; returns the results.
        fake: results of the right shapes, dtypes and strides, with any values.
        contiguous: whether `run` needs each tensor contiguous; if not, it lays them out itself.
        composed: a kernel made of other operators. It runs in place of the reference's where no backend is forced and
            none other takes the call, since those operators may have kernels of their own.
        flops: as `torch.utils.flop_counter.register_flop_formula` takes it.
    """

    schema: str
    check: Callable[..., object]
    call: Callable[..., Call]
    run: Callable[..., Any]
    fake: Callable[..., Any]
    contiguous: bool = True
    composed: Any = None
    flops: Callable[..., int] = _no_flops


@dataclass(frozen=True)
class Example:
    """A call of an operator that the tests, the doctor and `make verify-gpu` run.

    Attributes:
        name: what is special about it.
        shapes: of the tensors, by argument; each is differentiated.
        options: the other arguments.
        batched: tensors beside the first whose first extent is the batch.
    """

    name: str
    shapes: Mapping[str, tuple[int, ...]]
    options: Mapping[str, Any] = field(default_factory=dict)
    batched: tuple[str, ...] = ()

    def tensors(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, torch.Tensor]:
        """Normal values, the same in every dtype and on every device; weights scaled so that results stay near 1."""
        generator = torch.Generator().manual_seed(seed)
        found = {}
        for name, shape in self.shapes.items():
            value = torch.randn(shape, generator=generator, dtype=torch.float64)
            if name.endswith("weight") and len(shape) > 1:
                value = value / (value.numel() / shape[0]) ** 0.5
            found[name] = value.to(device, dtype)
        return found


@dataclass
class Operator:
    """A row of the grid; creating it registers it.

    Attributes:
        public: the public function; its name is the operator's.
        summary: what it computes, a line for the README.
        call_type: its `Call`.
        prepare: checks the arguments of the public function, all but `backend`, and returns those of `forward`.
        forward: computes the results.
        examples: calls on which every backend is compared with the reference; the first is the quick one.
        timed: by device type, the call that the doctor times.
        backward: the gradients, in the order of `differentiable`; or the name of a function of the namespace that
            computes them.
        saved: called with the arguments and the results of the forward; returns the arguments of the backward after the
            first, which is the gradient of the first result. `WANTED` may be among them.
        differentiable: positions of the forward's arguments that have gradients.
        in_place: the forward that writes its result to its first argument.
        autocast: called with autocast's dtype and the forward's arguments; returns those to use. None changes nothing.
        definition: computes the forward's results in PyTorch's own operators, given the reference's kernel and the
            arguments; None for `forward.run`.
        exact: whether the operator only copies, so that backends agree bit for bit.
    """

    public: Callable[..., Any]
    summary: str
    call_type: type[Call]
    prepare: Callable[..., tuple]
    forward: Pass
    examples: Sequence[Example]
    timed: Mapping[str, Example]
    backward: Pass | str
    saved: Callable[[tuple, Any], Sequence]
    differentiable: tuple[int, ...] = (0,)
    in_place: Pass | None = None
    autocast: Callable[..., tuple] | None = None
    definition: Callable[..., Any] | None = None
    exact: bool = False

    @property
    def name(self) -> str:
        return self.call_type.operator

    def __post_init__(self) -> None:
        name = self.name
        if name in OPERATORS:
            raise ValueError(f"an operator {name!r} is already registered")
        if self.public.__name__ != name:
            raise ValueError(f"operator {name!r}: public is {self.public.__name__}; accepted is a function of its name")
        if self.in_place and self.in_place.contiguous:
            raise ValueError(f"operator {name!r}: in_place is contiguous; it would write to a copy")
        self._reference = BACKENDS[REFERENCE].kernel(self.call_type.kernel)
        _define(name, self.forward)
        if self.in_place:
            _define(f"{name}_", self.in_place)
            guard_write(library, f"{name}_")
            # Lazily negated views: PyTorch resolves them only for operators that return something.
            library.impl(f"{name}_", torch.library.fallthrough_kernel, "Negative")
        if isinstance(self.backward, Pass):
            _define(f"{name}_backward", self.backward)
            torch.library.register_autograd(f"{NAMESPACE}::{name}_backward", self._second_backward, lib=library)
        torch.library.register_autograd(
            f"{NAMESPACE}::{name}", self._differentiate, setup_context=self._save, lib=library
        )
        if self.autocast:
            for device in ("CPU", "CUDA"):
                self._implement_autocast(device, self.autocast)
        OPERATORS[name] = self

    def __call__(self, arguments: tuple, backend: str | None) -> Any:
        """The results of the forward, from the chosen backend or, under a transform, from the definition."""
        if runs_definition(self.name, backend):
            return self.define(*arguments)
        return self._function(*arguments, forced_name(self.name, backend))

    @property
    def _function(self) -> Any:
        return getattr(torch.ops.swin_kernels, self.call_type.operator)

    def define(self, *arguments) -> Any:
        """The results of the forward in PyTorch's own operators."""
        if self.autocast and autocast_is_on(arguments[0].device):
            arguments = self.autocast(torch.get_autocast_dtype(arguments[0].device.type), *arguments)
        return (self.definition or self.forward.run)(self._reference, *arguments)

    def explain(self, *arguments, **options) -> dict[str, str | None]:
        """Why each backend would decline a call of the public function: name to reason, None if it runs it."""
        prepared = self.prepare(*arguments, **options)
        device = prepared[0].device
        if self.autocast and autocast_is_on(device):
            prepared = self.autocast(torch.get_autocast_dtype(device.type), *prepared)
        call = self.forward.call(*prepared)
        return {name: decline_reason(name, call) for name in BACKENDS}

    def _save(self, ctx, inputs, output) -> None:
        results = output if isinstance(output, tuple) else (output,)
        ctx.mark_non_differentiable(*results[1:])
        ctx.set_materialize_grads(False)  # so that no zeros the size of a volume stand for a missing gradient
        *arguments, ctx.backend = inputs
        saved = self.saved(arguments, output)
        ctx.places = [isinstance(value, torch.Tensor) for value in saved]
        ctx.settings = [value for value, tensor in zip(saved, ctx.places, strict=True) if not tensor]
        ctx.save_for_backward(*(value for value, tensor in zip(saved, ctx.places, strict=True) if tensor))

    def _differentiate(self, ctx, grad_out, *_):
        gradients: list[torch.Tensor | None] = [None] * len(ctx.needs_input_grad)
        if grad_out is None:
            return tuple(gradients)
        wanted = [ctx.needs_input_grad[i] for i in self.differentiable]
        # Where nothing was saved a second backward needs no retained graph.
        tensors, settings = iter(ctx.saved_tensors if any(ctx.places) else ()), iter(ctx.settings)
        arguments = [next(tensors) if tensor else next(settings) for tensor in ctx.places]
        arguments = [wanted if value is WANTED else value for value in arguments]
        found = self._backward_function(grad_out, *arguments, ctx.backend)
        found = found if isinstance(found, tuple | list) else (found,)
        for i, needed, gradient in zip(self.differentiable, wanted, found, strict=True):
            gradients[i] = gradient if needed else None
        return tuple(gradients)

    @property
    def _backward_function(self) -> Any:
        name = self.backward if isinstance(self.backward, str) else f"{self.name}_backward"
        return getattr(torch.ops.swin_kernels, name)

    def _second_backward(self, ctx, *gradients):
        raise RuntimeError(f"{self.name}: differentiable once; a second derivative was asked for (create_graph=True)")

    def _implement_autocast(self, device: str, autocast: Callable[..., tuple]) -> None:
        key = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device}"))

        def run(*given):
            *arguments, backend = given
            cast = autocast(torch.get_autocast_dtype(device.lower()), *arguments)
            with torch._C._ExcludeDispatchKeyGuard(key):
                return self._function(*cast, backend)

        library.impl(self.name, run, f"Autocast{device}")


def operator_of(function: Callable[..., Any] | str) -> Operator:
    """The operator of a public function or of its name.

    Raises:
        ValueError: there is no such operator.
    """
    name = function if isinstance(function, str) else getattr(function, "__name__", repr(function))
    if name not in OPERATORS or not (isinstance(function, str) or function is OPERATORS[name].public):
        raise ValueError(f"operator: got {function!r}; accepted are {', '.join(OPERATORS)}")
    return OPERATORS[name]


def constant_when_compiled(function: T) -> T:
    """`torch.compiler.assume_constant_result`, which would import all of Dynamo with this package."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined] # a function takes any attribute
    return function


@constant_when_compiled
def has_kernel(operator: str, **fields: Any) -> bool:
    """Whether a backend other than the reference would run such a call of `operator`.

    A backend that is forced but has no kernel for this operator leaves it to PyTorch.

    Args:
        operator: name of the public function.
        fields: the fields of its `Call`.
    """
    call = OPERATORS[operator].call_type(**fields)
    if forced := forced_or_environment(forced_name(operator, None)):
        reason = "the definition is wanted" if forced == REFERENCE else decline_reason(forced, call)
        if reason:
            log.debug("%s is left to PyTorch's layers; %s, which is forced, declined: %s", call, forced, reason)
        return reason is None
    return select(call) is not BACKENDS[REFERENCE]


def is_transformed() -> bool:
    """Whether a transform of `torch.func` or forward-mode AD is active."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def runs_definition(operator: str, backend: str | None) -> bool:
    """Whether `operator` runs as its definition, in PyTorch's own operators, which every transform knows.

    It does where `is_transformed`: forward-mode AD would silently drop the tangent of an operator of `torch.library`,
    and the transforms of `torch.func` refuse such operators.

    Raises:
        RuntimeError: a backend other than the reference is forced under a transform; ONNX has no such operator.
    """
    if (torch.compiler.is_exporting() or torch.jit.is_tracing()) and torch.onnx.is_in_onnx_export():
        raise RuntimeError(
            f"{operator}: ONNX has no such operator; call swin_kernels.restore(model) before torch.onnx.export, or "
            "export the trained model with `swin-unetr export --formats onnx`"
        )
    if not is_transformed():
        return False
    forced = forced_or_environment(forced_name(operator, backend))
    if forced not in ("", REFERENCE):
        raise RuntimeError(
            f"{operator}: backend {forced!r} cannot run under a transform of torch.func or forward-mode AD; accepted "
            f"is {REFERENCE!r}"
        )
    if not torch.compiler.is_dynamo_compiling():  # a line in the log would break the graph
        log.debug("%s runs on its definition in PyTorch, under a transform of torch.func or forward-mode AD", operator)
    return True


def _define(name: str, step: Pass) -> None:
    """Register `step` as function `name` of the namespace, on every device."""
    arguments, arrow, results = step.schema.rpartition(" -> ")
    library.define(
        f"{name}({arguments.removeprefix('(').removesuffix(')')}, str backend){arrow}{results}",
        tags=(torch.Tag.pt2_compliant_tag,),
    )

    def run(*given):
        if _carry_tangent(given):
            # A graph that was recorded before may run its backward meanwhile, in this thread or another.
            raise RuntimeError(
                f"torch.ops.{NAMESPACE}.{name}: has no forward-mode derivative; the function of swin_kernels that "
                "wraps it has"
            )
        *arguments, backend = given
        step.check(*arguments)
        call = step.call(*arguments)
        forced = forced_or_environment(backend)
        engine = select(call, forced)
        if arguments[0].numel() == 0:  # an empty batch: no kernel has to handle it
            return _zeros(step.fake(*arguments))
        if step.contiguous:
            arguments = [a.contiguous() if isinstance(a, torch.Tensor) else a for a in arguments]
        kernel = engine.kernel(call.kernel)
        if step.composed and not forced and engine is BACKENDS[REFERENCE]:
            log.debug("%s runs as the operators that it is made of", call)
            kernel = step.composed
        return step.run(kernel, *arguments)

    def fake(*given):
        *arguments, _ = given
        step.check(*arguments)
        return step.fake(*arguments)

    library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)
    register_flop_formula(getattr(getattr(torch.ops, NAMESPACE), name))(functools.wraps(step.flops)(_flops_of(step)))


def _flops_of(step: Pass) -> Callable[..., int]:
    def flops(*shapes, out_shape=None, **_) -> int:
        return step.flops(*shapes[:-1])  # without the backend

    return flops


def _zeros(results: Any) -> Any:
    if isinstance(results, torch.Tensor):
        return results.zero_()
    return None if results is None else tuple(map(_zeros, results))


def _carry_tangent(arguments: Sequence[object]) -> bool:
    """Whether forward-mode AD wants a derivative of an operator's result; `torch.func.jvp` hides the tangents."""
    if forward_ad._current_level < 0:
        return False
    if eager_transforms.JVP_NESTING > 0:
        return True
    return any(isinstance(a, torch.Tensor) and forward_ad.unpack_dual(a).tangent is not None for a in arguments)


def owned(view: torch.Tensor) -> torch.Tensor:
    """`view`, whose memory nothing else uses, as a tensor that is no view, for an operator to return.

    Autograd does not let users modify a view from an operator in place, as activations do.
    """
    storage = view.untyped_storage()
    return view.new_empty(0).set_(storage, view.storage_offset(), view.shape, view.stride())
