"""Export: every format against the network, what the files need, the bundle against `predict`, and what is refused."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import monai.bundle
import nibabel
import numpy as np
import pytest
import torch
from monai.data import decollate_batch
from monai.networks.nets import swin_unetr as monai_swin_unetr
from rich.console import Console
from safetensors import safe_open

from swin_unetr import checkpoints, cli, export, imaging, predict
from swin_unetr.architecture import Architecture
from swin_unetr.exporting import bundle, formats, plain, weights
from swin_unetr.exporting.trained import Trained
from swin_unetr.labels import Labels
from swin_unetr.prediction import ensemble
from swin_unetr.prediction.windows import Windows
from swin_unetr.preprocessing import Preprocessing

from . import segmenter

ROI = (64, 32, 32)
ORGANS = Labels({"liver": [6], "spleen": [1]})
TUMOUR = Labels({"whole": [2, 1, 4], "core": [1, 4], "enhancing": [4]}, overlapping=True)
CT = Preprocessing(spacing=(2.0, 2.0, 3.0), window=(-100.0, 100.0))
MR = Preprocessing(spacing=None, orientation=None, intensity="zscore")
BUNDLE = "swin_unetr_segmentation"


def checkpoint(
    path: Path,
    labels: Labels = ORGANS,
    preprocessing: Preprocessing = CT,
    content: dict | None = None,
    roi: tuple[int, ...] = ROI,
    **architecture,
) -> Path:
    """Write a checkpoint of random weights whose moving average has others; the first stage has shifted windows."""
    options = {"out_channels": labels.channels, "feature_size": 12, "depths": (2, 1, 1, 1), "drop_rate": 0.5}
    of = Architecture(**options | architecture)
    torch.manual_seed(1)
    whole = {
        "kind": "train",
        "architecture": asdict(of),
        "roi": list(roi),
        "preprocessing": asdict(preprocessing),
        "labels": {"classes": {k: list(v) for k, v in labels.classes.items()}, "overlapping": labels.overlapping},
        "model": of.build().state_dict(),
        "ema": of.build().state_dict(),
    }
    checkpoints.write(path, whole | (content or {}))
    return path


def run(path: Path, out: Path, *names: str, **options) -> tuple[int, str]:
    """Exit status of an export, and what it prints."""
    text = io.StringIO()
    status = export.run(export.Options(path, out, names, **options), Console(file=text, width=200))
    return status, text.getvalue()


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> tuple[Path, Path, str]:
    """A checkpoint, the folder with every format of it, and what was printed."""
    folder = tmp_path_factory.mktemp("export")
    path = checkpoint(folder / "best.pt")
    status, printed = run(path, folder / "out", *export.FORMATS)
    assert status == 0, printed
    return path, folder / "out", printed


@pytest.fixture(scope="module")
def network(exported) -> torch.nn.Module:
    """The averaged weights of the checkpoint in a network."""
    content = checkpoints.read(exported[0])
    network = Architecture(**content["architecture"]).build()
    network.load_state_dict(content["ema"])
    return network.eval()


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


# --- every format ---


def test_the_record_tells_every_file(exported):
    path, out, printed = exported
    record = json.loads((out / "export.json").read_text())["exported"]
    assert set(record) == set(export.FORMATS)
    described = {}
    for name, entry in record.items():
        described |= entry["files"]
        assert entry["network"]["checkpoint"]["sha256"] == sha256(path)
        assert entry["network"]["averaged weights"] is True
        assert 0 <= entry["error"] <= entry["tolerance"] == 1e-4
        assert [shape[0] for shape in entry["checked shapes"]] == [1, 2]
        assert {"torch", "monai", "swin-kernels", "python"} <= set(entry["versions"])
        assert f"{entry['error']:.1e}" in next(line for line in printed.splitlines() if name in line)
    assert record["onnx"]["versions"]["onnxruntime"]
    on_disk = {p.relative_to(out).as_posix(): p for p in out.rglob("*") if p.is_file() and p.name != "export.json"}
    assert set(described) == set(on_disk)
    for name, file in described.items():
        assert file == {"bytes": on_disk[name].stat().st_size, "sha256": sha256(on_disk[name])}
    assert not [name for name in os.listdir(out) if name.startswith(".")]


def sha256(path: Path) -> str:
    return subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True).stdout.split()[0]


def test_files_take_another_number_of_images(exported, network):
    """Three: neither what was traced nor what was checked."""
    import onnxruntime

    out = exported[1]
    image = torch.randn(3, 1, *ROI)
    session = onnxruntime.InferenceSession(out / "model.onnx")
    with torch.no_grad():
        expected = network(image)
        found = {
            "pt2": torch.export.load(out / "model.pt2").module()(image),
            "onnx": torch.from_numpy(session.run(["logits"], {"image": image.numpy()})[0]),
            "torchscript": torch.jit.load(out / "model.ts")(image),
        }
    for name, logits in found.items():
        assert relative_error(logits, expected) < 1e-5, name


def operators(program: torch.export.ExportedProgram) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


def test_a_program_is_of_fused_operators(exported):
    """All that eager inference runs, and the choice of a backend is left to the machine that runs it."""
    program = torch.export.load(exported[1] / "model.pt2")
    fused = [node for node in program.graph.nodes if str(node.target).startswith("swin_kernels.")]
    assert {str(node.target).split(".")[1] for node in fused} == {
        "projected_window_attention",
        "instance_norm_act_",
        "convolution",
    }
    assert {node.args[-1] for node in fused} == {""}


ALONE = """
import sys
for name in ("swin_kernels", "swin_unetr", "monai"):
    sys.modules[name] = None
