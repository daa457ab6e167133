"""The drop-in promise for models that users changed: MONAI's numbers and hook calls, whatever layer was touched.

Every case changes a model of MONAI's and an accelerated one in the same way; MONAI's says what is right.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn as nn
from monai.networks.blocks import UnetOutBlock, UnetResBlock, UnetrUpBlock
from monai.networks.nets import swin_unetr as monai
from torch.nn.utils import parametrizations, parametrize
from torch.overrides import TorchFunctionMode

from swin_kernels import accelerate, modules, restore
from swin_kernels.plain import change, patched

IMAGES = {2: (1, 1, 64, 64), 3: (1, 1, 32, 32, 64)}


@pytest.fixture(scope="module")
def models() -> dict[int, nn.Module]:
    torch.manual_seed(0)
    return {
        axes: monai.SwinUNETR(in_channels=1, out_channels=2, feature_size=12, spatial_dims=axes, window_size=5).eval()
        for axes in IMAGES
    }


@pytest.fixture(scope="module")
def by_monai(models) -> Callable[[str | int], tuple[torch.Tensor, torch.Tensor | None]]:
    """What MONAI's model computes with a change of `CHANGES`, or without one with that many axes: output and gradient.

    It is the same for every test. Quantised layers have no backward, and so no gradient.
    """

    @functools.cache
    def compute(change: str | int) -> tuple[torch.Tensor, torch.Tensor | None]:
        axes, apply = CHANGES[change] if isinstance(change, str) else (change, lambda model: None)
        model = copy.deepcopy(models[axes])
        apply(model)
        with torch.no_grad():
            out = model(image(axes))
        return out, None if apply is quantised else gradient(model, image(axes))

    return compute


def image(axes: int) -> torch.Tensor:
    return torch.randn(IMAGES[axes], generator=torch.Generator().manual_seed(1))


def gradient(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Of a loss of ``model(x)``, with respect to `x`."""
    x = x.clone().requires_grad_()
    model(x).square().mean().backward()
    return x.grad


def parts(model: nn.Module, ending: str) -> Iterator[nn.Module]:
    """The encoder's modules whose names end so, and those of one decoder block and one skip connection."""
    roots = ("swinViT.", "decoder1.", "encoder2.")
    found = [m for name, m in model.named_modules() if name.endswith(ending) and name.startswith(roots)]
    assert found
    return iter(found)


def replace_forward(ending: str, method: str = "forward") -> Callable[[nn.Module], None]:
    def apply(model):
        for part in parts(model, ending):
            original = getattr(part, method)
            setattr(part, method, lambda *args, call=original, **named: torch.tanh(2 * call(*args, **named)) + 0.3)

    return apply


def hook(ending: str) -> Callable[[nn.Module], None]:
    def apply(model):
        for part in parts(model, ending):
            part.register_forward_hook(lambda _, inputs, out: out + torch.linspace(0, 0.5, out.shape[-1]))

    return apply


def observe(ending: str) -> Callable[[nn.Module], None]:
    def apply(model):
        for part in parts(model, ending):
            part.register_forward_hook(lambda *_: None)

    return apply


def pre_hook(ending: str) -> Callable[[nn.Module], None]:
    def apply(model):
        for part in parts(model, ending):
            part.register_forward_pre_hook(lambda _, inputs: (torch.sin(inputs[0]), *inputs[1:]))

    return apply


