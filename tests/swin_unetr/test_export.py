"""Export: every format compared with the network, what the files need to run, and what is refused."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from monai.networks.nets import swin_unetr as monai_swin_unetr
from safetensors import safe_open

from swin_unetr import checkpoints, cli, export
from swin_unetr.architecture import Architecture
from swin_unetr.exporting import formats, plain, weights
from swin_unetr.segmenter import Segmenter
from tests.unmeasured import unmeasured

from . import full
from .exporter import BUNDLE, ROI, checkpoint, run


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> tuple[Path, Path, str]:
    """A checkpoint, the folder with every format of it, and what was printed."""
    folder = tmp_path_factory.mktemp("export")
    path = checkpoint(folder / "best.pt")
    with unmeasured():  # PyTorch's exporters take twice as long when traced; all but ONNX is measured by other tests
        status, printed = run(path, folder / "out", *export.FORMATS)
    assert status == 0, printed
    return path, folder / "out", printed


@pytest.fixture(scope="module")
def network(exported) -> torch.nn.Module:
    """The averaged weights of the checkpoint in a network."""
    content = checkpoints.read(exported[0]).content
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
    return hashlib.sha256(path.read_bytes()).hexdigest()


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
    """Everything that eager inference runs; the choice of a backend is left to the machine that runs the file."""
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
    """With merging_legacy, which no current MONAI computes, and for a fixed number of images of another shape."""
    path = checkpoint(tmp_path / "best.pt", downsample="merging_legacy")
    status, printed = run(path, tmp_path / "out", "pt2", portable=True, batch=2, shape=(32, 64, 32))
    assert status == 0, printed
    program = torch.export.load(tmp_path / "out/model.pt2")
    assert not [name for name in operators(program) if "swin" in name]
    bound = {str(node.target) for node in program.graph.nodes if "device" in node.kwargs}
    assert bound <= {"aten._assert_tensor_metadata.default"}
    trained = Segmenter.read(path)
    image = torch.randn(2, 1, 32, 64, 32)
    with torch.no_grad():
        torch.save((image, trained.network(image)), tmp_path / "pair.pt")
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
    trained, before = Segmenter.read(checkpoint(tmp_path / "best.pt")), monai_swin_unetr.compute_mask
    with (
        contextlib.suppress(KeyError),
        plain.plain_network(trained, torch.zeros(1, 1, *ROI)),
    ):
        assert monai_swin_unetr.compute_mask is not before
        raise KeyError
    assert monai_swin_unetr.compute_mask is before


# --- what does not agree, and what is in the way ---


def wrong(state, metadata):
    """Safetensors with weights that are not the network's."""
    return weights_save(
        {name: value + 1e-3 if value.is_floating_point() else value for name, value in state.items()}, metadata
    )


weights_save = weights.save


def test_a_file_that_agreed_stays_where_the_next_does_not(tmp_path, monkeypatch):
    """And the other formats go on."""
    path, out = checkpoint(tmp_path / "best.pt"), tmp_path / "out"
    assert run(path, out, "safetensors")[0] == 0
    file, record = (out / "model.safetensors").read_bytes(), json.loads((out / "export.json").read_text())["exported"]
    monkeypatch.setattr(weights, "save", wrong)
    status, printed = run(path, out, "safetensors", "bundle", overwrite=True)
    assert status == 1
    assert "Not exported: safetensors: its relative error is" in printed
    assert sorted(os.listdir(out)) == ["export.json", "model.safetensors", BUNDLE]
    assert (out / "model.safetensors").read_bytes() == file
    after = json.loads((out / "export.json").read_text())["exported"]
    assert after == record | {"bundle": after["bundle"]}


def test_weights_that_are_not_numbers_are_refused(tmp_path):
    state = Architecture(out_channels=3, feature_size=12, depths=(2, 1, 1, 1)).build().state_dict()
    state["out.conv.conv.bias"][0] = torch.nan
    with pytest.raises(ValueError, match=r"weights that are NaN or infinite, such as out.conv.conv.bias \(1 of 3\)"):
        run(checkpoint(tmp_path / "best.pt", content={"ema": state}), tmp_path / "out", "safetensors")
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_not_a_number_does_not_pass():
    image = torch.ones(1, 1, 2, 2, 2)
    with pytest.raises(formats.CheckFailed, match="its relative error is nan; accepted is up to 1e-04"):
        formats.check(lambda image: image * torch.nan, [image], [image])


