"""The command line: options as people type them, and values with which no command can run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from swin_unetr import cli, predict, pretrain, train
from swin_unetr.architecture import Architecture
from swin_unetr.labels import Labels

NEEDED = {
    "train": ("--data.datalist", "none.json", "--labels.classes", "{organ: 1}", "--out", "run"),
    "pretrain": ("--data.datalist", "none.json", "--out", "run"),
    "predict": ("--checkpoint", "a.pt", "--input", "in"),
    "evaluate": ("--predictions", "p", "--labels", "l"),
    "export": ("--checkpoint", "a.pt", "--out", "files"),
}


def parse(command: str, *words: str):
    kind = cli.options_of(command)
    return cli.parse(kind, command, [*NEEDED[command], *words])


# --- as people type them ---


@pytest.mark.parametrize(
    "words",
    [
        ("--roi", "96,64,32"),
        ("--roi", "96", "64", "32"),
        ("--roi", "96,", "64,", "32"),
        ("--roi", "96 64 32"),
        ("--roi", "(96, 64, 32)"),
        ("--roi", "[96, 64, 32]"),
        ("--roi=96,64,32",),
        ("--roi=[96,64,32]", "--seed", "1"),
    ],
)
def test_numbers_of_a_list(words):
    assert parse("train", *words).roi == (96, 64, 32)


def test_lists_of_numbers_texts_and_paths():
    trained = parse("train", "--preprocessing.window", "-175", "250.5", "--data.sections", "training,test")
    assert trained.preprocessing.window == (-175.0, 250.5)
    assert trained.data.sections == ("training", "test")
    assert parse("train", "--preprocessing.spacing", "null").preprocessing.spacing is None
    assert parse("train", "--data.trusted", "/a, b", "c").data.trusted == (Path("/a, b"), Path("c"))
    words = ["--checkpoint", "a.pt", "--input", "x,y", "z", "--mirror", "0", "2"]
    assert cli.parse(predict.PredictOptions, "predict", words).input == [Path("x,y"), Path("z")]
    assert parse("predict", "--input+=y").input == [Path("in"), Path("y")]


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("predict", ("--input", "b")),
        ("predict", ("--checkpoint=b.pt",)),
        ("predict", ("--mirror", "0", "--input+", "b", "--mirror", "1")),
        ("train", ("--roi", "64", "64", "64", "--seed", "1", "--roi=[96,96,96]")),
        ("train", ("--labels.classes", "{liver: 1}")),
        ("evaluate", ("--classes", "{a: 1}", "--classes", "{b: 2}")),
        ("export", ("--formats", "onnx", "--formats", "pt2")),
    ],
    ids=lambda value: value if isinstance(value, str) else value[-1],
)
def test_several_values_are_given_once(command, words):
    """For an option with one value the last counts; with several, for some the last ones and for others all."""
    name = [word for word in words if word.startswith("--")][-1][2:].partition("=")[0]
    says = rf"^{name} is given twice; accepted is --{name} once, with all its values after it$"
    with pytest.raises(ValueError, match=says):
        parse(command, *words)


def test_a_command_line_replaces_several_values_of_a_file(tmp_path):
    (tmp_path / "x.yaml").write_text("roi: [64, 64, 64]\nseed: 3\n")
    trained = parse("train", "--config", str(tmp_path / "x.yaml"), "--roi", "96", "96", "64", "--seed", "1", "--seed=2")
    assert (trained.roi, trained.seed) == ((96, 96, 64), 2)


@pytest.mark.parametrize("words", [("onnx",), ("[onnx]",), ("onnx,pt2",), ("onnx", "pt2"), ("[onnx, pt2]",)])
def test_formats(words):
    assert parse("export", "--formats", *words).formats == (("onnx", "pt2") if "pt2" in " ".join(words) else ("onnx",))


def test_a_switch_needs_no_word():
    assert parse("predict", "--overwrite", "--entropy", "false").overwrite
    assert not parse("predict", "--overwrite", "False").overwrite
    assert parse("train", "--loss.squared").loss.squared


@pytest.mark.parametrize(
    "words",
    [("{organ: 1}",), ("{organ: [1]}",), ("{organ:", "1}"), ('{"organ": 1}',)],
    ids=["one", "list", "words", "json"],
)
def test_classes_with_one_value(words):
    trained = cli.parse(train.TrainOptions, "train", [*NEEDED["pretrain"], "--labels.classes", *words])
    assert trained.labels == Labels({"organ": [1]})
    assert parse("evaluate", "--classes", *words).classes == {"organ": [1]}


def test_values_alone_mean_what_lists_mean():
    label = torch.tensor([0, 1, 2, 7]).view(1, 1, 1, 4)
    assert Labels({"a": 1, "b": [2, 7]}).target(label).flatten().tolist() == [0, 1, 2, 2]


def test_classes_in_a_file(tmp_path):
    (tmp_path / "c.yaml").write_text("labels:\n  classes: {organ: 1, 2: 2}\narchitecture:\n  out_channels: 3\n")
    options = cli.parse(train.TrainOptions, "train", [*NEEDED["pretrain"], "--config", str(tmp_path / "c.yaml")])
    assert options.labels == Labels({"organ": [1], "2": [2]})


# --- what is not an option, or not a value of one ---


WRONG = {
    ("--learning_rate", "1"): "no option --learning_rate: did you mean --optimization.learning_rate?",
    ("--architecture.feature-size", "12"): "did you mean --architecture.feature_size?",
    ("--sed=1",): "did you mean --seed?",
    ("--overlap", "0.5"): "did you mean --validation.overlap?",
    ("--xyzzy",): "no option --xyzzy (swin-unetr train --help lists all)",
    ("--seed", "abc"): "seed is abc; accepted is a whole number",
    ("--seed", "1", "2"): "seed is 1 2; accepted is a whole number",
    ("--seed",): "seed has no value; accepted is a whole number",
    ("--roi", "96x64"): "roi is 96x64; accepted are whole numbers, such as 64 96 128 or [64, 96, 128]",
    (
        "--preprocessing.window",
        "5",
    ): "preprocessing.window is [5]; accepted are 2 numbers, such as 1.5 2.0 or [1.5, 2.0]",
    ("--optimization.clip", "much"): "optimization.clip is much; accepted is a number, or null",
    ("--labels.classes", "{organ:1}"): "labels.classes is {organ:1}; accepted are label values by class name, such as "
    "'{spleen: 1, liver: [2, 3]}'",
    ("--labels.classes", "{'': 1}"): "labels.classes is {'': 1}; accepted are classes with a name each",
    ("--data.cache", "ram"): "data.cache is ram; accepted are memory, disk, smart, none",
    ("--loss.squared", "2"): "loss.squared is 2; accepted is true or false",
    ("--preset", "pretrain"): "preset is 'pretrain'; accepted by train are brats21, btcv",
    ("--config", "none.yaml"): "none.yaml",
}


@pytest.mark.parametrize(("words", "message"), WRONG.items(), ids=map(" ".join, WRONG))
def test_the_error_is_one_line_that_says_what_is_accepted(words, message, capsys):
    needed = NEEDED["pretrain" if words[0] == "--labels.classes" else "train"]  # which has no classes
    assert cli.main(["train", *needed, *words]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "optimization: {learning_rat: 1}",
            "no option --optimization.learning_rat: did you mean --optimization.learning",
        ),
        ("rio: [64, 64, 64]", "no option --rio: did you mean --roi?"),
        ("roi: 64,64,64", "roi is 64,64,64; accepted are whole numbers, such as"),
        ("out: ''", "out is ''; accepted is a path"),
        ("seed: .nan", "seed is nan; accepted is a whole number"),
        ("seed: null", "seed is null; accepted is a whole number"),
        ("architecture: 17", "architecture is 17; accepted are its options by name"),
        ("data: []", "missing: --data.datalist"),
        ("any: &a [*a]", "config: a file holds itself, or is nested too deep"),
    ],
)
def test_a_files_errors_name_the_option_too(text, message, tmp_path, capsys):
    (tmp_path / "c.yaml").write_text(text)
    assert cli.main(["train", *NEEDED["train"], "--config", str(tmp_path / "c.yaml")]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", [*NEEDED, "demo"])
@pytest.mark.parametrize(
    ("out", "why"),
    [
        ("file", "{out} is not a folder"),
        ("file/below/it", "{tmp}/file is not a folder"),
        ("link", "{out} is not a folder"),
        ("x" * 300, "File name too long"),
        ("locked/new", "{tmp}/locked is not open for writing"),
    ],
    ids=["file", "below a file", "link to nowhere", "long name", "not writable"],
)
def test_an_out_that_can_be_no_folder_is_refused_first(command, out, why, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    (tmp_path / "locked").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    monkeypatch.setattr(os, "access", lambda path, mode: "locked" not in os.fspath(path))  # root may write anywhere
    words = NEEDED.get(command, ())
    if "--out" in words:
        words = words[: words.index("--out")]
    channels = ("--architecture.out_channels", "2") if command == "train" else ()
    assert cli.main([command, *words, *channels, "--out", str(tmp_path / out)]) == 2
    why = why.format(out=tmp_path / out, tmp=tmp_path)
    assert capsys.readouterr().err == (
        f"swin-unetr {command}: out: {tmp_path / out} cannot be written to: {why}; accepted is a folder, or a name for "
        "a new one\n"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link", "locked"]


def test_an_out_that_the_system_does_not_make_is_refused_by_name(capsys):
    assert cli.main(["evaluate", *NEEDED["evaluate"], "--out", "/proc/x"]) == 2
    assert re.match("swin-unetr evaluate: out: /proc/x cannot be written to: ", capsys.readouterr().err)


def test_what_is_missing_is_listed(capsys):
    assert cli.main(["train"]) == 2
    assert capsys.readouterr().err == "swin-unetr train: missing: --data.datalist, --labels.classes, --out\n"


HUGE = "9" * 30
VALUES = {
    "architecture.in_channels": ("0", "-1", HUGE),
    "architecture.out_channels": ("0", HUGE),
    "architecture.feature_size": ("0", "-12", "13", HUGE),
    "architecture.depths": ("[0,1,1,1]", "[1,1,1]", f"[{HUGE},1,1,1]", "[2,2,2,-2]"),
    "architecture.num_heads": ("[0,0,0,0]", "[3,6,12]", "[5,6,12,24]", "[-3,6,12,24]"),
    "architecture.window_size": ("0", "-7", HUGE),
    "architecture.spatial_dims": ("1", "2"),
    "architecture.downsample": ("none",),
    "architecture.drop_rate": ("-0.1", "1", "1.5", ".nan"),
    "architecture.attn_drop_rate": ("-0.1", "1"),
    "architecture.dropout_path_rate": ("-0.1", "1", ".inf"),
    "preprocessing.spacing": ("[0,1,1]", "[1e-9,1,1]", "[1,1,.inf]", "[1,1]"),
    "preprocessing.orientation": ("RAR", "''"),
    "preprocessing.window": ("[1,1]", "[-.inf,.inf]", "[.nan,1]"),
    "data.workers": ("-1", "100000"),
    "data.prefetch": ("0", HUGE),
    "data.batch_size": ("0", HUGE),
    "data.crops_per_volume": ("0", HUGE),
    "data.split_seed": ("-1", HUGE),
    "data.background": ("[-1]", f"[{HUGE}]"),
    "data.folds": ("0",),
    "data.fold": ("-1",),
    "data.largest": ("0", ".nan"),
    "data.positive": ("-1", ".inf", ".nan"),
    "data.image_threshold": (".inf", ".nan"),
    "data.augmentation.flip": ("1.1", ".nan"),
    "data.augmentation.noise_std": (".inf", "-1"),
    "data.augmentation.degrees": (".nan",),
    "roi": ("[0,64,64]", "[-32,-64,64]", "[64,64]", "[32,32,32]", f"[{32 * 10**12},64,64]"),
    "loss.gamma": (".inf", "-1"),
    "loss.deep_supervision": ("5", "-1"),
    "optimization.learning_rate": ("0", ".nan", ".inf"),
    "optimization.weight_decay": ("-1", ".nan"),
    "optimization.accumulation": ("0", HUGE),
    "optimization.clip": ("0", ".nan"),
    "optimization.ema": ("0", "1", ".nan"),
    "schedule.steps": ("0", HUGE, "9" * 400),
    "schedule.epochs": ("0", HUGE),
    "schedule.warm_up": ("1", ".nan"),
    "schedule.patience": ("0",),
    "validation.overlap": ("1", "-0.1", ".nan"),
    "validation.windows": ("0", HUGE),
    "seed": ("-1", HUGE),
    "resume": ("always",),
    "out": ("", "a\0b"),
    "initial": ("",),
}


@pytest.mark.parametrize(
    ("option", "value"), [(option, value) for option, values in VALUES.items() for value in values]
)
def test_values_that_no_training_can_run_with_are_refused_by_name(option, value, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", *NEEDED["train"], f"--{option}={value}"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"swin-unetr train: {option}")
    assert option.rpartition(".")[2] in said
    assert "accepted" in said
    assert not list(tmp_path.iterdir())  # before anything is written or read


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("tasks.temperature", "0"),
        ("tasks.temperature", ".nan"),
        ("tasks.cutout.noise", "2"),
        ("tasks.rotation_axes", "[0,0]"),
        ("embedding", HUGE),
        ("validation_crops", "0"),
        ("architecture.window_size", "0"),
        ("seed", "-1"),
    ],
)
def test_values_that_no_pretraining_can_run_with(option, value, capsys):
    assert cli.main(["pretrain", *NEEDED["pretrain"], f"--{option}={value}"]) == 2
    assert option.rpartition(".")[2] in capsys.readouterr().err.partition(";")[0]


def test_a_pretraining_without_negatives_is_refused_before_data_are_read(capsys):
    assert cli.main(["pretrain", *NEEDED["pretrain"], "--data.crops_per_volume", "1", "--device", "cpu"]) == 2
    assert (
        "data.batch_size and data.crops_per_volume are 1, on one rank; accepted are 2 crops" in capsys.readouterr().err
    )


@pytest.mark.parametrize("device", ["meta", "", "mps", "abacus", "cuda:-1", "cuda:99", "cpu:x"])
def test_devices(device, capsys, tmp_path):
    words = NEEDED["train"][:-1]
    assert cli.main(["train", *words, str(tmp_path / "run"), f"--device={device}"]) == 2
    assert "device" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_too_little_memory_is_said(capsys, monkeypatch):
    def run(options):
        torch.empty(2**60)

    monkeypatch.setattr(train, "run", run)
    assert cli.main(["train", *NEEDED["train"]]) == 2
    assert "swin-unetr train: out of memory" in capsys.readouterr().err


def test_accepted_architectures_are_built():
    """Whatever is not refused builds a network: the limits are exactly that wide."""
    for options in (
        {"feature_size": 12, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1), "window_size": 1},
        {"feature_size": 12, "depths": (1, 1, 1, 1), "num_heads": (12, 24, 48, 96), "use_v2": True},
        {"feature_size": 12, "depths": (1, 1, 1, 1), "num_heads": (4, 8, 16, 32), "downsample": "merging_legacy"},
    ):
        with torch.device("meta"):
            Architecture(**options).build()


# --- presets ---


def test_presets_are_offered_where_they_work():
    assert "pretrain" not in cli.presets(train.TrainOptions)
    assert cli.presets(pretrain.PretrainOptions) == ["pretrain"]
    for command in ("predict", "evaluate", "export"):
        assert cli.presets(cli.options_of(command)) == []
    for name in cli.presets(train.TrainOptions):
        words = ["--preset", name, "--data.datalist", "none.json", "--out", "run"]
        assert isinstance(cli.parse(train.TrainOptions, "train", words), train.TrainOptions)


@pytest.mark.parametrize("command", ["predict", "evaluate", "export"])
def test_a_command_without_presets_says_so(command, capsys):
    assert cli.main([command, *NEEDED[command], "--preset", "btcv"]) == 2
    assert f"preset is 'btcv'; {command} has none: presets are for train and pretrain" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    assert "preset" not in capsys.readouterr().out


# --- help ---


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["pretrain", "--help"], ["train", "--sed", "1"]])
def test_help_and_errors_wait_for_no_library(words):
    code = "import sys\nfrom swin_unetr import cli\n"
    code += f"try: cli.main({words})\nexcept SystemExit: pass\n"
    code += "print([name for name in ('torch', 'monai', 'numpy', 'scipy') if name in sys.modules])"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert said.stdout.splitlines()[-1] == "[]", said.stderr