class LoRA(nn.Module):
    """An adapter without the attributes of a linear layer."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        torch.manual_seed(layer.in_features)
        self.down = nn.Linear(layer.in_features, 2, bias=False)
        self.up = nn.Linear(2, layer.out_features, bias=False)

    def forward(self, x):
        return self.layer(x) + self.up(self.down(x))


class Scaled(LoRA):
    """An adapter like (IA)³: it does not turn zeros into the bias."""

    bias = property(lambda self: self.layer.bias)

    def forward(self, x):
        return self.layer(x) * torch.linspace(0.5, 1.5, self.layer.out_features)


class Subclass(nn.Linear):
    def forward(self, x):
        return super().forward(x) + torch.linspace(-0.5, 0.5, self.out_features)


def wrap(ending: str, adapter: type[nn.Module]) -> Callable[[nn.Module], None]:
    def apply(model):
        owner, name = ending.rsplit(".", 1)
        for part in list(parts(model, owner)):
            setattr(part, name, adapter(getattr(part, name)))

    return apply


def subclass(model: nn.Module) -> None:
    for part in parts(model, "attn.qkv"):
        part.__class__ = Subclass


class Scaling(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, weight):
        return self.factor * weight


def parametrised(ending: str) -> Callable[[nn.Module], None]:
    def apply(model):
        for part in parts(model, ending):
            name, factor = ("weight", 2) if hasattr(part, "weight") else ("relative_position_bias_table", 20)
            parametrize.register_parametrization(part, name, Scaling(factor))

    return apply


def spectral(model: nn.Module) -> None:
    for part in parts(model, "attn.qkv"):
        torch.manual_seed(part.in_features)
        parametrizations.spectral_norm(part)


def quantised(model: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # moved to another package, which is not needed for this test
        torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, inplace=True)


def identity(ending: str) -> Callable[[nn.Module], None]:
    return wrap(ending, lambda _: nn.Identity())


def all_weights_dropped(model: nn.Module) -> None:
    for part in parts(model, "attn.attn_drop"):
        part.p = 1.0
        part.train()  # the attention itself stays in evaluation


def dropout_in_evaluation(model: nn.Module) -> None:
    model.train()
    for part in parts(model, "attn.attn_drop"):
        part.p = 1.0
        part.eval()


def set_to(ending: str, name: str, value: Callable[[nn.Module], object]) -> Callable[[nn.Module], None]:
    def apply(model):
        for part in parts(model, ending):
            setattr(part, name, value(part))

    return apply


def remove(ending: str, name: str) -> Callable[[nn.Module], None]:
    def apply(model):
        for part in parts(model, ending):
            delattr(part, name)

    return apply


def filled(value: float) -> Callable[[nn.Module], nn.Parameter]:
    return lambda norm: nn.Parameter(torch.full((norm.num_features,), value))


def affine_by_hand(model: nn.Module) -> None:
    set_to("layer.norm1", "weight", filled(2.0))(model)
    set_to("layer.norm1", "bias", filled(0.5))(model)


def table(value: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[nn.Module], None]:
    return set_to(
        "attn", "relative_position_bias_table", lambda a: nn.Parameter(value(30 * a.relative_position_bias_table.data))
    )


def other_index(model: nn.Module) -> None:
    table(lambda t: t)(model)
    set_to("attn", "relative_position_index", lambda a: a.relative_position_index.flip(0).clone())(model)


def index_written_to(model: nn.Module) -> None:
    table(lambda t: t)(model)
    for attention in parts(model, "attn"):
        attention.relative_position_index.copy_(attention.relative_position_index.flip(0))


def smaller_windows(model: nn.Module) -> None:
    for number in range(1, 5):
        stage = getattr(model.swinViT, f"layers{number}")[0]
        for part in (stage, *stage.blocks, *(block.attn for block in stage.blocks)):
            part.window_size = (4, 4)


def other_shift(model: nn.Module) -> None:
    table(lambda t: t)(model)
    for block in parts(model, "blocks.1"):
        block.shift_size = (1, 1)


class WithMask(nn.Module):
    """A block that cannot be called without the mask."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x, mask):
        return torch.tanh(2 * self.block(x, mask)) + 0.3


def wrapped_blocks(model: nn.Module) -> None:
    blocks = model.swinViT.layers1[0].blocks
    blocks[1] = WithMask(blocks[1])


def appended_block(model: nn.Module) -> None:
    torch.manual_seed(1)
    model.swinViT.layers1[0].blocks.append(monai.SwinTransformerBlock(12, 3, (5, 5), (2, 2)))


