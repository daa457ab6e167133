"""Autocast to bfloat16 on a CPU, with and without instructions for it."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn as nn
from monai.networks.nets import SwinUNETR

from swin_kernels import accelerate, cpu_bfloat16


@pytest.fixture(scope="module")
def monai() -> nn.Module:
    torch.manual_seed(0)
    return SwinUNETR(1, 2, feature_size=12, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8))


@pytest.fixture
def image() -> torch.Tensor:
    return torch.randn(1, 1, 32, 32, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def no_instructions(monkeypatch):
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False)
    cpu_bfloat16.has_bfloat16.cache_clear()
    yield
    cpu_bfloat16.has_bfloat16.cache_clear()


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).double().norm() / b.double().norm()).item()


def trained(
    model: nn.Module, image: torch.Tensor, autocast: bool
) -> tuple[torch.Tensor, torch.dtype, dict[str, torch.Tensor]]:
    """Output, its dtype, and gradients of a step."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = model(image)
    out.float().square().mean().backward()
    return out.detach().float(), out.dtype, {name: p.grad for name, p in model.named_parameters()}


def test_without_instructions_no_layer_computes_in_bfloat16(monai, image, no_instructions):
    """Results are those of float32, rounded; gradients are nearer to those of float32 than MONAI's are."""
    expected, _, gradients = trained(copy.deepcopy(monai), image, autocast=False)
    _, _, theirs = trained(copy.deepcopy(monai), image, autocast=True)
    model = accelerate(copy.deepcopy(monai), strict=True)
    seen = set()
    for module in model.modules():
        if isinstance(module, (nn.Conv3d, nn.ConvTranspose3d)):
            module.register_forward_hook(lambda _, inputs, out: seen.update((inputs[0].dtype, out.dtype)))
    out, dtype, own = trained(model, image, autocast=True)
    assert seen == {torch.float32}
    assert dtype == torch.bfloat16
    assert relative(out, expected) < 4e-3
    for name, gradient in gradients.items():
        other = relative(theirs[name], gradient)  # for the deepest maps PyTorch's may hold anything, even NaN
        assert relative(own[name], gradient) < (other if math.isfinite(other) else 1.0), name


@pytest.mark.parametrize("normalize", [True, False])
def test_the_encoder_returns_the_dtypes_that_monais_does(monai, image, no_instructions, normalize):
    model = accelerate(copy.deepcopy(monai.swinViT))
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            theirs, own = monai.swinViT(image, normalize), model(image, normalize)
        expected = model(image, normalize)
    assert [f.dtype for f in own] == [f.dtype for f in theirs]
    assert all(relative(f, e) < 4e-3 for f, e in zip(own, expected, strict=True))


@pytest.mark.parametrize("shape", [(2, 1, 1), (2, 2, 2), (2, 3, 3), (1, 3, 1)])
@pytest.mark.parametrize("threads", [1, 2])
def test_thin_volumes(monai, shape, threads):
    """At 64 voxels the deepest level has two. PyTorch's gradient holds whatever was left in memory, here NaN."""
    block = accelerate(copy.deepcopy(monai), strict=True).encoder10.layer
    weight = block.conv1.conv.weight
    random = torch.Generator().manual_seed(2)
    image = torch.randn(1, weight.shape[1], *shape, generator=random)
    gradient = torch.randn(1, weight.shape[0], *shape, generator=random).bfloat16()
    block(image).backward(gradient.float())
    expected, weight.grad = weight.grad, None
    left_behind = [torch.full((size,), math.nan) for size in (100, 1000, 10_000, 100_000, 1_000_000)]
    del left_behind
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            out = block(image)
        assert out.dtype == torch.bfloat16
        out.backward(gradient)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(weight.grad, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


class LoRA(nn.Module):
    """An adapter with weights in bfloat16 beside a layer's in float32."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        torch.manual_seed(layer.in_features)
        self.down = nn.Linear(layer.in_features, 2, bias=False, dtype=torch.bfloat16)
        self.up = nn.Linear(2, layer.out_features, bias=False, dtype=torch.bfloat16)

    def forward(self, x):
        return self.layer(x) + self.up(self.down(x))


def adapted(model: nn.Module) -> None:
    for stage in (model.swinViT.layers1, model.swinViT.layers4):
        attention = stage[0].blocks[0].attn
        attention.qkv = LoRA(attention.qkv)


@pytest.mark.parametrize(
    "change",
    [nn.Module.bfloat16, lambda model: model.swinViT.bfloat16(), adapted, lambda model: model.decoder5.bfloat16()],
    ids=["model", "encoder", "adapters", "decoder block"],
)
@pytest.mark.parametrize("has", [True, False], ids=["instructions", "no instructions"])
def test_weights_in_bfloat16_are_computed_with_as_monai_does(monai, image, monkeypatch, has, change):
    """Autocast takes weights of either dtype; plain float32 is not an option if a weight has another dtype."""
    monkeypatch.setattr(cpu_bfloat16, "has_bfloat16", lambda: has)
    results = []
    for model in (copy.deepcopy(monai), accelerate(copy.deepcopy(monai), strict=True)):
        change(model)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            results.append(model(image))
    theirs, own = results
    assert own.dtype == theirs.dtype
    assert relative(own, theirs) < 2e-2


@pytest.mark.skipif(not cpu_bfloat16.has_bfloat16(), reason="this processor has no instructions for bfloat16")
def test_with_instructions_layers_compute_in_bfloat16(monai, image):
    model = accelerate(copy.deepcopy(monai), strict=True)
    dtypes = []
    model.decoder1.transp_conv.conv.register_forward_hook(lambda _, inputs, out: dtypes.append(out.dtype))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(image)
    assert dtypes == [torch.bfloat16]


def test_compiled_under_autocast(monai, image, no_instructions):
    stage = accelerate(copy.deepcopy(monai), strict=True).decoder5
    x = torch.randn(1, 192, 2, 2, 4), torch.randn(1, 96, 4, 4, 8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(torch.compile(stage, backend="aot_eager", fullgraph=True)(*x), stage(*x))


@pytest.mark.parametrize("axes", [2, 3])
def test_the_heads_of_pretraining_take_thin_maps(axes):
    """The deepest map of 64 voxels has two per axis; nothing left in memory appears in a gradient."""
    from swin_unetr import SwinUNETR as OwnSwinUNETR
    from swin_unetr.pretraining.network import PretrainingNetwork

    torch.manual_seed(0)
    encoder = OwnSwinUNETR(
        1, 2, feature_size=12, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8), spatial_dims=axes
    ).swinViT
    head = PretrainingNetwork(encoder, in_channels=1, spatial_dims=axes).reconstruction_head[0]
    image = torch.randn(1, head.in_channels, *(2,) * axes)
    head(image).sum().backward()
    expected, head.weight.grad = head.weight.grad, None
    left_behind = [torch.full((size,), math.nan) for size in (100, 1000, 10_000, 100_000, 1_000_000)]
    del left_behind
    with torch.autocast("cpu", torch.bfloat16):
        head(image).sum().backward()
    torch.testing.assert_close(head.weight.grad, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
