"""`load_pretrained`: every known layout, what it reports, and what it refuses."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
import torch.nn as nn
from monai.networks.nets import SwinUNETR as MonaiSwinUNETR
from monai.networks.nets.swin_unetr import filter_swinunetr
from safetensors.torch import save_file

import swin_unetr
from swin_kernels import accelerate
from swin_unetr import checkpoints, load_pretrained

pytestmark = pytest.mark.filterwarnings("error")


def own(**options) -> nn.Module:
    return swin_unetr.SwinUNETR(**{"in_channels": 1, "out_channels": 2, "feature_size": 12} | options)


@pytest.fixture(scope="module")
def trained() -> dict[str, torch.Tensor]:
    """The state dict of a model with parameters unlike any initial values."""
    torch.manual_seed(5)
    model = own()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model.state_dict()


ENCODER = "swinViT."


def encoder_of(state: dict) -> dict:
    return {key.removeprefix(ENCODER): value for key, value in state.items() if key.startswith(ENCODER)}


def with_fc(state: dict) -> dict:
    return {key.replace(".mlp.linear", ".mlp.fc"): value for key, value in state.items()}


def prefixed(prefix: str, state: dict) -> dict:
    return {prefix + key: value for key, value in state.items()}


def disruptive_autoencoder(state: dict) -> dict:
    """The ``encoder.`` layout: each stage one list deeper, extra entries of the pretraining."""
    result = {"encoder.mask_token": torch.zeros(1), "encoder.norm.weight": torch.zeros(1)}
    for key, value in encoder_of(state).items():
        result["encoder." + (key.replace(".0.", ".0.0.", 1) if key.startswith("layers") else key)] = value
    return result


HEADS = {"rotation_head.weight": torch.zeros(4, 192), "contrastive_head.weight": torch.zeros(8, 192)}

# Layout, whether it has the decoder, entries the model lacks, whether it shows its age.
LAYOUTS = {
    "whole model": (lambda s: s, True, 0, False),
    "checkpoint": (lambda s: {"epoch": 3, "state_dict": s, "optimizer": {"state": {}}}, True, 0, False),
    "data parallel": (lambda s: {"state_dict": prefixed("module.", s)}, True, 0, False),
    "compiled": (lambda s: prefixed("_orig_mod.module.", s), True, 0, False),
    "encoder alone": (encoder_of, False, 0, False),
    "model_swinvit.pt": (
        lambda s: {"state_dict": prefixed("module.", with_fc(encoder_of(s)) | HEADS)},
        False,
        2,
        True,
    ),
    "pretraining model": (lambda s: {"state_dict": prefixed("swinViT.", encoder_of(s)) | HEADS}, False, 2, False),
    "swin_vit": (lambda s: prefixed("module.swin_vit.", with_fc(encoder_of(s))), False, 0, True),
    "disruptive autoencoder": (lambda s: {"model": disruptive_autoencoder(s)}, False, 2, True),
}
TARGETS = {
    "own": lambda: own(downsample="merging_legacy"),
    "compiled": lambda: torch.compile(own(downsample="merging_legacy"), backend="eager"),
}


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(layout, target, trained, capsys, tmp_path):
    write, has_decoder, unexpected, old = layout
    torch.save(write(trained), tmp_path / "weights.pt")
    model = target()
    initial = copy.deepcopy(model.state_dict())
    report = load_pretrained(model, tmp_path / "weights.pt")

    after = model.state_dict()
    expected = {key for key in trained if has_decoder or key.startswith(ENCODER)}
    assert len(report.loaded) == len(expected) == (159 if has_decoder else 126)
    for key, value in after.items():
        name = key.removeprefix("_orig_mod.")
        assert torch.equal(value, trained[name] if name in expected else initial[key]), key
    assert set(report.loaded) | set(report.missing) == set(after)
    assert len(report.unexpected) == unexpected
    assert not report.mismatched
    assert report.downsample == ("merging_legacy" if old else None)

    printed = capsys.readouterr().out
    assert printed == f"{report}\n"
    assert "weights.pt" in printed
    assert f"loaded      {len(expected):4d} of 159: swinViT (126)" in printed
    assert ("made for downsample='merging_legacy'" in printed) == old
    for name in report.unexpected:
        assert name.removeprefix("module.").split(".")[0] in printed


def test_safetensors(trained, tmp_path):
    save_file(prefixed("module.", trained), tmp_path / "weights.safetensors")
    model = own()
    report = load_pretrained(model, tmp_path / "weights.safetensors", verbose=False)
    assert len(report.loaded) == 159
    assert all(torch.equal(value, trained[key]) for key, value in model.state_dict().items())


def test_damaged_safetensors(trained, tmp_path):
    save_file(trained, tmp_path / "weights.safetensors")
    content = (tmp_path / "weights.safetensors").read_bytes()
    (tmp_path / "weights.safetensors").write_bytes(content[:-1])
    with pytest.raises(ValueError, match=r"weights\.safetensors is not a safetensors file"):
        load_pretrained(own(), tmp_path / "weights.safetensors")


def test_encoder_layout_agrees_with_monais_filter(trained):
    layout = disruptive_autoencoder(trained)
    pairs = [filter_swinunetr(key, value) for key, value in layout.items()]
    expected = {pair[0] for pair in pairs if pair is not None}
    assert set(load_pretrained(own(downsample="merging_legacy"), layout, verbose=False).loaded) == expected


@pytest.mark.parametrize("make", [MonaiSwinUNETR, lambda *a, **o: accelerate(MonaiSwinUNETR(*a, **o))])
def test_monais_models(make, trained):
    model = make(1, 2, feature_size=12)
    load_pretrained(model, trained)
    assert all(torch.equal(value, trained[key]) for key, value in model.state_dict().items())


def test_bare_encoder(trained):
    model = own().swinViT
    report = load_pretrained(model, trained, verbose=False)
    assert len(report.loaded) == 126
    assert not report.missing
    assert len(report.unexpected) == 33
    assert torch.equal(
        model.state_dict()["layers1.0.blocks.0.norm1.bias"], trained["swinViT.layers1.0.blocks.0.norm1.bias"]
    )


@pytest.mark.parametrize("order", ["merging", "mergingv2", "monai"])
def test_old_weights_in_a_model_of_the_new_order_warn(order, trained):
    model = MonaiSwinUNETR(1, 2, feature_size=12) if order == "monai" else own(downsample=order)
    old = prefixed("module.", with_fc(encoder_of(trained)))
    with pytest.warns(UserWarning, match=r"older than MONAI 1\.5.*PatchMerging.*downsample='merging_legacy'"):
        load_pretrained(model, old, verbose=False)


def test_old_weights_in_2d_do_not_warn():
    """The order in 2D never changed."""
    old = prefixed("module.", with_fc(encoder_of(own(spatial_dims=2).state_dict())))
    assert load_pretrained(own(spatial_dims=2), old, verbose=False).downsample == "merging_legacy"


@pytest.mark.parametrize("averaged", [False, True])
@pytest.mark.parametrize("made_for", ["merging", "mergingv2", "merging_legacy"])
def test_own_checkpoints_tell_their_order(made_for, averaged, trained, tmp_path, recwarn):
    content = {
        "kind": "train",
        "architecture": {"downsample": made_for},
        "model": {name: value + 1 for name, value in trained.items()} if averaged else trained,
        "ema": trained if averaged else None,
    }
    checkpoints.write(tmp_path / "best.pt", content)
    model = own(downsample=made_for)
    report = load_pretrained(model, tmp_path / "best.pt", verbose=False)
    assert all(torch.equal(value, trained[key]) for key, value in model.state_dict().items())
    assert report.downsample == made_for
    assert f"made for downsample={made_for!r}" in str(report)
    assert report.source.endswith("best.pt, averaged weights" if averaged else "best.pt")
    assert not [w for w in recwarn if "patch merging" in str(w.message)]
    other = next(order for order in ("merging", "mergingv2", "merging_legacy") if order != made_for)
    with pytest.warns(UserWarning, match=rf"another order of patch merging.*downsample='{made_for}'"):
        load_pretrained(own(downsample=other), tmp_path / "best.pt", verbose=False)


def test_other_number_of_classes(trained, capsys):
    model = own(out_channels=5)
    initial = copy.deepcopy(model.state_dict())
    report = load_pretrained(model, trained)
    assert report.mismatched == {
        "out.conv.conv.weight": ((2, 12, 1, 1, 1), (5, 12, 1, 1, 1)),
        "out.conv.conv.bias": ((2,), (5,)),
    }
    assert torch.equal(model.out.conv.conv.bias, initial["out.conv.conv.bias"])
    assert len(report.loaded) == 157
    assert "out.conv.conv.bias (2,) for (5,)" in capsys.readouterr().out


OUT = "out.conv.conv.bias"
INDEX = "swinViT.layers1.0.blocks.0.attn.relative_position_index"


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (lambda s: {"a.weight": torch.zeros(2)}, "no entry of a state dict is one of SwinUNETR's; it has a.weight"),
        (lambda s: {}, "no entry"),
        (lambda s: {"state_dict": [1]}, "no entry of a state dict is one of SwinUNETR's; it has state_dict"),
        (lambda s: s | prefixed("module.", s), "mean the same parameter"),
        (
            lambda s: {key: (value * 100).to(torch.int8) for key, value in s.items()},
            "'.*' .* is .*int8, the model's .*32;",
        ),
        (
            lambda s: {key: value > 0 for key, value in s.items()},
            r"type torch.bool, the model's torch.float32; accepted",
        ),
        (lambda s: s | {OUT: s[OUT] * math.nan}, f"'{OUT}' of a state dict has values that are not finite as torch.fl"),
        (lambda s: s | {OUT: s[OUT].double() + 1e300}, f"'{OUT}' of a state dict has values that are not finite"),
        (lambda s: s | {INDEX: s[INDEX].flip(0)}, f"a state dict does not fit the model: .*{INDEX}"),
    ],
    ids=["other model", "empty", "not a state", "twice", "int8", "bool", "NaN", "beyond float32", "another index"],
)
def test_refused_and_untouched(state, message, trained):
    model = own()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        load_pretrained(model, state(trained))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_other_feature_size_is_refused(trained):
    """Bias tables fit any feature_size: some entries match, but the model would still be nonsense."""
    model = own(feature_size=24)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        ValueError, match=r"differ from the model's and 17 agree; was it made with another feature_size"
    ):
        load_pretrained(model, trained)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


class Opaque:
    pass


def test_files_that_run_code_are_refused(tmp_path):
    torch.save({"state_dict": Opaque()}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="does not load with weights_only=True"):
        load_pretrained(own(), tmp_path / "weights.pt")


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_pretrained(own(), str(tmp_path / "weights.pt"))


def test_wrong_type():
    with pytest.raises(TypeError, match="path_or_state is a list"):
        load_pretrained(own(), [1])


def test_same_layout_gives_no_warning(trained):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_pretrained(own(), trained, verbose=False)


def _holding_itself() -> dict:
    content = {"epoch": 1}
    content["state_dict"] = content
    return content


def _altered(path, state) -> None:
    """A weight with one bit flipped, about which `torch.load` says nothing."""
    torch.save(state, path)
    content = bytearray(path.read_bytes())
    place = content.index(state["out.conv.conv.weight"].numpy().tobytes())
    content[place] ^= 1
    path.write_bytes(content)
    torch.load(path, weights_only=True)


BAD_FILES = {
    "empty": lambda path, state: path.write_bytes(b""),
    "text": lambda path, state: path.write_text("weights will be sent on request\n"),
    "HTML": lambda path, state: path.write_text("<!doctype html><html><title>404</title></html>"),
    "truncated": lambda path, state: (torch.save(state, path), path.write_bytes(path.read_bytes()[:-1000])),
    "truncated at once": lambda path, state: (torch.save(state, path), path.write_bytes(path.read_bytes()[:100])),
    "holds itself": lambda path, state: torch.save(_holding_itself(), path),
    "a damaged program": lambda path, state: path.write_bytes(b"\x80\x02s."),
    "an altered weight": _altered,
    "a folder": lambda path, state: path.mkdir(),
    "numbers for names": lambda path, state: torch.save(dict(enumerate(state.values())), path),
    "a list": lambda path, state: torch.save(list(state.values()), path),
    "a number": lambda path, state: torch.save(1, path),
    "of our format, altered": lambda path, state: torch.save(
        {"format": checkpoints.FORMAT, "kind": "train", "model": state, "checksum": "0" * 64}, path
    ),
    "a sparse tensor": lambda path, state: torch.save(
        state | {"out.conv.conv.weight": state["out.conv.conv.weight"].to_sparse()}, path
    ),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_file_that_holds_no_whole_weights_is_refused_by_name(tmp_path, trained, kind):
    path = tmp_path / "weights.pt"
    BAD_FILES[kind](path, trained)
    model = own()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"load_pretrained: .*weights\.pt"):
        load_pretrained(model, path, verbose=False)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


@pytest.mark.parametrize("content", [b"", b"no weights", b"\xff" * 100, b"\x08\0\0\0\0\0\0\0[1,2,3] "])
def test_a_damaged_safetensors_file_is_refused_by_name(tmp_path, content):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"load_pretrained: .*weights\.safetensors is not a safetensors file"):
        load_pretrained(own(), path)


def test_a_file_without_checksums_is_loaded(tmp_path, trained):
    """PyTorch can be told not to compute them."""
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(trained, tmp_path / "weights.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert not load_pretrained(own(), tmp_path / "weights.pt", verbose=False).missing