class Flat(nn.Module):
    """A block whose tokens come in a single row."""

    def forward(self, x, mask):
        return torch.tanh(2 * x.flatten(1, -2)) + 0.3


def flat_block(model: nn.Module) -> None:
    model.swinViT.layers1[0].blocks.append(Flat())


def method_with_mask(name: str) -> Callable[[nn.Module], None]:
    def apply(model):
        for block in parts(model, "blocks.1"):
            original = getattr(block, name)
            setattr(block, name, lambda x, mask_matrix, call=original: torch.tanh(2 * call(x, mask_matrix)) + 0.3)

    return apply


def hook_that_masks_more(model: nn.Module) -> None:
    for block in parts(model, "blocks.1"):
        block.register_forward_pre_hook(
            lambda _, inputs: (3 * inputs[0], inputs[1] - 50 * torch.eye(inputs[1].shape[1]))
        )


def channels_first_stage(model: nn.Module) -> None:
    """A stage that views its input, which MONAI gives it contiguous."""

    class Stage(nn.Module):
        def forward(self, x):
            return torch.tanh(2 * x.view(x.shape[0], -1)).view(x.shape).repeat(1, 2, 1, 1)[..., ::2, ::2]

    model.swinViT.layers2[0] = Stage()


CHANGES = {
    "forward of qkv": (2, replace_forward("attn.qkv")),
    "forward of proj": (2, replace_forward("attn.proj")),
    "forward of the attention": (2, replace_forward("attn")),
    "forward of norm1": (2, replace_forward("blocks.0.norm1")),
    "forward of norm2": (2, replace_forward("norm2")),
    "forward of the MLP": (2, replace_forward("mlp")),
    "forward of linear1": (2, replace_forward("linear1")),
    "forward of the merging's reduction": (2, replace_forward("downsample.reduction")),
    "forward of the merging's norm": (2, replace_forward("downsample.norm")),
    "forward of a convolution": (3, replace_forward("conv1.conv")),
    "forward of a convolution's sequence": (3, replace_forward("conv2")),
    "_conv_forward of a convolution": (3, replace_forward("conv1.conv", "_conv_forward")),
    "forward of an instance norm": (3, replace_forward("norm3")),
    "forward of an activation": (3, replace_forward("lrelu")),
    "forward of a residual block": (3, replace_forward("conv_block")),
    "hook on qkv": (2, hook("attn.qkv")),
    "hook on softmax": (2, hook("attn.softmax")),
    "hook on the attention's dropout": (2, hook("attn.attn_drop")),
    "hook on the attention": (2, hook("attn")),
    "pre-hook on the attention": (2, pre_hook("attn")),
    "pre-hook on the MLP": (2, pre_hook("mlp")),
    "pre-hook on proj": (2, pre_hook("attn.proj")),
    "pre-hook on a norm of the decoder": (3, pre_hook("norm2")),
    "hook on an activation in place": (3, hook("lrelu")),
    "observer of an activation in place": (2, observe("lrelu")),
    "slope of a tensor": (2, set_to("layer.lrelu", "negative_slope", lambda _: torch.tensor(0.5))),
    "other activations in place": (2, wrap("layer.lrelu", lambda _: nn.ELU(inplace=True))),
    "LoRA on qkv": (2, wrap("attn.qkv", LoRA)),
    "LoRA on qkv, 3D": (3, wrap("attn.qkv", LoRA)),
    "LoRA on proj": (2, wrap("attn.proj", LoRA)),
    "(IA)3 on qkv": (2, wrap("attn.qkv", Scaled)),
    "subclass of Linear as qkv": (2, subclass),
    "parametrised qkv": (2, parametrised("attn.qkv")),
    "parametrised norm": (2, parametrised("blocks.0.norm1")),
    "parametrised bias table": (2, parametrised("attn")),
    "spectral norm of qkv": (2, spectral),
    "quantised linear layers": (2, quantised),
    "no norm of a residual": (3, remove("conv_block", "norm3")),
    "weights given to instance norms": (2, affine_by_hand),
    "softmax over another axis": (2, wrap("attn.softmax", lambda _: nn.Softmax(dim=-2))),
    "axis of the softmax": (2, set_to("attn.softmax", "dim", lambda _: 1)),
    "bias table of one column": (2, table(lambda t: t[:, :1])),
    "longer bias table": (2, table(lambda t: torch.cat([t, t]))),
    "learnable scale": (2, set_to("attn", "scale", lambda a: nn.Parameter(torch.tensor(30 * a.scale)))),
    "smaller windows": (2, smaller_windows),
    "shift of a block": (2, other_shift),
    "relative_position_index replaced": (2, other_index),
    "relative_position_index written to": (2, index_written_to),
    "wrapper around a block": (2, wrapped_blocks),
    "another block": (2, appended_block),
    "block of tokens in a row": (2, flat_block),
    "forward of a block": (2, method_with_mask("forward")),
    "forward_part1 of a block": (2, method_with_mask("forward_part1")),
    "hook that changes the mask": (2, hook_that_masks_more),
    "another stage": (2, channels_first_stage),
    "no dropout layer": (2, identity("attn.attn_drop")),
    "no softmax": (2, identity("attn.softmax")),
    "no first convolution": (3, identity("encoder2.layer.conv1")),
    "attention dropout alone in training": (2, all_weights_dropped),
    "attention dropout alone in evaluation": (2, dropout_in_evaluation),
}


