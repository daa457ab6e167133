"""`swin_kernels.modules`: what a block, a merging and a stage do on their own."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from monai.networks.nets import swin_unetr as monai

import swin_unetr
from swin_kernels import modules


def block(window=(3, 4, 2), shift=(1, 2, 1), dim=12, **options) -> modules.SwinTransformerBlock:
    torch.manual_seed(0)
    result = modules.SwinTransformerBlock(dim, 3, window, shift, **options)
    nn.init.normal_(result.attn.relative_position_bias_table)
    return result


def tokens(*extents: int, batch: int = 2, dim: int = 12, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(batch, *extents, dim, dtype=dtype, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("window", [(7, 7, 7), (2, 3, 4), (5, 2), (1, 1, 1)])
def test_relative_position_index_is_upstreams(window):
    own, theirs = modules.WindowAttention(12, 3, window), monai.WindowAttention(12, 3, window)
    assert torch.equal(own.relative_position_index, theirs.relative_position_index)
    assert own.relative_position_index.dtype == theirs.relative_position_index.dtype


@pytest.mark.parametrize(
    ("extents", "window", "shift"),
    [((5, 4, 7), (3, 4, 2), (1, 2, 1)), ((5, 9), (4, 3), (2, 1)), ((2, 3, 2), (7, 7, 7), (3, 3, 3))],
)
@pytest.mark.parametrize("qkv_bias", [True, False])
def test_block_against_upstream(extents, window, shift, qkv_bias):
    own = block(window, shift, qkv_bias=qkv_bias).double()
    theirs = monai.SwinTransformerBlock(12, 3, window, shift, qkv_bias=qkv_bias).double()
    theirs.load_state_dict(own.state_dict())
    x = tokens(*extents, dtype=torch.float64)
    used, used_shift = monai.get_window_size(extents, window, shift)
    padded = [-(-extent // w) * w for extent, w in zip(extents, used, strict=True)]
    mask = monai.compute_mask(padded, used, used_shift, x.device)
    torch.testing.assert_close(own(x), theirs(x, mask), rtol=0, atol=1e-12)
    torch.testing.assert_close(own(x, mask), own(x), rtol=0, atol=0)


def test_attention_is_called_as_a_module():
    """Hooks on the attention and the norms see volumes; those on the attention's layers see windows."""
    b = block((3, 4, 2), (1, 2, 1))
    shapes = {}
    for name in ("norm1", "attn", "attn.qkv", "attn.proj", "attn.proj_drop"):
        b.get_submodule(name).register_forward_hook(
            lambda _, inputs, out, name=name: shapes.update({name: (*inputs[0].shape, out.shape[-1])})
        )
    b(tokens(5, 4, 7))
    volume, windows = (2, 5, 4, 7, 12, 12), (2 * 2 * 1 * 4, 3 * 4 * 2, 12, 12)
    assert shapes == {
        "norm1": volume,
        "attn": volume,
        "attn.qkv": (*windows[:-1], 36),
        "attn.proj": windows,
        "attn.proj_drop": windows,
    }


class TestDropout:
    def test_mean_is_the_evaluation(self):
        """The attention branch is linear in the dropped values, so its mean over draws is its value in evaluation."""
        attention = block(attn_drop=0.3, drop=0.2).attn.double()
        x = tokens(3, 4, 3, batch=1, dtype=torch.float64)
        torch.manual_seed(2)
        with torch.no_grad():
            expected = attention.eval()(x, (1, 2, 1))
            attention.train()
            draws = torch.stack([attention(x, (1, 2, 1)) for _ in range(2000)])
        standard_error = draws.std(0) / len(draws) ** 0.5
        z = (draws.mean(0) - expected) / standard_error
        assert (standard_error > 1e-4).all()
        assert z.abs().max() < 5
        assert 0.8 < z.square().mean() < 1.25

    def test_probability_is_attn_drop(self):
        """With all values 1 and no projection, an output is the kept share of the weights over 1 - p."""
        p = 0.4
        attention = modules.WindowAttention(8, 1, (4, 4), qkv_bias=True, attn_drop=p)
        with torch.no_grad():
            attention.qkv.weight.zero_()
            attention.qkv.bias.copy_(torch.tensor([0.0] * 16 + [1.0] * 8))
            attention.proj.weight.copy_(torch.eye(8))
            attention.proj.bias.zero_()
            attention.relative_position_bias_table.zero_()
            out = attention(tokens(64, 64, batch=1, dim=8))[..., 0]
        kept = out * (1 - p) * 16  # of 16 equal weights
        torch.testing.assert_close(kept, kept.round(), rtol=0, atol=1e-3)
        assert abs(kept.mean().item() / 16 - (1 - p)) < 0.01

    def test_all_weights_dropped(self):
        attention = block(attn_drop=1.0).attn
        x = tokens(5, 4, 7).requires_grad_()
        out = attention(x)
        assert torch.equal(out, attention.proj.bias.expand_as(out))
        out.sum().backward()
        assert not x.grad.any()
        # Gradients are zero as upstream's, not absent.
        assert all(not attention.get_parameter(n).grad.any() for n in ("qkv.weight", "relative_position_bias_table"))
        attention.eval()
        assert not torch.equal(attention(x), out)

    def test_off_in_evaluation(self):
        b = block(attn_drop=0.5, drop=0.5, drop_path=0.5).eval()
        x = tokens(5, 4, 7)
        assert torch.equal(b(x), b(x))
        b.train()
        assert not torch.equal(b(x), b(x))

    @pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
    def test_drop_path_is_upstreams(self, p):
        from monai.networks.layers import DropPath

        x = tokens(2, 2, batch=64)
        results = []
        for module in (modules.DropPath(p), DropPath(p)):
            torch.manual_seed(3)
            results.append(module(x))
        torch.testing.assert_close(*results)

    def test_drop_path_range(self):
        with pytest.raises(ValueError, match=r"drop_prob is 1\.5"):
            modules.DropPath(1.5)


