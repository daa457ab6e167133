"""Every operator under the transforms of `torch.func`, forward-mode AD, PyTorch's FLOP counter and ONNX export."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from monai.networks.nets import SwinUNETR
from torch.utils.flop_counter import FlopCounterMode

import swin_kernels
from swin_kernels.ops.layer_norm import layer_norm
from swin_kernels.ops.projected_window_attention import projected_window_attention


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# Made here, not in the functions: `vmap` does not let them draw numbers.
TABLE = randn(25, 2, seed=1)  # of windows of 3², two heads
WEIGHT, BIAS, OUT_WEIGHT = randn(24, 8, seed=2) / 3, randn(24, seed=3), randn(8, 8, seed=4)
KERNELS, SCALE = randn(2, 3, 3, 3, 3, seed=5), randn(6, seed=6)


def projected(x: torch.Tensor, weight: torch.Tensor = WEIGHT) -> torch.Tensor:
    tensors = (t.to(x.dtype) for t in (weight, BIAS, TABLE))
    return projected_window_attention(x, *tensors, 3, 1, norm_eps=1e-5, out_weight=OUT_WEIGHT.to(x.dtype))


OPERATORS: dict[str, tuple[Callable, tuple[int, ...]]] = {
    "window_attention": (lambda x: swin_kernels.window_attention(x, TABLE, 3, 1, pad_qkv=BIAS), (2, 4, 5, 24)),
    "projected_window_attention": (projected, (2, 4, 5, 8)),
    "window_partition": (lambda x: swin_kernels.window_partition(x, 3, 1), (2, 4, 5, 3)),
    "window_reverse": (lambda x: swin_kernels.window_reverse(x, 3, 1, (4, 5)), (8, 9, 3)),
    "instance_norm_act": (swin_kernels.instance_norm_act, (2, 3, 4, 5)),
    "instance_norm_act, residual": (
        lambda x: swin_kernels.instance_norm_act(x, x.square(), normalize_residual=True),
        (2, 3, 4, 5),
    ),
    "convolution": (lambda x: swin_kernels.convolution(x, KERNELS, x[:, :1]), (2, 2, 4, 3, 5)),
    "layer_norm": (partial(layer_norm, weight=SCALE), (2, 3, 6)),
}


@pytest.fixture(params=OPERATORS)
def operator(request) -> tuple[Callable, torch.Tensor]:
    function, shape = OPERATORS[request.param]
    return function, randn(*shape, seed=7)


def difference_quotient(function: Callable, x: torch.Tensor, tangent: torch.Tensor) -> torch.Tensor:
    step = 1e-6
    return (function(x + step * tangent) - function(x - step * tangent)) / (2 * step)


def test_forward_mode(operator):
    function, x = operator
    tangent = randn(*x.shape, seed=8)
    expected = difference_quotient(function, x, tangent)
    out, derivative = torch.func.jvp(function, (x,), (tangent,))
    torch.testing.assert_close(out, function(x), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(derivative, expected, rtol=1e-6, atol=1e-7)
    with forward_ad.dual_level():
        out = forward_ad.unpack_dual(function(forward_ad.make_dual(x, tangent)))
    torch.testing.assert_close(out.tangent, expected, rtol=1e-6, atol=1e-7)


def test_gradients(operator):
    function, x = operator

    def loss(x: torch.Tensor) -> torch.Tensor:
        return function(x).square().mean()

    variable = x.clone().requires_grad_()
    loss(variable).backward()
    torch.testing.assert_close(torch.func.grad(loss)(x), variable.grad, rtol=1e-9, atol=1e-10)


def test_batches(operator):
    """`vmap` of a function, of its gradient, and the gradient of a `vmap`."""
    function, x = operator
    batch = torch.stack([x, 2 * x, x.flip(-1)], 1)  # x's batch comes first, the mapped axis second

    def loss(x: torch.Tensor) -> torch.Tensor:
        return function(x).square().mean()

    torch.testing.assert_close(
        torch.vmap(function, in_dims=1)(batch),
        torch.stack([function(v) for v in batch.unbind(1)]),
        rtol=1e-9,
        atol=1e-9,
    )
    expected = torch.stack([torch.func.grad(loss)(v) for v in batch.unbind(1)])
    torch.testing.assert_close(torch.vmap(torch.func.grad(loss), in_dims=1)(batch), expected, rtol=1e-9, atol=1e-10)
    summed = torch.func.grad(lambda batch: torch.vmap(loss, in_dims=1)(batch).sum())(batch)
    torch.testing.assert_close(summed, expected.movedim(0, 1), rtol=1e-9, atol=1e-10)


def test_second_derivatives_in_forward_mode():
    """Forward over reverse, the usual way to compute a Hessian's product, is not blocked by a kernel."""

    def loss(x: torch.Tensor) -> torch.Tensor:
        return projected(x).square().mean()

    x, direction = randn(1, 4, 4, 8, seed=7), randn(1, 4, 4, 8, seed=8)
    _, product = torch.func.jvp(torch.func.grad(loss), (x,), (direction,))
    expected = difference_quotient(torch.func.grad(loss), x, direction)
    torch.testing.assert_close(product, expected, rtol=1e-5, atol=1e-7)