UNCHANGED = ("no dropout", "attention dropout alone in e", "observer")
"""These changes leave the model's numbers as they are."""


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.filterwarnings("ignore:accelerate. left on MONAI's code:UserWarning")
def test_a_changed_layer_counts_as_with_monai(models, by_monai, name, when):
    axes, apply = CHANGES[name]
    model = copy.deepcopy(models[axes])
    steps = [apply, accelerate] if when == "before" else [accelerate, apply]
    for step in steps:
        step(model)
    x = image(axes)
    (untouched, _), (right, right_gradient) = by_monai(axes), by_monai(name)
    assert (right - untouched).abs().max() > 1e-2 or name.startswith(UNCHANGED)
    with torch.no_grad():
        torch.testing.assert_close(model(x), right, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model(x), right, rtol=1e-4, atol=1e-4)
    if right_gradient is not None:
        assert (gradient(model, x) - right_gradient).norm() < 1e-3 * right_gradient.norm()


@pytest.mark.parametrize("kind", ["forward", "forward pre", "full backward", "full backward pre"])
def test_hooks_for_every_module_are_called_as_with_monai(models, kind):
    register = getattr(torch.nn.modules.module, f"register_module_{kind.replace(' ', '_')}_hook")
    layers = (nn.Linear, nn.LayerNorm, nn.Conv2d, nn.InstanceNorm2d, nn.LeakyReLU, nn.Softmax, nn.Dropout)
    seen: list[str] = []
    calls = []
    for model in (copy.deepcopy(models[2]), accelerate(copy.deepcopy(models[2]))):
        if "backward" in kind:  # with which MONAI's decoder fails: its activations work in place
            model.forward = lambda x, encoder=model.swinViT: encoder(x)[-1]
        handle = register(lambda module, *_: seen.append(type(module).__name__) if type(module) in layers else None)
        try:
            model(image(2)).sum().backward()
        finally:
            handle.remove()
        calls.append(sorted(seen))
        seen.clear()
    assert calls[0]
    assert calls[1] == calls[0]


def test_hooks_see_the_attention_maps_that_monai_computes(models):
    maps: list[torch.Tensor] = []
    results = []
    expected, model = copy.deepcopy(models[2]), accelerate(copy.deepcopy(models[2]))
    for network in (expected, model):
        handles = [p.register_forward_hook(lambda _, __, out: maps.append(out)) for p in parts(network, "attn.softmax")]
        with torch.no_grad():
            network(image(2))
        results.append(list(maps))
        maps.clear()
        for handle in handles:
            handle.remove()
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
    assert len(results[0]) == 8
    with torch.no_grad():  # without hooks the attention is fused again
        model(image(2))
    assert not maps


