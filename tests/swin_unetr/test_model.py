"""The fused model computes what MONAI's computes: outputs, gradients and initial values, option by option."""

from __future__ import annotations

import copy
import inspect
import sys

import monai
import pytest
import torch
import torch.nn as nn
from monai.data import MetaTensor
from monai.inferers import sliding_window_inference
from monai.networks.nets import SwinUNETR as MonaiSwinUNETR

import swin_kernels
import swin_unetr

MONAI_VERSION = tuple(int(part) for part in monai.__version__.split(".")[:2])
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}

# Token grids of the four stages under a 7-window. 3D: 8×16×11 is padded on every axis, 4×8×6 on the middle one and
# clipped on the others, 2×4×3 and 1×2×2 are clipped, the first merged with an odd axis. 2D: 32×96, 16×48 and 8×24 are
# padded, 4×12 is clipped and padded.
ENCODER_SHAPE = {3: (16, 32, 22), 2: (64, 192)}
# What the whole model accepts: multiples of 32. The last instance norm sees 1×2×2 voxels; over two its gradient is
# almost nothing but rounding.
MODEL_SHAPE = {3: (32, 64, 64), 2: (64, 192)}


class FirstTokenMerging(nn.Module):
    """A merging of the user's own."""

    def __init__(self, dim: int, norm_layer: type[nn.Module], spatial_dims: int) -> None:
        super().__init__()
        self.norm = norm_layer(dim)
        self.reduction = nn.Linear(dim, 2 * dim)
        self.first = (slice(None), *[slice(None, None, 2)] * spatial_dims)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.reduction(self.norm(x[self.first]))


class WideEpsLayerNorm(nn.LayerNorm):
    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-2)


OPTIONS = {
    "defaults": {},
    "in_channels": {"in_channels": 4},
    "depths": {"depths": (1, 3, 1, 2)},
    "num_heads": {"num_heads": (2, 3, 4, 8)},
    "window_per_axis": {"window_size": (4, 7, 3)},
    "window_even": {"window_size": 4},
    "window_1": {"window_size": (1, 5, 2)},
    "no_qkv_bias": {"qkv_bias": False},
    "mlp_ratio": {"mlp_ratio": 1.5},
    "norm_name": {"norm_name": ("group", {"num_groups": 3})},
    "dropout_path": {"dropout_path_rate": 0.6},
    "all_dropped": {"drop_rate": 1.0, "attn_drop_rate": 1.0, "dropout_path_rate": 1.0},
    "attention_dropped": {"attn_drop_rate": 1.0},
    "not_normalized": {"normalize": False},
    "norm_layer": {"norm_layer": WideEpsLayerNorm},
    "patch_norm": {"patch_norm": True},
    "checkpoint": {"use_checkpoint": True},
    "checkpoint_dropout_path": {"use_checkpoint": True, "dropout_path_rate": 0.6},
    "mergingv2": {"downsample": "mergingv2"},
    "merging_module": {"downsample": FirstTokenMerging},
    "v2": {"use_v2": True},
    "2d": {"spatial_dims": 2},
    "2d_mergingv2": {"spatial_dims": 2, "downsample": "mergingv2"},
    "2d_merging_module": {"spatial_dims": 2, "downsample": FirstTokenMerging},
    "2d_v2": {"spatial_dims": 2, "use_v2": True},
    "2d_window_per_axis": {"spatial_dims": 2, "window_size": (3, 6), "patch_norm": True},
    "2d_norm_name": {"spatial_dims": 2, "norm_name": ("group", {"num_groups": 3})},
    "2d_not_normalized": {"spatial_dims": 2, "normalize": False},
    "2d_checkpoint": {"spatial_dims": 2, "use_checkpoint": True, "qkv_bias": False},
}
if MONAI_VERSION >= (1, 6):
    OPTIONS["flash"] = {"use_flash_attention": True}

# The decoder is MONAI's own: in 3D, where it is slow, the whole model runs once per way of feeding it.
WHOLE_IN_3D = ("defaults", "v2")