def test_an_ensemble_maps_over_parameters():
    x, weights = randn(1, 4, 4, 8, seed=7), randn(3, 24, 8, seed=8)
    expected = torch.stack([projected(x, weight) for weight in weights])
    torch.testing.assert_close(torch.vmap(projected, (None, 0))(x, weights), expected, rtol=1e-9, atol=1e-9)


def test_in_place_norm_keeps_the_tangent():
    x, tangent = randn(2, 3, 4, 5, seed=7), randn(2, 3, 4, 5, seed=8)
    expected = difference_quotient(swin_kernels.instance_norm_act, x, tangent)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.clone(), tangent.clone())
        swin_kernels.instance_norm_act(dual, inplace=True)
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, expected, rtol=1e-6, atol=1e-7)


def test_autocast_under_a_transform():
    """The operators see the same dtypes as without it."""
    x = randn(1, 4, 4, 8).float()
    with torch.autocast("cpu", torch.bfloat16):
        out, tangent = torch.func.jvp(projected, (x,), (x,))
        expected = projected(x)
    assert out.dtype == tangent.dtype == expected.dtype == torch.bfloat16


def test_a_forced_backend_that_cannot_is_named(operator):
    function, x = operator
    with (
        swin_kernels.use_backend("cpu"),
        pytest.raises(RuntimeError, match=r"backend 'cpu' cannot run under a transform of torch\.func or forward-mode"),
    ):
        torch.func.jvp(function, (x,), (x,))
    with swin_kernels.use_backend("reference"):
        torch.func.jvp(function, (x,), (x,))


def test_an_operator_of_the_library_loses_no_tangent_in_silence():
    x = randn(1, 4, 4, 3)
    with pytest.raises(RuntimeError, match=r"torch\.ops\.swin_kernels\.window_partition: has no forward-mode"):
        torch.func.jvp(lambda x: torch.ops.swin_kernels.window_partition(x, [2, 2], [0, 0], ""), (x,), (x,))
    with (
        forward_ad.dual_level(),
        pytest.raises(RuntimeError, match=r"torch\.ops\.swin_kernels\.window_partition: has no forward-mode"),
    ):
        torch.ops.swin_kernels.window_partition(forward_ad.make_dual(x, x), [2, 2], [0, 0], "")


def test_a_graph_recorded_before_forward_mode_runs_its_backward_meanwhile(operator):
    """The level of forward-mode AD belongs to the process, so it may be on because of another thread."""
    function, x = operator
    x.requires_grad_()
    loss = function(x).square().mean()
    (expected,) = torch.autograd.grad(loss, x, retain_graph=True)
    with forward_ad.dual_level():
        (gradient,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)