def test_a_hook_inside_the_mlp_is_called_once_a_step(models):
    """The MLP is not computed a second time in the backward while a hook watches."""
    model = accelerate(copy.deepcopy(models[2]))
    calls: list[int] = []
    block = model.swinViT.layers1[0].blocks[0]
    block.mlp.linear1.register_forward_hook(lambda *_: calls.append(1))
    model(image(2)).sum().backward()
    assert calls == [1]


def test_gradients_of_an_adapter(models):
    """Padding tokens get what the adapter turns zeros into, and contribute to the adapter's gradient."""
    gradients = []
    for fused in (False, True):
        model = copy.deepcopy(models[2]).double()
        if fused:
            accelerate(model)
        wrap("attn.qkv", Scaled)(model)
        model(image(2).double()).square().mean().backward()
        gradients.append([a.qkv.layer.bias.grad for a in parts(model, "attn")])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-9, atol=1e-12)


class Gate(nn.Module):
    """Squeeze and excitation over the tokens of a window."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        torch.manual_seed(1)
        self.gate = nn.Linear(layer.in_features, layer.out_features)

    def forward(self, x):
        return self.layer(x) * torch.sigmoid(4 * self.gate(x.mean(1, keepdim=True)))


class Normed(nn.Module):
    """A batch norm over the tokens of all windows, padding included."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        self.norm = nn.BatchNorm1d(layer.out_features)

    def forward(self, x):
        return self.norm(self.layer(x).mT).mT


def centred(_, inputs, out):
    return out - out.mean(1, keepdim=True)


AROUND_ATTENTION = {
    "LoRA on qkv": lambda attention: setattr(attention, "qkv", LoRA(attention.qkv)),
    "(IA)3 on qkv": lambda attention: setattr(attention, "qkv", Scaled(attention.qkv)),
    "gate on qkv": lambda attention: setattr(attention, "qkv", Gate(attention.qkv)),
    "batch norm on qkv": lambda attention: setattr(attention, "qkv", Normed(attention.qkv)),
    "hook on qkv": lambda attention: attention.qkv.register_forward_hook(centred),
    "(IA)3 on proj": lambda attention: setattr(attention, "proj", Scaled(attention.proj)),
    "gate on proj": lambda attention: setattr(attention, "proj", Gate(attention.proj)),
    "batch norm on proj": lambda attention: setattr(attention, "proj", Normed(attention.proj)),
    "hook on proj": lambda attention: attention.proj.register_forward_hook(centred),
    "gates on both": lambda attention: (
        setattr(attention, "qkv", Gate(attention.qkv)),
        setattr(attention, "proj", Gate(attention.proj)),
    ),
    "softmax over tokens as proj_drop": lambda attention: setattr(attention, "proj_drop", nn.Softmax(dim=1)),
    "hook on proj_drop": lambda attention: attention.proj_drop.register_forward_hook(centred),
}