import torch
image, expected = torch.load(sys.argv[2])
with torch.no_grad():
    found = torch.export.load(sys.argv[1]).module()(image)
sys.exit(float((found - expected).abs().max() / expected.abs().max()) > 1e-5)
"""


def test_a_portable_program_needs_pytorch_alone(tmp_path):
    """In merging_legacy, which no MONAI of today computes, and for a fixed number of images of another shape."""
    path = checkpoint(tmp_path / "best.pt", downsample="merging_legacy", use_v2=True)
    status, printed = run(path, tmp_path / "out", "pt2", portable=True, batch=2, shape=(32, 64, 32))
    assert status == 0, printed
    program = torch.export.load(tmp_path / "out/model.pt2")
    assert not [name for name in operators(program) if "swin" in name]
    bound = {str(node.target) for node in program.graph.nodes if "device" in node.kwargs}
    assert bound <= {"aten._assert_tensor_metadata.default"}
    trained = Trained.read(path)
    image = torch.randn(2, 1, 32, 64, 32)
    with torch.no_grad():
        torch.save((image, trained.network()(image)), tmp_path / "pair.pt")
        with pytest.raises(Exception, match="x_in"):
            program.module()(image[:1])
    alone = [sys.executable, "-c", ALONE, tmp_path / "out/model.pt2", tmp_path / "pair.pt"]
    assert subprocess.run(alone, check=False).returncode == 0


def test_a_trace_is_bound_to_no_device(exported):
    graph = str(torch.jit.load(exported[1] / "model.ts").inlined_graph)
    assert "conv" in graph
    assert not [line for line in graph.splitlines() if "Device" in line and '"cpu"' in line]


def test_onnx_has_names_and_a_free_batch(exported):
    import onnx

    model = onnx.load(exported[1] / "model.onnx")
    assert [entry.version for entry in model.opset_import if entry.domain == ""] == [20]
    ((image,), (logits,)) = model.graph.input, model.graph.output
    assert (image.name, logits.name) == ("image", "logits")
    extents = [d.dim_param or d.dim_value for d in image.type.tensor_type.shape.dim]
    assert extents == ["batch", 1, *ROI]


def test_the_header_of_safetensors_describes_the_network(exported):
    with safe_open(exported[1] / "model.safetensors", framework="pt") as file:
        header = {name: json.loads(text) for name, text in file.metadata().items() if name != "format"}
    assert header["roi"] == list(ROI)
    assert header["labels"] == {"classes": {"liver": [6], "spleen": [1]}, "overlapping": False}
    assert header["preprocessing"]["spacing"] == [2.0, 2.0, 3.0]
    assert (header["architecture"]["depths"], header["architecture"]["drop_rate"]) == ([2, 1, 1, 1], 0.0)


@pytest.mark.parametrize(
    ("dims", "window", "shift"),
    [
        ((35, 21, 14), (7, 7, 7), (3, 3, 3)),
        ((14, 8, 21), (7, 8, 7), (3, 0, 3)),
        ((8, 8, 8), (8, 8, 8), (0, 0, 0)),
        ((14, 21), (7, 7), (3, 3)),
    ],
)
def test_regions_mask_what_monai_masks(dims, window, shift):
    regions = plain._regions(dims, window, shift)
    masked = regions[:, :, None] != regions[:, None, :]
    assert torch.equal(masked, monai_swin_unetr.compute_mask(list(dims), window, shift, "cpu") != 0)


def test_monai_is_left_as_it_was(tmp_path):
    trained, before = Trained.read(checkpoint(tmp_path / "best.pt")), monai_swin_unetr.compute_mask
    with (
        contextlib.suppress(KeyError),
        plain.plain_network(trained, torch.zeros(1, 1, *ROI)),
    ):
        assert monai_swin_unetr.compute_mask is not before
        raise KeyError
    assert monai_swin_unetr.compute_mask is before


# --- the bundle ---


@pytest.fixture(scope="module")
def tumour(tmp_path_factory) -> tuple[Path, Path]:
    """A checkpoint of overlapping classes in images of two channels, and a folder with its bundle."""
    folder = tmp_path_factory.mktemp("tumour")
    path = checkpoint(folder / "best.pt", TUMOUR, MR, in_channels=2)
    assert run(path, folder / "out", "bundle", bundle=bundle.BundleOptions("tumour", modality="MR"))[0] == 0
    return path, folder / "out/tumour"


def case(folder: Path, channels: int) -> Path:
    """A folder with an image of its own axes and spacing."""
    values = np.stack([segmenter.image((37, 33, 30), seed) for seed in range(channels)], axis=-1)
    folder.mkdir()
    segmenter.nifti(folder / "case.nii.gz", values[..., 0] if channels == 1 else values, segmenter.affine("LPS"))
    return folder


def workflow(root: Path, images: Path, out: Path, **override) -> monai.bundle.ConfigWorkflow:
    found = monai.bundle.ConfigWorkflow(
        config_file=str(root / "configs/inference.json"),
        meta_file=str(root / "configs/metadata.json"),
        logging_file=False,
        workflow_type="inference",
        bundle_root=str(root),
        dataset_dir=str(images),
        output_dir=str(out),
        **override,
    )
    found.initialize()
    return found


def as_monai_label_does(root: Path, images: Path, out: Path, **override) -> None:
    """Build the network, load the weights into it, and run the parts one by one."""
    parts = workflow(root, images, out, **override)
    net = parts.network_def
    net.load_state_dict(torch.load(root / "models/model.pt", weights_only=True))
    batch = next(iter(parts.parser.get_parsed_content("dataloader")))
    with torch.no_grad():
        batch["pred"] = parts.inferer(batch["image"], net.eval())
    for item in decollate_batch(batch):
        parts.postprocessing(item)


def same_as_predict(written: Path, image: Path, path: Path) -> None:
    """The label map of the bundle is that of our network, transforms and sliding window, on the image's grid."""
    (source,) = imaging.find([image], 1.0)
    expected = predict.segment(
        source.read(), ensemble.load([path], torch.device("cpu")), Windows(), torch.device("cpu")
    )
    found, of = nibabel.load(written), nibabel.load(image)
    assert found.shape == of.shape[:3]
    assert found.get_data_dtype() == np.uint8
    np.testing.assert_allclose(found.affine, of.affine, atol=1e-4)
    values = np.asarray(found.dataobj)
    labels = np.asarray(expected.labels)
    assert len(np.unique(labels)) > 2
    assert (values == labels).mean() > 0.9999


