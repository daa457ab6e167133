"""`accelerate` and `restore`: what changes in a model, what must not, and what is left."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
import torch.nn as nn
from monai.networks.blocks import UnetrBasicBlock, UnetResBlock
from monai.networks.nets import swin_unetr as monai

import swin_unetr
from swin_kernels import accelerate, convolution, convolution_blocks, modules, restore


def monai_encoder(**options) -> monai.SwinTransformer:
    torch.manual_seed(0)
    return monai.SwinTransformer(
        **{
            "in_chans": 1,
            "embed_dim": 12,
            "window_size": (3, 3),
            "patch_size": (2, 2),
            "depths": (2, 2, 1, 1),
            "num_heads": (3, 3, 3, 3),
            "spatial_dims": 2,
        }
        | options
    )


def image() -> torch.Tensor:
    return torch.randn(1, 1, 32, 48, generator=torch.Generator().manual_seed(1))


def types(model: nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules()}


FUSED = (modules.WindowAttention, modules.SwinTransformerBlock, modules.BasicLayer, modules.SwinTransformer)


def fused_names(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, FUSED)}


class Wrapper(nn.Module):
    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.inside = nn.ModuleDict({"encoder": encoder})

    def forward(self, x):
        return self.inside["encoder"](x)[-1].mean()


def test_returns_the_same_model_and_swaps_classes_only():
    model = monai_encoder()
    before = {name: id(value) for name, value in [*model.named_parameters(), *model.named_buffers()]}
    states = {name: dict(vars(module)) for name, module in model.named_modules()}
    assert accelerate(model) is model
    assert {name: id(value) for name, value in [*model.named_parameters(), *model.named_buffers()]} == before
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == states
    swapped = {name for name, module in model.named_modules() if type(module).__name__.startswith("Fused")}
    assert swapped == fused_names(model)
    assert len(swapped) == 1 + 4 + 2 * 6
    assert isinstance(model, monai.SwinTransformer)
    assert isinstance(model.layers1[0].blocks[1], monai.SwinTransformerBlock)
    assert isinstance(model.layers1[0].blocks[1].attn, monai.WindowAttention)


def test_idempotent_and_undone():
    model = monai_encoder()
    before = types(model)
    fused = types(accelerate(model))
    assert fused != before
    assert types(accelerate(model)) == fused
    assert restore(model) is model
    assert types(model) == before
    assert types(restore(model)) == before


def test_restored_model_runs_monais_code():
    model = monai_encoder(use_checkpoint=True).eval()
    x = image()
    before = model(x)
    fused = accelerate(model)(x)
    after = restore(model)(x)
    for a, b, c in zip(before, after, fused, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c)


def test_monai_does_not_run_its_own_attention(monkeypatch):
    """Nothing of the slow path is reached any more, neither the mask nor the partition."""
    model = accelerate(monai_encoder())
    for name in ("compute_mask", "window_partition", "window_reverse"):
        monkeypatch.setattr(monai, name, None)
    model(image())
    with pytest.raises(TypeError, match="not callable"):
        restore(model)(image())


@pytest.mark.parametrize("part", ["layers2.0", "layers2.0.blocks.1"])
def test_parts_alone(part):
    model = monai_encoder().get_submodule(part)
    accelerate(model)
    assert isinstance(model, FUSED)


def test_hooks_and_optimizer_keep_working():
    model = Wrapper(monai_encoder())
    calls = []
    model.inside["encoder"].layers1[0].blocks[0].register_forward_hook(lambda *_: calls.append("block"))
    model.inside["encoder"].layers1[0].blocks[0].attn.register_forward_pre_hook(lambda *_: calls.append("attention"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    accelerate(model)
    before = copy.deepcopy(model.state_dict())
    model(image()).backward()
    optimizer.step()
    assert calls == ["attention", "block"]
    table = "inside.encoder.layers1.0.blocks.0.attn.relative_position_bias_table"
    assert not torch.equal(model.state_dict()[table], before[table])


def test_state_dicts_move_between_fused_and_plain():
    plain, fused = monai_encoder(), accelerate(monai_encoder(embed_dim=12))
    assert list(plain.state_dict()) == list(fused.state_dict())
    fused.load_state_dict(plain.state_dict(), strict=True)
    plain.load_state_dict(fused.state_dict(), strict=True)


def saved_and_loaded(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize(
    "copy_of",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved_and_loaded],
    ids=["deepcopy", "pickle", "save"],
)
def test_copies_are_fused(copy_of):
    model = accelerate(monai_encoder())
    other = copy_of(model)
    assert types(other) == types(model)
    assert all(torch.equal(a, b) for a, b in zip(other(image()), model(image()), strict=True))
    assert not fused_names(restore(other))
    assert fused_names(model)


def test_data_parallel_and_compiled_wrappers():
    model = torch.compile(accelerate(nn.DataParallel(monai_encoder())), backend="eager")
    assert fused_names(model)
    torch.testing.assert_close(model(image()), monai_encoder()(image()))


def test_compiles_in_one_graph():
    model = accelerate(monai_encoder())
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(image()), model(image()))


def test_own_model_is_already_fused():
    model = swin_unetr.SwinUNETR(1, 2, feature_size=12, spatial_dims=2)
    before = types(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        accelerate(model, strict=True)
        restore(model)
    assert types(model) == before


class OtherBlock(monai.SwinTransformerBlock):
    """Overrides the attention branch: needs the mask, and windows for its attention."""

    def forward_part1(self, x, mask_matrix):
        assert mask_matrix is not None
        return 2 * super().forward_part1(x, mask_matrix)


class OtherAttention(monai.WindowAttention):
    def forward(self, x, mask):
        return super().forward(x, mask) + 1


class OtherLayer(monai.BasicLayer):
    def forward(self, x):
        b, c, *_ = x.shape
        return super().forward(x) + x.view(b, c, -1).mean()


def with_other_block(model):
    model.layers2[0].blocks[1].__class__ = OtherBlock
    return {"layers2.0.blocks.1": "OtherBlock is a subclass", "layers2.0": "OtherBlock"}


def with_other_attention(model):
    model.layers1[0].blocks[0].attn.__class__ = OtherAttention
    return {"layers1.0.blocks.0": "OtherAttention", "layers1.0": "SwinTransformerBlock"}


def with_replaced_forward(model):
    block = model.layers1[0].blocks[1]
    block.forward = lambda x, mask: x + block.forward_part2(x)
    return {"layers1.0.blocks.1": "forward of this SwinTransformerBlock was replaced", "layers1.0": "Block"}


def with_other_layer(model):
    model.layers3[0].__class__ = OtherLayer
    return {"layers3.0": "OtherLayer is a subclass of MONAI's BasicLayer", "model": "OtherLayer"}


@pytest.mark.parametrize("change", [with_other_block, with_other_attention, with_replaced_forward, with_other_layer])
def test_what_is_left_is_named_and_computes_the_same(change):
    model = monai_encoder()
    left = change(model)
    before = types(model)
    expected = model(image())
    with pytest.raises(ValueError, match="left on MONAI's code"):
        accelerate(model, strict=True)
    assert types(model) == before
    with pytest.warns(UserWarning, match="left on MONAI's code") as record:
        accelerate(model)
    reasons = dict(part.split(": ", 1) for part in str(record[0].message).split("code: ")[1].split("; "))
    assert reasons.keys() == left.keys()
    assert all(left[name] in reasons[name] for name in left), reasons
    assert len(fused_names(model)) == 1 + 4 + 2 * 6 - len(left) - any(".blocks." in name for name in left)
    torch.testing.assert_close(model(image()), expected)
    assert types(restore(model)) == before


def test_nothing_to_take_over():
    with pytest.raises(ValueError, match="model is a Sequential without a Swin Transformer"):
        accelerate(nn.Sequential(nn.Linear(2, 2)))
    model = nn.Linear(2, 2)
    assert restore(model) is model


@pytest.mark.parametrize("function", [accelerate, restore])
def test_not_a_module(function):
    with pytest.raises(TypeError, match=r"model is a dict; accepted is a torch\.nn\.Module"):
        function({})


def whole_image() -> torch.Tensor:
    return torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(1))


def monai_model(**options) -> monai.SwinUNETR:
    torch.manual_seed(0)
    return monai.SwinUNETR(**({"in_channels": 1, "out_channels": 2, "feature_size": 12, "spatial_dims": 2} | options))


def convolution_blocks_of(model: nn.Module) -> dict[str, nn.Module]:
    accepted = (convolution_blocks.ResidualBlock, convolution_blocks.UpBlock, convolution_blocks.OutBlock)
    return {name: module for name, module in model.named_modules() if isinstance(module, accepted)}


@pytest.mark.parametrize(("use_v2", "count"), [(False, 5 + 5 * 2 + 1), (True, 4 + 5 + 5 * 2 + 1)])
def test_convolution_blocks_of_the_whole_model(use_v2, count):
    model = monai_model(use_v2=use_v2)
    before = types(model)
    accelerate(model, strict=True)
    assert len(convolution_blocks_of(model)) == count
    assert isinstance(model.encoder1.layer, UnetResBlock)
    assert types(accelerate(model)) == types(copy.deepcopy(model))
    assert types(restore(model)) == before


def test_convolution_blocks_of_other_networks_are_left():
    other = UnetrBasicBlock(2, 3, 3, 3, 1, "instance", res_block=True)
    model = nn.ModuleList([monai_model(), other])
    accelerate(model, strict=True)
    assert not convolution_blocks_of(other)


class OtherResBlock(UnetResBlock):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("norm_name", ["batch", ("instance", {"affine": True}), ("group", {"num_groups": 3})], ids=str)
def test_other_norms_run_monais_code(norm_name):
    model = monai_model(norm_name=norm_name)
    x = whole_image().expand(2, -1, -1, -1).clone()
    expected = model(x)
    torch.testing.assert_close(accelerate(copy.deepcopy(model))(x), expected, rtol=1e-4, atol=1e-4)


def test_changed_convolution_blocks():
    """A subclass, a replaced forward, and hooks on modules that the fused forward does not call keep their effect."""
    model = monai_model()
    model.encoder2.layer.__class__ = OtherResBlock
    calls = []
    model.encoder3.layer.norm1.register_forward_hook(lambda *_: calls.append("norm"))
    model.encoder4.layer.lrelu.register_forward_hook(lambda *_: calls.append("activation"))
    model.decoder2.conv_block.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs)))
    seen = []
    model.decoder3.conv_block.conv1.register_forward_hook(lambda _, __, out: seen.append(out))
    x = whole_image()
    expected = model(x)
    before = [out.clone() for out in seen]
    called = list(calls)
    out_forward = model.out.forward
    model.out.forward = lambda t: 3 * out_forward(t)
    with pytest.warns(UserWarning, match="left on MONAI's code: out: the forward of this UnetOutBlock was replaced"):
        accelerate(model)
    calls.clear()
    seen.clear()
    with torch.no_grad():
        torch.testing.assert_close(model(x), 3 * expected, rtol=1e-4, atol=1e-4)
    assert calls == called
    torch.testing.assert_close(seen, before, rtol=1e-4, atol=1e-4)
    assert type(model.encoder2.layer) is OtherResBlock


def test_logits_are_contiguous_and_inputs_are_kept():
    model = accelerate(monai_model()).eval()
    x = whole_image()
    before = x.clone()
    with torch.no_grad():
        assert model(x).is_contiguous()
    assert torch.equal(x, before)


def test_autocast_takes_the_operator_where_its_dtype_has_a_kernel(monkeypatch):
    """The weight is then float32; where there is no kernel, as on CPUs in bfloat16, PyTorch's convolution runs."""
    torch.manual_seed(0)
    module = nn.Sequential()
    module.add_module("conv", nn.Conv3d(48, 16, 3, padding=1, bias=False))
    x, skip = torch.randn(1, 32, 16, 16, 16), torch.randn(1, 16, 16, 16, 16)
    asked, ran = [], []

    def operator(*args):
        ran.append(args)
        return convolution(*args, backend="reference")

    monkeypatch.setattr(convolution_blocks, "convolution", operator)
    with torch.autocast("cpu", torch.bfloat16):
        expected = convolution_blocks._convolve(module, x, skip)
        assert not ran
        monkeypatch.setattr(
            convolution_blocks,
            "has_kernel",
            lambda operator, **fields: asked.append((operator, *fields.values())) or True,
        )
        out = convolution_blocks._convolve(module, x, skip)
    assert asked == [("convolution", "cpu", torch.bfloat16, (3, 3, 3), (32, 16, 16))]
    assert len(ran) == 1
    assert out.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected)