def test_a_full_disk_is_said_of_every_format(tmp_path):
    """PyTorch's own writers end the process on a full disk."""
    path, out, names = (
        checkpoint(tmp_path / "best.pt"),
        tmp_path / "out",
        ("pt2", "torchscript", "safetensors", "bundle"),
    )
    with full.after(300_000):
        status, printed = run(path, out, *names)
    assert status == 1
    for name, file in zip(names, ("model.pt2", "model.ts", "model.safetensors", BUNDLE), strict=True):
        (line,) = (line for line in printed.splitlines() if line.startswith(f"Not exported: {name}: "))
        assert line.endswith(f": [Errno {errno.EFBIG}] {full.SAYS}: '{out / file}'")
    assert not os.listdir(out)


def test_an_output_of_another_shape_does_not_pass():
    image = torch.zeros(1, 1, 2, 2, 2)
    with pytest.raises(formats.CheckFailed, match=r"output is \(1, 2, 2, 2\); the network's is \(1, 1, 2, 2, 2\)"):
        formats.check(lambda image: image[0], [image], [image])


def test_files_are_replaced_only_if_asked_for(tmp_path):
    path, out = checkpoint(tmp_path / "best.pt"), tmp_path / "out"
    assert run(path, out, "safetensors", "bundle")[0] == 0
    first = json.loads((out / "export.json").read_text())["exported"]
    (out / BUNDLE / "stale").touch()
    other = checkpoint(tmp_path / "other.pt", content={"ema": None})
    with pytest.raises(ValueError, match=rf"out: .* has {BUNDLE}; accepted is another folder, or overwrite"):
        run(other, out, "bundle")
    assert (out / BUNDLE / "stale").exists()
    assert run(other, out, "bundle", overwrite=True)[0] == 0
    second = json.loads((out / "export.json").read_text())["exported"]
    assert second["safetensors"] == first["safetensors"]
    assert second["bundle"]["network"]["checkpoint"]["name"] == "other.pt"
    assert second["bundle"]["network"]["averaged weights"] is False
    model = f"{BUNDLE}/models/model.pt"
    assert (
        sha256(out / model) == second["bundle"]["files"][model]["sha256"] != first["bundle"]["files"][model]["sha256"]
    )
    assert not (out / BUNDLE / "stale").exists()


def test_what_a_killed_export_left_is_removed(tmp_path):
    """All but an earlier file, which it had moved out of the new one's way."""
    path, out = checkpoint(tmp_path / "x.pt"), tmp_path / "out"
    for name in ("half/new/model.pt2", "moved/old"):
        (out / f".export-{name}").parent.mkdir(parents=True)
        (out / f".export-{name}").touch()
    assert run(path, out, "safetensors")[0] == 0
    assert {file.name for file in out.iterdir()} == {"model.safetensors", "export.json", ".export-moved"}


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ValueError, match=r"onnx, which needs onnxscript: pip install 'swin-kernels\[export\]'"):
        run(checkpoint(tmp_path / "best.pt"), tmp_path / "out", "onnx", "safetensors")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ({"kind": "pretrain"}, {}, "is of 'pretrain'; accepted are those of 'train'"),
        ({"ema": {"a": torch.zeros(1)}}, {}, "does not describe its own weights"),
        ({"labels": {"classes": {}}}, {}, "does not describe its own weights"),
        ({"roi": ["wide", 32, 32]}, {}, "does not describe its own weights"),
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
        export.ExportOptions(Path("best.pt"), Path("out"), **options)


def test_another_record_is_not_overwritten(tmp_path):
    (tmp_path / "export.json").write_text("{}")
    with pytest.raises(ValueError, match=r"export.json is not a record of an export: KeyError: 'format'"):
        run(checkpoint(tmp_path / "best.pt"), tmp_path, "safetensors")
    assert (tmp_path / "export.json").read_text() == "{}"


def test_command_line(tmp_path, capsys):
    path = checkpoint(tmp_path / "best.pt")
    arguments = ["export", "--checkpoint", str(path), "--out", str(tmp_path / "out"), "--formats", "[safetensors]"]
    assert cli.main([*arguments, "--bundle.modality", "CT", "--shape", "[64, 32, 32]", "--batch", "1"]) == 0
    assert "model.safetensors" in capsys.readouterr().out
    assert cli.main(arguments) == 2
    assert "overwrite: true" in capsys.readouterr().err