@pytest.mark.parametrize("network", ["monai.networks.nets.SwinUNETR", "swin_unetr.SwinUNETR"])
def test_the_bundle_segments_as_predict_does(network, exported, tmp_path):
    root, images = exported[1] / BUNDLE, case(tmp_path / "images", 1)
    as_monai_label_does(root, images, tmp_path / "labels", **{"network_def#_target_": network})
    same_as_predict(tmp_path / "labels/case_seg.nii.gz", images / "case.nii.gz", exported[0])


def test_a_bundle_of_overlapping_classes(tumour, tmp_path):
    path, root = tumour
    images = case(tmp_path / "images", 2)
    as_monai_label_does(root, images, tmp_path / "labels")
    same_as_predict(tmp_path / "labels/case_seg.nii.gz", images / "case.nii.gz", path)


def test_monais_evaluator_runs_the_bundle(exported, tmp_path):
    pytest.importorskip("ignite", reason="MONAI's evaluator needs pytorch-ignite, which is not installed")
    root, images = exported[1] / BUNDLE, case(tmp_path / "images", 1)
    evaluation = workflow(root, images, tmp_path / "labels")
    assert evaluation.check_properties() == []
    evaluation.run()
    evaluation.finalize()
    same_as_predict(tmp_path / "labels/case_seg.nii.gz", images / "case.nii.gz", exported[0])