def test_without_a_kernel_a_concatenation_is_written_once(monkeypatch):
    """In float64 the norms have a kernel and the convolutions have none: two of them read what was joined."""
    torch.manual_seed(0)
    block = swin_unetr.model.DecoderBlock(3, 16, 8, "instance").double()
    x, skip = torch.randn(1, 16, 8, 8, 8).double(), torch.randn(1, 8, 16, 16, 16).double()
    joined, join = [], convolution_blocks._joined

    def record(x: torch.Tensor, skip: torch.Tensor | None) -> torch.Tensor:
        joined.append(skip is not None)
        return join(x, skip)

    monkeypatch.setattr(convolution_blocks, "_joined", record)
    with torch.no_grad():
        block(x, skip)
    assert sum(joined) == 1


def test_torch_export_keeps_the_operator():
    """And does not put what this machine can run into the graph."""
    model = accelerate(monai_encoder()).eval()
    program = torch.export.export(model, (image(),))
    ours = [str(node.target) for node in program.graph.nodes if str(node.target).startswith("swin_kernels")]
    assert ours == ["swin_kernels.window_attention.default"] * 6
    torch.testing.assert_close(program.module()(image()), model(image()))


@pytest.mark.parametrize("extents", [(64, 64), (32, 64, 64)])
def test_shapes_are_found_without_memory(extents):
    model = accelerate(monai_model(spatial_dims=len(extents)), strict=True).to("meta")
    out = model(torch.empty(2, 1, *extents, device="meta"))
    assert (out.shape, out.device.type) == ((2, 2, *extents), "meta")