@pytest.mark.parametrize("options", [{}, {"attn_drop": 0.3, "drop": 0.2, "drop_path": 0.4}], ids=["plain", "dropouts"])
def test_checkpoint_gradients(options):
    """Recomputing gives the same gradients, with the same elements dropped."""
    results = []
    for use_checkpoint in (False, True):
        b = block(use_checkpoint=use_checkpoint, **options)
        x = tokens(5, 4, 7, batch=4).requires_grad_()
        torch.manual_seed(4)
        out = b(x)
        out.square().sum().backward()
        results.append([out, x.grad, *(parameter.grad for parameter in b.parameters())])
    torch.testing.assert_close(*results, rtol=0, atol=0)


MERGINGS = {"merging": monai.PatchMerging, "mergingv2": monai.PatchMergingV2}


@pytest.mark.parametrize("mode", MERGINGS)
@pytest.mark.parametrize("extents", [(4, 6, 2), (5, 4, 7), (1, 3, 1), (4, 6), (5, 3), (1, 1)])
def test_merging_is_upstreams(mode, extents):
    torch.manual_seed(0)
    own = modules.MERGING_MODES[mode](6, spatial_dims=len(extents))
    theirs = MERGINGS[mode](6, spatial_dims=len(extents))
    theirs.load_state_dict(own.state_dict())
    x = tokens(*extents, dim=6)
    assert torch.equal(own(x), theirs(x))


def test_legacy_merging():
    """The eight slices as MONAI 0.9 to 1.4 wrote them."""
    torch.manual_seed(0)
    own = modules.PatchMergingLegacy(6)
    x = tokens(5, 4, 6, dim=6)
    p = F.pad(x, (0, 0, 0, 0, 0, 0, 0, 1))
    x0 = p[:, 0::2, 0::2, 0::2, :]
    x1 = p[:, 1::2, 0::2, 0::2, :]
    x2 = p[:, 0::2, 1::2, 0::2, :]
    x3 = p[:, 0::2, 0::2, 1::2, :]
    x4 = p[:, 1::2, 0::2, 1::2, :]
    x5 = p[:, 0::2, 1::2, 0::2, :]
    x6 = p[:, 0::2, 0::2, 1::2, :]
    x7 = p[:, 1::2, 1::2, 1::2, :]
    expected = own.reduction(own.norm(torch.cat([x0, x1, x2, x3, x4, x5, x6, x7], -1)))
    assert torch.equal(own(x), expected)
    current = modules.PatchMerging(6)
    current.load_state_dict(own.state_dict())
    assert not torch.allclose(current(x), expected)


def test_legacy_merging_in_2d_is_the_current_one():
    torch.manual_seed(0)
    legacy, current = (modules.MERGING_MODES[m](6, spatial_dims=2) for m in ("merging_legacy", "merging"))
    current.load_state_dict(legacy.state_dict())
    assert torch.equal(legacy(tokens(5, 4, dim=6)), current(tokens(5, 4, dim=6)))


def test_merging_rank():
    with pytest.raises(ValueError, match=r"PatchMerging: x has shape \(4, 6\)"):
        modules.PatchMerging(6)(torch.zeros(4, 6))


def test_model_with_legacy_merging_trains():
    torch.manual_seed(0)
    model = swin_unetr.SwinUNETR(1, 2, feature_size=12, downsample="merging_legacy")
    assert isinstance(model.swinViT.layers3[0].downsample, modules.PatchMergingLegacy)
    features = model.swinViT(torch.randn(1, 1, 32, 32, 32))
    features[-1].sum().backward()
    assert all(p.grad is not None for p in model.swinViT.parameters())


@pytest.mark.parametrize("channels_last", [True, False])
def test_stage_keeps_tokens_channels_last(channels_last):
    stage = modules.BasicLayer(12, 2, 3, (3, 3, 3), downsample=modules.PatchMerging)
    x = tokens(5, 4, 6).movedim(-1, 1)  # (B, C, *S), channels last in memory
    out = stage(x if channels_last else x.contiguous())
    assert out.shape == (2, 24, 3, 2, 3)
    assert out.is_contiguous(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(out, stage(x), rtol=0, atol=0)


def test_stage_shifts_odd_blocks():
    stage = modules.BasicLayer(12, 3, 3, (7, 4, 1))
    assert [b.shift_size for b in stage.blocks] == [(0, 0, 0), (3, 2, 0), (0, 0, 0)]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_block(backend):
    """One graph, the same outputs and gradients."""
    b = block()
    compiled = torch.compile(b, fullgraph=True, backend=backend)
    results = []
    for run in (b, compiled):
        x = tokens(5, 4, 7).requires_grad_()
        b.zero_grad()
        out = run(x)
        out.square().sum().backward()
        results.append([out, x.grad, *(parameter.grad for parameter in b.parameters())])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_exported_model():
    torch.manual_seed(0)
    model = swin_unetr.SwinUNETR(1, 2, feature_size=12, spatial_dims=2).eval()
    x = torch.randn(1, 1, 64, 96)
    program = torch.export.export(model, (x,))
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets.count("swin_kernels.window_attention.default") == 8
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), model(x))


def test_import_does_not_import_monai():
    code = "import sys, swin_kernels.modules; sys.exit('monai' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