def monai_model(dtype: torch.dtype = torch.float32, **options) -> MonaiSwinUNETR:
    """MONAI's model with parameters far from their initial values: zero biases and unit norms would hide errors."""
    torch.manual_seed(0)
    model = MonaiSwinUNETR(**{"in_channels": 1, "out_channels": 2, "feature_size": 12} | options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter), alpha=1.0 if name.endswith("bias_table") else 0.1)
    return model.to(dtype)


def fused_models(model: MonaiSwinUNETR, dtype: torch.dtype = torch.float32, **options) -> dict[str, nn.Module]:
    """The two fused models with the parameters of `model`."""
    own = swin_unetr.SwinUNETR(**{"in_channels": 1, "out_channels": 2, "feature_size": 12} | options).to(dtype)
    own.load_state_dict(model.state_dict())
    return {"own": own, "accelerated": swin_kernels.accelerate(copy.deepcopy(model))}


def image(
    dtype: torch.dtype = torch.float32, batch: int = 1, channels: int = 1, shape=ENCODER_SHAPE[3]
) -> torch.Tensor:
    return torch.randn(batch, channels, *shape, dtype=dtype, generator=torch.Generator().manual_seed(1))


def tensors_of(output: torch.Tensor | list[torch.Tensor]) -> list[torch.Tensor]:
    return [output] if isinstance(output, torch.Tensor) else output


def output_and_gradients(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor | None]:
    """Outputs, and gradients of input and parameters for a fixed loss, by name."""
    x = x.detach().requires_grad_()
    model.zero_grad()
    torch.manual_seed(2)
    outputs = tensors_of(model(x))
    generator = torch.Generator().manual_seed(3)
    sum((y * torch.randn(y.shape, generator=generator).to(y)).sum() for y in outputs).backward()
    gradients = {f"gradient of {name}": parameter.grad for name, parameter in model.named_parameters()}
    return {f"output {i}": y.detach() for i, y in enumerate(outputs)} | {"gradient of the input": x.grad} | gradients


def assert_equal(actual: dict, expected: dict, tolerance: float, case: str) -> None:
    """Each tensor within `tolerance` of the expected one, relative to its largest element."""
    assert actual.keys() == expected.keys()
    assert {name for name in actual if actual[name] is None} == {name for name in expected if expected[name] is None}
    errors = {name: relative_error(actual[name], value) for name, value in expected.items() if value is not None}
    wrong = {name: error for name, error in errors.items() if not error <= tolerance}
    assert not wrong, f"{case}: relative errors {wrong}"


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    assert actual.shape == expected.shape
    scale = expected.abs().max().clamp_min(torch.finfo(expected.dtype).tiny)
    return ((actual - expected).abs().max() / scale).item()


def with_smooth_activations(model: nn.Module) -> nn.Module:
    """`model` without LeakyReLU, whose derivative jumps at 0.

    Among millions of activations some lie within fp32 rounding of 0, and which side they fall on moves
    gradients by 1e-3 and more: MONAI's own fp32 gradients are that far from its fp64 ones.
    """
    for module in model.modules():
        if hasattr(module, "lrelu"):
            module.lrelu = nn.SiLU()
    return model


def check(part, options: dict, x: torch.Tensor) -> None:
    """`part` of both fused models against MONAI's: outputs and all gradients."""
    reference = monai_model(x.dtype, **options)
    models = {"MONAI": reference} | fused_models(reference, x.dtype, **options)
    if x.dtype == torch.float32:
        models = {name: with_smooth_activations(model) for name, model in models.items()}
    expected = output_and_gradients(part(models.pop("MONAI")), x)
    for name, model in models.items():
        assert_equal(output_and_gradients(part(model), x), expected, TOLERANCE[x.dtype], name)


def encoder(model: nn.Module) -> nn.Module:
    return model.swinViT


def whole(model: nn.Module) -> nn.Module:
    return model


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_encoder(options, dtype):
    shape = ENCODER_SHAPE[options.get("spatial_dims", 3)]
    check(encoder, options, image(dtype, channels=options.get("in_channels", 1), shape=shape))