class TestLayersAroundTheAttention:
    """They are given windows ``(B·nW, n, C)``, padding included, as MONAI gives them; the attention stays fused."""

    @pytest.fixture(autouse=True)
    def in_float64(self):
        torch.set_default_dtype(torch.float64)
        yield
        torch.set_default_dtype(torch.float32)

    @pytest.fixture(autouse=True)
    def windows_of_monai(self, monkeypatch):
        """The fused block computes no mask."""
        self.mask = monai.compute_mask
        monkeypatch.setattr(monai, "compute_mask", None)

    def run(self, change, extents, shift):
        """Outputs, gradients and buffers of a block of MONAI's and of a fused one, both with `change`."""
        window = (4, 3, 4)[: len(extents)]
        torch.manual_seed(0)
        expected = monai.SwinTransformerBlock(12, 3, window, shift)
        model = copy.deepcopy(expected)
        accelerate(model, strict=True)
        results = []
        for block in (expected, model):
            change(block.attn)
            x = torch.randn(2, *extents, 12, generator=torch.Generator().manual_seed(1)).requires_grad_()
            torch.manual_seed(2)
            if block is expected:
                clipped, shifts = monai.get_window_size(extents, window, shift)
                padded = [-(-e // w) * w for e, w in zip(extents, clipped, strict=True)]
                out = block(x, self.mask(padded, clipped, shifts, x.device))
            else:
                out = block(x)
            out.square().mean().backward()
            results.append([out, x.grad, *block.buffers(), *(p.grad for p in block.parameters())])
        return results

    @pytest.mark.parametrize("name", AROUND_ATTENTION)
    @pytest.mark.parametrize(
        ("extents", "shift"),
        [
            ((8, 9), (0, 0)),
            ((8, 9), (2, 1)),
            ((7, 10), (0, 0)),
            ((7, 10), (2, 1)),
            ((3, 7), (2, 1)),  # a clipped axis
            ((3, 3), (2, 1)),  # one window
            ((4, 6, 8), (2, 1, 2)),
            ((5, 7, 6), (2, 1, 2)),
        ],
        ids=str,
    )
    def test_as_with_monai(self, name, extents, shift):
        expected, found = self.run(AROUND_ATTENTION[name], extents, shift)
        for f, e in zip(found, expected, strict=True):
            torch.testing.assert_close(f, e, rtol=1e-9, atol=1e-13)

    @pytest.mark.parametrize("name", ["gate on proj", "hook on proj_drop"])
    def test_dropout_of_windows_draws_the_numbers_of_monai(self, name):
        def change(attention):
            AROUND_ATTENTION[name](attention)
            attention.proj_drop.p = 0.5

        expected, found = self.run(change, (7, 10), (2, 1))
        for f, e in zip(found, expected, strict=True):
            torch.testing.assert_close(f, e, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("name", ["LoRA on qkv", "wrapper around a block"])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.torch.jit:DeprecationWarning")
def test_traced_and_compiled(models, name):
    model = accelerate(copy.deepcopy(models[2]))
    CHANGES[name][1](model)
    stage, x = model.swinViT.layers1[0], torch.randn(1, 12, 12, 13, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = stage(x)
        traced, compiled = torch.jit.trace(stage, x), torch.compile(stage, backend="eager", fullgraph=True)
        torch.testing.assert_close(traced(x), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)


def test_nothing_is_written_to_what_others_hold(models):
    """Unless a part of the block is our own operator or PyTorch's plain convolution, others may hold its output."""
    model = accelerate(copy.deepcopy(models[3]))
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []

    class Keeping(nn.Conv3d):
        def forward(self, x):
            out = super().forward(x)
            kept.append((out, out.clone()))
            return out

    model.decoder1.conv_block.conv1.conv.__class__ = Keeping
    with torch.no_grad():
        model(image(3))
    assert torch.equal(*kept[0])


PATCHED = [
    *((monai.WindowAttention, "forward"), (monai.BasicLayer, "forward"), (monai.SwinTransformer, "proj_out")),
    *((monai.SwinTransformerBlock, f"forward{part}") for part in ("", "_part1", "_part2")),
    *((UnetResBlock, "forward"), (UnetrUpBlock, "forward"), (UnetOutBlock, "forward"), (monai.Mlp, "forward")),
    *((kind, "forward") for kind in (nn.Linear, nn.LayerNorm, nn.LeakyReLU, nn.Softmax, nn.Dropout, nn.Conv3d)),
    *((nn.InstanceNorm2d, "forward"), (nn.modules.instancenorm._InstanceNorm, "_apply_instance_norm")),
    *((nn.Conv3d, "_conv_forward"), (nn.Module, "__call__")),
]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("kind", "name"), PATCHED, ids=lambda value: getattr(value, "__name__", value))
@pytest.mark.filterwarnings("ignore:accelerate. left on MONAI's code:UserWarning")
def test_methods_replaced_on_classes_count(models, monkeypatch, kind, name, when):
    axes = 3 if kind is nn.Conv3d else 2
    expected, model = copy.deepcopy(models[axes]), copy.deepcopy(models[axes])
    x = image(axes)
    if when == "after":
        accelerate(model)
    own = getattr(kind, name)
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(kind, name, lambda self, x, *rest, **named: _changed(own(self, x, *rest, **named)))
        if when == "before":
            accelerate(model)
        torch.testing.assert_close(model(x), expected(x), rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(model(x), models[axes](x), rtol=1e-3, atol=1e-4)
    assert patched(kind) is None


def _changed(out):
    return [*map(_changed, out)] if isinstance(out, list) else torch.tanh(2 * out) + 0.3


def test_what_is_patched_is_named(models, monkeypatch):
    monkeypatch.setattr(monai.SwinTransformer, "proj_out", lambda self, x, normalize=False: x)
    monkeypatch.setattr(nn.Softmax, "forward", lambda self, x: x)
    with pytest.raises(ValueError, match=r"swinViT: SwinTransformer\.proj_out was replaced") as error:
        accelerate(copy.deepcopy(models[2]), strict=True)
    assert "blocks.0: attn.softmax is of a changed class: Softmax.forward was replaced" in str(error.value)


class Doubled(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        changed = (nn.functional.linear, nn.functional.layer_norm, nn.functional.instance_norm)
        return torch.tanh(2 * out) if function in changed else out


def test_a_function_mode_sees_what_monai_calls(models):
    expected, model = copy.deepcopy(models[2]), accelerate(copy.deepcopy(models[2]))
    with torch.no_grad():
        with Doubled():
            torch.testing.assert_close(model(image(2)), expected(image(2)), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model(image(2)), expected(image(2)), rtol=1e-4, atol=1e-4)


def test_fused_within_a_default_device(models, monkeypatch):
    """``with torch.device(...)`` is a function mode, too, but changes nothing that layers compute."""
    model = accelerate(copy.deepcopy(models[2]))
    monkeypatch.setattr(monai, "compute_mask", None)
    with torch.device("cpu"), torch.no_grad():
        model(image(2))


def test_no_mask_is_no_mask(models):
    """Passing None, which MONAI takes for no mask, differs from leaving the argument out."""
    expected, model = copy.deepcopy(models[2]), accelerate(copy.deepcopy(models[2]))
    x = torch.randn(1, 12, 12, 12, generator=torch.Generator().manual_seed(1))
    own, block = (network.swinViT.layers1[0].blocks[1] for network in (expected, model))
    mask = monai.compute_mask((15, 15), (5, 5), (2, 2), "cpu")
    with torch.no_grad():
        assert (own(x, mask) - own(x, None)).abs().max() > 1e-3
        for given in (mask, None, 2 * mask):
            torch.testing.assert_close(block(x, given), own(x, given), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(block(x), own(x, mask), rtol=1e-4, atol=1e-5)


class Stage(monai.BasicLayer):
    pass


class TestAttentionStaysFused:
    @pytest.fixture
    def fused(self, monkeypatch) -> list[torch.Size]:
        calls: list[torch.Size] = []

        def counting(own):
            return lambda x, *rest, **named: calls.append(x.shape) or own(x, *rest, **named)

        for name in ("projected_window_attention", "window_attention"):  # the processor decides which of them
            monkeypatch.setattr(modules, name, counting(getattr(modules, name)))
        return calls

    def test_in_a_block_with_hooks(self, models, fused):
        """The block's mask is there for hooks that look at it."""
        model = accelerate(copy.deepcopy(models[2]))
        masks: list[torch.Tensor] = []
        model.swinViT.layers1[0].blocks[1].register_forward_hook(lambda _, inputs, out: masks.append(inputs[1]))
        with torch.no_grad():
            model(image(2))
        assert len(fused) == 8
        torch.testing.assert_close(*masks, monai.compute_mask((35, 35), (5, 5), (2, 2), "cpu"))

    def test_in_a_stage_of_monais(self, models, fused):
        """Its mask is recognised by its values."""
        model = copy.deepcopy(models[2])
        model.swinViT.layers1[0].__class__ = Stage
        with pytest.warns(UserWarning, match="Stage is a subclass of MONAI's BasicLayer"):
            accelerate(model)
        with torch.no_grad():
            model(image(2))
        assert len(fused) == 8


NAMED = {
    "axis of the softmax": r"blocks\.0: attn\.softmax is over axis 1",
    "bias table of one column": r"blocks\.1: attn\.relative_position_bias_table has shape \(81, 1\), for 3 heads",
    "learnable scale": r"blocks\.0: attn\.scale is a Parameter",
    "shift of a block": r"blocks\.1: shift_size is \(1, 1\), that of the stage \(2, 2\)",
}


@pytest.mark.parametrize("name", NAMED)
def test_settings_that_only_monais_code_can_take_are_named(models, name):
    model = copy.deepcopy(models[2])
    CHANGES[name][1](model)
    with pytest.raises(ValueError, match=NAMED[name]):
        accelerate(model, strict=True)


def test_strict_names_what_runs_on_monais_code(models):
    model = copy.deepcopy(models[2])
    model.swinViT.layers2[0].blocks[1].attn.softmax.register_forward_hook(lambda *_: None)
    with pytest.raises(
        ValueError, match=r"attention of swinViT\.layers2\.0\.blocks\.1: attn\.softmax has forward hooks"
    ):
        accelerate(model, strict=True)


@pytest.mark.parametrize("method", ["forward_part1", "load_from"])
def test_a_replaced_method_leaves_the_block(models, method):
    model = copy.deepcopy(models[2])
    block = model.swinViT.layers1[0].blocks[0]
    setattr(block, method, getattr(block, method))
    with pytest.raises(ValueError, match=rf"blocks\.0: the {method} of this SwinTransformerBlock was replaced"):
        accelerate(model, strict=True)


class TestIndexOfRelativePositions:
    """The fused attention computes the index; a module or a checkpoint may hold another."""

    def test_a_block_with_another_index_is_left(self, models):
        model = copy.deepcopy(models[2])
        attention = model.swinViT.layers1[0].blocks[0].attn
        attention.relative_position_index.copy_(attention.relative_position_index.flip(0))
        with torch.no_grad():
            expected = model(image(2))
        with pytest.warns(UserWarning, match=r"its attn\.relative_position_index is not that of attn\.window_size"):
            accelerate(model)
        with torch.no_grad():
            torch.testing.assert_close(model(image(2)), expected, rtol=1e-4, atol=1e-4)

    def test_a_checkpoint_with_another_index_is_refused(self, models):
        state = copy.deepcopy(models[2].state_dict())
        name = "swinViT.layers1.0.blocks.0.attn.relative_position_index"
        state[name] = state[name].flip(0)
        model = accelerate(copy.deepcopy(models[2]))
        with pytest.raises(RuntimeError, match=f"{name} is not the index of a window of .5, 5."):
            model.load_state_dict(state)
        restore(model).load_state_dict(state)


class TestChange:
    """The predicate itself, which every shortcut around a layer consults."""

    def test_plain(self):
        assert change(nn.Linear(2, 2)) is None
        assert change(nn.LayerNorm(2, elementwise_affine=False)) is None
        assert change(nn.Linear(2, 2, device="meta")) is None

    def test_other_tensors_as_parameters(self):
        class Quantised(torch.Tensor):
            pass

        layer = nn.Linear(2, 2)
        layer.weight = nn.Parameter(torch.ones(2, 2).as_subclass(Quantised))
        assert change(layer) == "has a Quantised as weight"

    def test_a_compiled_layer_is_plain(self):
        layer = nn.Linear(2, 2)
        layer.compile()
        assert change(layer) is None