class TestModel:
    @pytest.fixture(scope="class")
    @staticmethod
    def pair() -> tuple[torch.nn.Module, torch.nn.Module]:
        torch.manual_seed(0)
        model = SwinUNETR(in_channels=1, out_channels=2, feature_size=12, spatial_dims=2, window_size=5).eval()
        return model, swin_kernels.accelerate(copy.deepcopy(model), strict=True)

    @pytest.fixture(scope="class")
    @staticmethod
    def x() -> torch.Tensor:
        return randn(2, 1, 64, 64).float()

    def test_parameter_gradients(self, pair, x):
        def gradients(model):
            def loss(parameters):
                return torch.func.functional_call(model, parameters, (x,)).square().mean()

            return torch.func.grad(loss)(dict(model.named_parameters()))

        expected, own = gradients(pair[0]), gradients(pair[1])
        assert own.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(own[name], gradient, rtol=1e-3, atol=1e-4 * gradient.abs().max().item())

    def test_per_sample_gradients(self, pair, x):
        name = "out.conv.conv.weight"

        def gradients(model):
            parameters = dict(model.named_parameters())

            def loss(parameters, image):
                return torch.func.functional_call(model, parameters, (image[None],)).square().mean()

            return torch.vmap(torch.func.grad(loss), (None, 0))(parameters, x)[name]

        expected = gradients(pair[0])
        torch.testing.assert_close(gradients(pair[1]), expected, rtol=1e-3, atol=1e-4)

    def test_forward_mode(self, pair, x):
        tangent = randn(*x.shape, seed=9).float()
        expected, own = (torch.func.jvp(model, (x,), (tangent,)) for model in pair)
        torch.testing.assert_close(own, expected, rtol=1e-3, atol=1e-3)

    @pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
    def test_traced_by_jit(self, pair, x):
        """With gradients, as by default; the trace of one image computes another image correctly."""
        traced = torch.jit.trace(pair[1], x, check_trace=False)
        other = (2 * x + 1).requires_grad_()
        results = [model(other) for model in (traced, pair[0])]
        gradients = [torch.autograd.grad(out.square().mean(), other)[0] for out in results]
        torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3 * gradients[1].abs().max().item())

    @pytest.mark.parametrize("dynamo", [False, True])
    def test_onnx_export_says_what_to_do(self, pair, x, tmp_path, dynamo):
        with pytest.raises(Exception, match=r"call swin_kernels\.restore\(model\) before torch\.onnx\.export"):
            torch.onnx.export(pair[1], (x,), tmp_path / "model.onnx", dynamo=dynamo)


def counted(function: Callable, *tensors: torch.Tensor) -> tuple[int, int]:
    """FLOPs of the forward and of the backward, by PyTorch's counter."""
    with FlopCounterMode(display=False) as forward:
        out = function(*tensors)
    with FlopCounterMode(display=False) as backward:
        out.square().sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


class TestFlops:
    """Compared with the count of the same computation in PyTorch's operators."""

    def test_attention(self):
        qkv, table = randn(2, 4, 5, 24).requires_grad_(), TABLE.clone().requires_grad_()
        forward, backward = counted(lambda: swin_kernels.window_attention(qkv, table, 3, 1))
        with swin_kernels.use_backend("reference"), FlopCounterMode(display=False) as definition:
            torch.func.vjp(lambda table: swin_kernels.window_attention(qkv, table, 3, 1), table)
        assert forward == definition.get_total_flops() == 2 * (2 * 2 * 4 * 9 * 9 * 8)
        assert backward == 5 * forward // 2  # the scores are computed again

    def test_projected_attention(self):
        """With the kernel that projects again in the backward."""
        channels = 32
        x, weight = randn(2, 4, 5, channels).float().requires_grad_(), randn(3 * channels, channels).float()
        out_weight = randn(channels, channels).float()
        own = counted(
            lambda: projected_window_attention(
                x, weight, None, TABLE.float(), 3, 1, norm_eps=1e-5, out_weight=out_weight, backend="cpu"
            )
        )
        tokens, attention = 2 * 4 * 5, 2 * (2 * 2 * 4 * 9 * 9 * channels)
        layers, again = 2 * tokens * channels * 4 * channels, 2 * tokens * channels * 3 * channels
        assert own == (layers + attention, 2 * layers + again + 5 * attention // 2)

    @pytest.mark.parametrize("with_skip", [False, True])
    def test_convolution(self, with_skip):
        x, skip = randn(1, 3, 4, 5, 6).requires_grad_(), randn(1, 2, 4, 5, 6).requires_grad_() if with_skip else None
        weight = randn(4, 5 if with_skip else 3, 3, 3, 3).requires_grad_()
        own = counted(lambda: swin_kernels.convolution(x, weight, skip))
        both = torch.cat([x, skip], 1) if with_skip else x
        assert own == counted(lambda: F.conv3d(both.detach().requires_grad_(), weight, padding=1))

    def test_gradients_that_nobody_wants_cost_nothing(self):
        x, weight = randn(1, 3, 4, 5, 6), randn(4, 3, 3, 3, 3).requires_grad_()
        assert counted(lambda: swin_kernels.convolution(x, weight)) == (counted(lambda: F.conv3d(x, weight, padding=1)))

    def test_a_model_counts_as_monais(self):
        model = SwinUNETR(in_channels=1, out_channels=2, feature_size=12, spatial_dims=2, window_size=4).eval()
        x = randn(1, 1, 128, 128).float()
        theirs = counted(model, x)
        own = counted(swin_kernels.accelerate(copy.deepcopy(model), strict=True), x)
        assert own[0] == pytest.approx(theirs[0], rel=0.02)
        assert own[1] == pytest.approx(theirs[1], rel=0.05)