# Two input channels: with one, the instance norm after encoder1's 1×1 convolution cancels the weight's scale, and the
# weight's gradient is nothing but rounding.


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", [name for name, options in OPTIONS.items() if "spatial_dims" in options])
def test_whole_model_in_2d(name, dtype):
    check(whole, {"in_channels": 2} | OPTIONS[name], image(dtype, channels=2, shape=MODEL_SHAPE[2]))


@pytest.mark.parametrize("name", WHOLE_IN_3D)
def test_whole_model_in_3d(name):
    check(whole, {"in_channels": 2} | OPTIONS[name], image(channels=2, shape=MODEL_SHAPE[3]))


def test_whole_model_in_3d_fp64():
    check(whole, {}, image(torch.float64, shape=(32, 32, 64)))


def every_second(x: torch.Tensor) -> torch.Tensor:
    """`x` as a view whose elements lie two apart."""
    return x.repeat_interleave(2, -1)[..., ::2]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    "layout",
    [
        every_second,
        lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
        lambda x: x.contiguous(memory_format=torch.channels_last_3d),
        lambda x: x.expand(2, -1, -1, -1, -1),
    ],
    ids=["strided", "transposed", "channels_last", "expanded"],
)
def test_input_layouts_and_batches(layout, dtype):
    x = layout(image(dtype, batch=1, channels=3))
    assert not x.is_contiguous()
    check(encoder, {"in_channels": 3}, x)


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_batch_of_different_images(spatial_dims):
    options = {"spatial_dims": spatial_dims, "dropout_path_rate": 0.5}
    check(encoder, options, image(batch=3, shape=ENCODER_SHAPE[spatial_dims]))


def test_parameters_in_channels_last():
    reference = monai_model().to(memory_format=torch.channels_last_3d)
    x = image(shape=MODEL_SHAPE[3]).to(memory_format=torch.channels_last_3d)
    with torch.no_grad():
        expected = reference(x)
        for model in fused_models(reference).values():
            assert relative_error(model.to(memory_format=torch.channels_last_3d)(x), expected) <= 1e-4


@pytest.mark.skipif(MONAI_VERSION < (1, 6), reason="MONAI before 1.6 has no use_flash_attention")
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inference_against_flash_attention(mode):
    reference = monai_model(use_flash_attention=True).eval()
    x = image()
    with mode():
        expected = reference.swinViT(x)
        for model in fused_models(reference, use_flash_attention=True).values():
            for actual, value in zip(model.eval().swinViT(x), expected, strict=True):
                assert relative_error(actual, value) <= 1e-4


def distance(actual: dict, truth: dict) -> float:
    """Relative distance of all outputs and gradients together, each scaled to its own norm."""
    pairs = [(actual[name].double(), value) for name, value in truth.items() if value is not None and value.any()]
    return sum(((a - t).norm() / t.norm()).item() for a, t in pairs) / len(pairs)


@pytest.mark.parametrize("low_precision", ["autocast", "parameters"])
def test_training_in_bf16(low_precision):
    truth = output_and_gradients(monai_model(torch.float64).swinViT, image(torch.float64))
    reference = monai_model()
    models = {"MONAI": reference} | fused_models(reference)
    distances = {}
    for name, model in models.items():
        if low_precision == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                results = output_and_gradients(model.swinViT, image())
            assert all(value.dtype == torch.float32 for key, value in results.items() if key.startswith("gradient"))
        else:
            results = output_and_gradients(model.to(torch.bfloat16).swinViT, image(torch.bfloat16))
        distances[name] = distance(results, truth)
    assert distances["MONAI"] > 1e-3, "nothing ran in bf16"
    for name in ("own", "accelerated"):
        assert distances[name] <= 2 * distances["MONAI"], distances


def test_metatensor_and_sliding_window():
    reference = monai_model().eval()
    x = MetaTensor(image(shape=(32, 32, 80)), affine=torch.diag(torch.tensor([2.0, 2, 3, 1])))
    with torch.no_grad():
        expected = sliding_window_inference(x, (32, 32, 64), 1, reference, overlap=0.25)
        for model in fused_models(reference).values():
            actual = sliding_window_inference(x, (32, 32, 64), 1, model.eval(), overlap=0.25)
            assert isinstance(actual, MetaTensor)
            assert torch.equal(actual.affine, x.affine)
            assert relative_error(actual.as_tensor(), expected.as_tensor()) <= 1e-4