def test_metadata_is_what_monai_label_reads(exported, tumour):
    """Labels in MONAI Label are names by value of the label map, read from the first output."""
    for root, classes in ((exported[1] / BUNDLE, {"liver": 6, "spleen": 1}), (tumour[1], {"whole": 2, "core": 1})):
        metadata = json.loads((root / "configs/metadata.json").read_text())
        needed = {"version", "monai_version", "pytorch_version", "numpy_version", "required_packages_version"}
        needed |= {"task", "description", "authors", "copyright", "network_data_format"}
        assert needed <= set(metadata)
        tensors = metadata["network_data_format"]
        ((image_key, image),), ((pred_key, pred),) = tensors["inputs"].items(), tensors["outputs"].items()
        assert (image_key, pred_key) == ("image", "pred")
        for tensor in (image, pred):
            assert {"type", "format", "modality", "num_channels", "spatial_shape", "dtype", "value_range"} <= set(
                tensor
            )
            assert {"is_patch_data", "channel_def"} <= set(tensor)
            assert tensor["type"] == "image"
        assert (pred["format"], image["spatial_shape"]) == ("segmentation", list(ROI))
        labels = {name: int(value) for value, name in pred["channel_def"].items()}
        assert classes.items() <= labels.items()
        assert labels["background"] == 0
    assert (image["modality"], image["num_channels"], image["value_range"]) == ("MR", 2, [])
    assert labels["enhancing"] == 4


@pytest.mark.parametrize(
    ("labels", "preprocessing"),
    [({"$print(1)": [1], "b": [2]}, {}), ({"a": [1], "b": [2]}, {"window": ["$print(1)", "~"]})],
    ids=["name of a class", "where a number belongs"],
)
def test_a_checkpoint_brings_no_code_into_a_bundle(labels, preprocessing, tmp_path):
    """MONAI evaluates text that starts with "$"."""
    content = {"labels": {"classes": labels, "overlapping": False}, "preprocessing": asdict(CT) | preprocessing}
    status, printed = run(checkpoint(tmp_path / "best.pt", content=content), tmp_path / "out", "bundle")
    assert status == 1
    assert "the checkpoint says '$print(1)'; accepted in a bundle is text without $, @ and %" in printed
    assert not os.listdir(tmp_path / "out")


def test_a_bundle_of_legacy_merging_names_our_network(tmp_path):
    path = checkpoint(tmp_path / "best.pt", downsample="merging_legacy")
    assert run(path, tmp_path / "out", "bundle")[0] == 0
    root = tmp_path / "out" / BUNDLE
    assert (
        json.loads((root / "configs/inference.json").read_text())["network_def"]["_target_"] == "swin_unetr.SwinUNETR"
    )
    assert "swin-kernels has to be installed" in (root / "docs/README.md").read_text()
    versions = json.loads((root / "configs/metadata.json").read_text())["required_packages_version"]
    assert "swin-kernels" in versions


# --- what does not agree, and what is in the way ---


def wrong(state, metadata):
    """Safetensors of weights that are not the network's."""
    return weights_save(
        {name: value + 1e-3 if value.is_floating_point() else value for name, value in state.items()}, metadata
    )


weights_save = weights.save


def test_a_file_that_does_not_agree_is_not_left(tmp_path, monkeypatch):
    path, out = checkpoint(tmp_path / "best.pt"), tmp_path / "out"
    monkeypatch.setattr(weights, "save", wrong)
    status, printed = run(path, out, "safetensors", "bundle")
    assert status == 1
    assert "Not exported: safetensors: its relative error is" in printed
    assert sorted(os.listdir(out)) == ["export.json", BUNDLE]
    assert list(json.loads((out / "export.json").read_text())["exported"]) == ["bundle"]


def test_a_file_that_agreed_stays_where_the_next_does_not(tmp_path, monkeypatch):
    path, out = checkpoint(tmp_path / "best.pt"), tmp_path / "out"
    assert run(path, out, "safetensors")[0] == 0
    before = {name: (out / name).read_bytes() for name in os.listdir(out)}
    monkeypatch.setattr(weights, "save", wrong)
    assert run(path, out, "safetensors", overwrite=True)[0] == 1
    assert {name: (out / name).read_bytes() for name in os.listdir(out)} == before


def test_weights_that_are_not_numbers_do_not_pass(tmp_path):
    state = Architecture(out_channels=3, feature_size=12, depths=(2, 1, 1, 1)).build().state_dict()
    state["out.conv.conv.bias"][0] = torch.nan
    status, printed = run(checkpoint(tmp_path / "best.pt", content={"ema": state}), tmp_path / "out", "safetensors")
    assert status == 1
    assert "relative error is nan" in printed
    assert not os.listdir(tmp_path / "out")


def test_an_output_of_another_shape_does_not_pass():
    image = torch.zeros(1, 1, 2, 2, 2)
    with pytest.raises(formats.CheckFailed, match=r"output is \(1, 2, 2, 2\); the network's is \(1, 1, 2, 2, 2\)"):
        formats.check(lambda image: image[0], [image], [image])


