"""The README's table of what runs where, checked row by row: a row without a check here fails, and vice versa."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from monai.networks.nets import swin_unetr as monai
from torch.overrides import BaseTorchFunctionMode

from swin_kernels import accelerate, convolution_blocks, restore

README = (Path(__file__).parents[1] / "README.md").read_text()


def model(**options) -> nn.Module:
    torch.manual_seed(0)
    return monai.SwinUNETR(
        in_channels=1, out_channels=2, feature_size=12, spatial_dims=2, window_size=5, **options
    ).eval()


def image() -> torch.Tensor:
    return torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(1))


def block(network: nn.Module) -> nn.Module:
    return network.swinViT.layers1[0].blocks[1]


@pytest.fixture
def masks(monkeypatch) -> list[tuple]:
    """Calls of MONAI's `compute_mask`, which only its own code makes."""
    calls: list[tuple] = []
    own = monai.compute_mask
    monkeypatch.setattr(monai, "compute_mask", lambda *args: calls.append(args) or own(*args))
    return calls


@pytest.fixture
def norms(monkeypatch) -> list[tuple]:
    """Calls of the operator that the fused convolution blocks are made of."""
    calls: list[tuple] = []
    own = convolution_blocks.instance_norm_act
    monkeypatch.setattr(
        convolution_blocks, "instance_norm_act", lambda *args, **named: calls.append(args) or own(*args, **named)
    )
    return calls


def fused(masks, norms, caplog):
    network = accelerate(model(), strict=True)
    network(image())
    assert not masks
    assert len(norms) == 20  # two for each of ten blocks


def other_layer(masks, norms, caplog):
    network = accelerate(model(), strict=True)
    attention = block(network).attn
    attention.qkv = nn.Sequential(attention.qkv)
    shapes: list[tuple[int, ...]] = []
    attention.proj.register_forward_hook(lambda _, inputs, out: shapes.append(tuple(out.shape)))
    network(image())
    assert shapes == [(7 * 7, 5 * 5, 12)]
    assert not masks


def attention_changed(masks, norms, caplog):
    network = model()
    block(network).attn.softmax.register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match=r"the attention of swinViT\.layers1\.0\.blocks\.1: attn\.softmax has forward"):
        accelerate(network)
    network(image())
    assert len(masks) == 1


def block_with_hooks(masks, norms, caplog):
    network = accelerate(model(), strict=True)
    seen: list[torch.Tensor] = []
    block(network).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    network.swinViT.layers2[0].blocks.append(nn.Identity())
    network.swinViT.layers2[0].blocks[2].forward = lambda x, mask: seen.append(mask) or x
    with caplog.at_level(logging.DEBUG, logger="swin_kernels"):
        network(image())
    assert [m.shape for m in seen] == [(49, 25, 25), (16, 25, 25)]
    assert len(masks) == 2
    assert "on MONAI's code" not in caplog.text


def every_module(masks, norms, caplog):
    network = accelerate(model(), strict=True)
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        network(image())
    finally:
        handle.remove()
    with BaseTorchFunctionMode():
        network(image())
    assert len(masks) == 8  # one for each stage
    assert not norms


def patched(masks, norms, caplog):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(monai.WindowAttention, "forward", lambda self, x, mask: x)
        patch.setattr(nn.InstanceNorm2d, "forward", lambda self, x: x)
        with pytest.warns(UserWarning, match=r"attn is of a changed class: WindowAttention\.forward was replaced"):
            network = accelerate(model())
        network(image())
    assert masks
    assert not norms


class Subclass(monai.SwinTransformerBlock):
    pass


def subclass(masks, norms, caplog):
    network = model()
    block(network).__class__ = Subclass
    with pytest.warns(UserWarning, match=r"swinViT\.layers1\.0\.blocks\.1: Subclass is a subclass of MONAI's"):
        accelerate(network)
    network(image())
    assert masks


def other_norms(masks, norms, caplog):
    accelerate(model(norm_name="batch"), strict=True)(image())
    assert not masks
    assert not norms


def transforms(masks, norms, caplog):
    network = accelerate(model(), strict=True)
    with caplog.at_level(logging.DEBUG, logger="swin_kernels"):
        torch.func.jvp(network, (image(),), (image(),))
    assert "window_attention runs on its definition in PyTorch" in caplog.text
    assert "instance_norm_act runs on its definition in PyTorch" in caplog.text


def other_index(masks, norms, caplog):
    network = accelerate(model(), strict=True)
    state = copy.deepcopy(network.state_dict())
    name = "swinViT.layers1.0.blocks.1.attn.relative_position_index"
    state[name] = state[name].T.contiguous()
    with pytest.raises(RuntimeError, match=name):
        network.load_state_dict(state)


def onnx(masks, norms, caplog):
    network = accelerate(model(), strict=True)
    with pytest.raises(RuntimeError, match=r"call swin_kernels\.restore\(model\)"):
        torch.onnx.export(network, (image(),), "unwritten.onnx", dynamo=False)
    assert not Path("unwritten.onnx").exists()


def empty_batch(masks, norms, caplog):
    for network in (model(), accelerate(model(), strict=True)):
        with pytest.raises(RuntimeError, match="0"):
            network(image()[:0])


def second_derivative(masks, norms, caplog):
    network = accelerate(model(), strict=True)
    x = image().requires_grad_()
    (gradient,) = torch.autograd.grad(network(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        gradient.sum().backward()


def functions(masks, norms, caplog):
    network = accelerate(model(), strict=True)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        expected = network(image())
        patch.setattr(torch.nn.functional, "instance_norm", None)
        torch.testing.assert_close(network(image()), expected)
        with pytest.raises(TypeError):
            restore(network)(image())


CHECKS: dict[str, Callable] = {
    "layers as MONAI builds them": fused,
    "another layer as `qkv`": other_layer,
    "hooks or changes on an attention module": attention_changed,
    "hooks on a block": block_with_hooks,
    "hooks for every module": every_module,
    "a method patched": patched,
    "a subclass of a block": subclass,
    "other norms": other_norms,
    "`torch.func`": transforms,
    "a state dict with another": other_index,
    "`torch.onnx.export`": onnx,
    "an empty batch": empty_batch,
    "a second derivative": second_derivative,
    "functions of `torch.nn.functional`": functions,
}


def rows() -> list[str]:
    """First cells of the table."""
    table = re.search("<!-- drop-in:begin -->\n(.*)<!-- drop-in:end -->", README, re.DOTALL)[1]
    return [line.strip("| ").split(" | ")[0] for line in table.splitlines()[2:]]


def test_every_row_has_its_check():
    assert [next((c for c in CHECKS if row.startswith(c)), row) for row in rows()] == list(CHECKS)


@pytest.mark.parametrize("row", CHECKS)
def test_row(row, masks, norms, caplog, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    CHECKS[row](masks, norms, caplog)