@pytest.mark.parametrize("feature_size", [12, 48])
def test_training_on_a_metatensor(feature_size):
    """This is how loaders return images; 12 and 48 channels go through different operators."""
    torch.manual_seed(0)
    model = swin_unetr.SwinUNETR(1, 2, feature_size=feature_size)
    plain, gradients = image(shape=(32, 32, 64)), []
    for x in (plain, MetaTensor(plain)):
        model.zero_grad()
        model(x).square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


# What follows does not need MONAI's forward.


def test_same_signature():
    if MONAI_VERSION < (1, 6):
        pytest.skip(f"MONAI {monai.__version__} has fewer arguments than 1.6")
    parameters = [list(inspect.signature(c).parameters.values()) for c in (swin_unetr.SwinUNETR, MonaiSwinUNETR)]
    own, theirs = ([(p.name, p.kind, p.default) for p in side] for side in parameters)
    assert own == theirs


CONSTRUCTIONS = {name: options for name, options in OPTIONS.items() if "merging_module" not in name}


@pytest.mark.parametrize("options", CONSTRUCTIONS.values(), ids=CONSTRUCTIONS)
def test_seed_gives_the_same_parameters(options):
    """State dicts are equal in names, order and values, and optimizer states are indexed alike."""
    states, names = [], []
    for model_class in (swin_unetr.SwinUNETR, MonaiSwinUNETR):
        torch.manual_seed(4)
        model = model_class(**{"in_channels": 1, "out_channels": 2, "feature_size": 12} | options)
        states.append(model.state_dict())
        names.append([name for name, _ in model.named_parameters()])
    assert names[0] == names[1]
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    if not options:
        assert len(states[0]) == 159


def test_strict_loading_both_ways():
    theirs = monai_model()
    own = swin_unetr.SwinUNETR(1, 2, feature_size=12)
    own.load_state_dict(theirs.state_dict(), strict=True)
    fresh = MonaiSwinUNETR(1, 2, feature_size=12)
    fresh.load_state_dict(own.state_dict(), strict=True)
    assert all(torch.equal(value, fresh.state_dict()[key]) for key, value in theirs.state_dict().items())


@pytest.mark.parametrize(
    "options",
    [
        {"spatial_dims": 4},
        {"drop_rate": 1.5},
        {"attn_drop_rate": -0.1},
        {"dropout_path_rate": 2},
        {"feature_size": 20},
        {"downsample": "merge"},
        {"hyena_stages": (True, False)},
        {"window_size": (7, 7)},
        {"patch_size": (2, 2)},
    ],
    ids=str,
)
def test_same_construction_errors(options):
    if "hyena_stages" in options and MONAI_VERSION < (1, 6):
        pytest.skip(f"MONAI {monai.__version__} has no Hyena stages")
    arguments = {"in_channels": 1, "out_channels": 2, "feature_size": 12} | options
    with pytest.raises(ValueError) as theirs:  # noqa: PT011
        MonaiSwinUNETR(**arguments)
    with pytest.raises(ValueError) as own:  # noqa: PT011
        swin_unetr.SwinUNETR(**arguments)
    if "downsample" not in options:  # ours has one more name to list
        assert str(own.value) == str(theirs.value)


@pytest.mark.parametrize("shape", [(32, 32, 48), (31, 32, 32), (16, 96, 33)])
def test_same_error_for_extents(shape):
    x = image(shape=shape)
    with pytest.raises(ValueError, match="must be divisible by 2\\*\\*5") as own:
        swin_unetr.SwinUNETR(1, 2, feature_size=12)(x)
    with pytest.raises(ValueError, match="must be divisible") as theirs:
        MonaiSwinUNETR(1, 2, feature_size=12)(x)
    wrong = "[" + str(own.value).split("[")[1].split("]")[0] + "]"
    assert wrong in str(theirs.value)