def test_files_are_replaced_only_if_asked_for(tmp_path):
    path, out = checkpoint(tmp_path / "best.pt"), tmp_path / "out"
    assert run(path, out, "safetensors", "bundle")[0] == 0
    first = json.loads((out / "export.json").read_text())["exported"]
    other = checkpoint(tmp_path / "other.pt", content={"ema": None})
    with pytest.raises(ValueError, match=r"out: .* has model.safetensors; accepted is another folder, or overwrite"):
        run(other, out, "safetensors")
    assert run(other, out, "safetensors", overwrite=True)[0] == 0
    second = json.loads((out / "export.json").read_text())["exported"]
    assert second["bundle"] == first["bundle"]
    assert second["safetensors"]["network"]["checkpoint"]["name"] == "other.pt"
    assert second["safetensors"]["network"]["averaged weights"] is False
    assert sha256(out / "model.safetensors") == second["safetensors"]["files"]["model.safetensors"]["sha256"]
    assert second["safetensors"]["files"] != first["safetensors"]["files"]
    (out / BUNDLE / "stale").touch()
    assert run(other, out, "bundle", overwrite=True)[0] == 0
    assert not (out / BUNDLE / "stale").exists()


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ValueError, match=r"onnx, which needs onnxscript: pip install 'swin-kernels\[export\]'"):
        run(checkpoint(tmp_path / "best.pt"), tmp_path / "out", "onnx", "safetensors")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ({"kind": "pretrain"}, {}, "is of kind 'pretrain'; accepted is 'train'"),
        ({"ema": {"a": torch.zeros(1)}}, {}, "does not describe its own weights"),
        ({"labels": {"classes": {}}}, {}, "does not describe its own weights"),
        ({}, {"shape": (64, 32)}, r"shape is \(64, 32\); accepted are 3 multiples of 32"),
        ({}, {"shape": (64, 32, 48)}, "accepted are 3 multiples of 32"),
        ({}, {"shape": (32, 32, 32)}, "at least one of them 64"),
    ],
)
def test_refused(content, options, message, tmp_path):
    path = checkpoint(tmp_path / "best.pt", content=content)
    with pytest.raises(ValueError, match=message):
        run(path, tmp_path / "out", "safetensors", **options)
    assert not (tmp_path / "out").exists()


def test_a_bundle_of_2d_is_refused(tmp_path):
    path = checkpoint(tmp_path / "best.pt", roi=(64, 32), spatial_dims=2)
    with pytest.raises(ValueError, match="formats has bundle, and the network is one for images in 2D"):
        run(path, tmp_path / "out", "bundle")
    status, printed = run(path, tmp_path / "out", "torchscript")
    assert status == 0, printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"formats": ()}, "formats is \\[\\]; accepted are pt2, onnx"),
        ({"formats": ("tensorrt",)}, "formats is \\['tensorrt'\\]"),
        ({"batch": 0}, "batch is 0; accepted is a number ≥ 1, or null"),
        ({"opset": 17}, "opset is 17; accepted is a number ≥ 18"),
    ],
)
def test_options_refused(options, message):
    with pytest.raises(ValueError, match=message):
        export.Options(Path("best.pt"), Path("out"), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "../x"}, "bundle.name is '../x'; accepted are letters"),
        ({"overlap": 1.0}, "bundle.overlap is 1.0; accepted is 0 ≤ overlap < 1"),
        ({"windows": 0}, "bundle.windows is 0; accepted is a number ≥ 1"),
    ],
)
def test_bundle_options_refused(options, message):
    with pytest.raises(ValueError, match=message):
        bundle.BundleOptions(**options)


def test_another_record_is_not_overwritten(tmp_path):
    (tmp_path / "export.json").write_text("{}")
    with pytest.raises(ValueError, match=r"export.json is no record of an export: KeyError: 'format'"):
        run(checkpoint(tmp_path / "best.pt"), tmp_path, "safetensors")
    assert (tmp_path / "export.json").read_text() == "{}"


def test_command_line(tmp_path, capsys):
    path = checkpoint(tmp_path / "best.pt")
    arguments = ["export", "--checkpoint", str(path), "--out", str(tmp_path / "out"), "--formats", "[safetensors]"]
    assert cli.main([*arguments, "--bundle.modality", "CT", "--shape", "[64, 32, 32]", "--batch", "1"]) == 0
    assert "model.safetensors" in capsys.readouterr().out
    assert cli.main(arguments) == 2
    assert "overwrite: true" in capsys.readouterr().err