def test_last_instance_norm_over_one_voxel_raises_as_upstream():
    x = image(shape=(32, 32, 32))
    for model in (swin_unetr.SwinUNETR(1, 2, feature_size=12), MonaiSwinUNETR(1, 2, feature_size=12)):
        with pytest.raises(ValueError, match="more than 1 spatial element"):
            model(x)


def test_number_of_stages_is_checked():
    with pytest.raises(ValueError, match="depths is \\(2, 2, 2\\), num_heads \\(3, 6, 12, 24\\); accepted are 4"):
        swin_unetr.SwinUNETR(1, 2, feature_size=12, depths=(2, 2, 2))


@pytest.mark.skipif(MONAI_VERSION < (1, 6), reason="MONAI before 1.6 has no Hyena stages")
class TestHyena:
    PATTERN = (True, False, True, False)

    def test_missing_package_raises_monais_error(self):
        from monai.networks.blocks.hyena import is_nvsubquadratic_available

        if is_nvsubquadratic_available():
            pytest.skip("nvsubquadratic is installed")
        with pytest.raises(ImportError, match="nvsubquadratic"):
            swin_unetr.SwinUNETR(1, 2, feature_size=12, hyena_stages=self.PATTERN)

    def test_stages_are_monais_blocks(self, monkeypatch):
        """With a stand-in for MONAI's block: which stages get it, with which arguments, and mixed results."""
        received = []

        class Block(nn.Linear):
            def __init__(self, dim, **options):
                super().__init__(dim, dim)
                received.append((dim, options))

            def forward(self, x, mask_matrix=None):
                return x + super().forward(x)

        monkeypatch.setattr("monai.networks.nets.swin_unetr.HyenaTransformerBlock", Block)
        options = {"hyena_stages": self.PATTERN, "hyena_kernel_size": 5, "hyena_omega_0": 3.0, "use_v2": True}
        reference = monai_model(**options)
        theirs, received[:] = list(received), []
        own = swin_unetr.SwinUNETR(1, 2, feature_size=12, **options)
        assert received == theirs
        assert [dim for dim, _ in received] == [12, 12, 48, 48]
        assert received[0][1]["hyena_kernel_size"] == 5

        own.load_state_dict(reference.state_dict())
        with pytest.warns(UserWarning, match=r"layers1\.0: this BasicLayer .* not fused: .*Block"):
            accelerated = swin_kernels.accelerate(copy.deepcopy(reference))
        x = image()
        expected = output_and_gradients(reference.swinViT, x)
        for name, model in {"own": own, "accelerated": accelerated}.items():
            assert_equal(output_and_gradients(model.swinViT, x), expected, 1e-4, name)

    def test_missing_monai_module(self, monkeypatch):
        """MONAI 1.5, where the module does not exist."""
        monkeypatch.setitem(sys.modules, "monai.networks.blocks.hyena", None)
        monkeypatch.delattr("monai.networks.blocks.hyena")
        with pytest.raises(ImportError, match=r"need MONAI 1\.6"):
            swin_unetr.SwinUNETR(1, 2, feature_size=12, use_hyena=True)


def published_layout(model: nn.Module) -> dict[str, dict[str, torch.Tensor]]:
    """Encoder weights of `model` as the published ``model_swinvit.pt`` has them."""
    state = {f"module.{k}".replace("mlp.linear", "mlp.fc"): v for k, v in model.swinViT.state_dict().items()}
    return {"state_dict": state}


def test_load_from():
    weights = published_layout(monai_model())
    own, theirs = (c(1, 2, feature_size=12) for c in (swin_unetr.SwinUNETR, MonaiSwinUNETR))
    accelerated = swin_kernels.accelerate(copy.deepcopy(theirs))
    for model in (own, theirs, accelerated):
        model.load_from(weights)
    for key, value in theirs.swinViT.state_dict().items():
        assert torch.equal(own.swinViT.state_dict()[key], value)
        assert torch.equal(accelerated.swinViT.state_dict()[key], value)
        assert torch.equal(weights["state_dict"][f"module.{key}".replace("mlp.linear", "mlp.fc")], value)
