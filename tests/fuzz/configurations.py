"""Mutants of YAML files and of command lines: usable options, or a message about what is wrong with them."""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

from swin_unetr import cli, predict, pretrain, train
from swin_unetr.architecture import Architecture
from swin_unetr.datasets import Data
from swin_unetr.evaluate import EvaluateOptions
from swin_unetr.export import ExportOptions
from swin_unetr.labels import Labels
from swin_unetr.training import resume

from .mutation import NUMBERS, WORDS, Draw, Fault, mutate_bytes, mutate_number, mutate_text, mutate_tree, one_of

MOST_BLOCKS = 100
"""Networks with more are not built here: that takes long and is not a mistake."""
YAML = (
    *(
        "<<: *a",
        "a: &a [*a]",
        "x: !!python/object/apply:os.system [echo]",
        "- 1",
        "? [a]",
        "x: |",
        "\tx: 1",
        "---",
        "...",
    ),
    *("config: none.yaml", "preset: none", "seed: 0o17", "seed: 1_000", "seed: 1e3", "out: ~", "labels: 5", "data: []"),
)
"""Lines that YAML reads in unexpected ways."""


def prepare(folder: Path) -> Callable[[Draw, Path], str]:
    configurations = _configurations()
    presets = {name: Path(f"{cli.PRESETS}/{name}.yaml").read_text() for name in cli.presets()}

    def case(draw: Draw, place: Path) -> str:
        command = draw.choice(sorted(configurations))
        argv = one_of(draw, ((5, _mutant_file), (2, _mutant_preset), (4, _mutant_words)))(
            draw, place / "config.yaml", configurations[command], presets
        )
        as_it_was = not draw.notes and "--config" in argv and len(argv) == 2
        draw.note(" ".join([command, *argv])[:300])
        outcome = _run(command, argv)
        if as_it_was and outcome != "taken":
            raise Fault("good options were refused")
        return outcome

    return case


def _configurations() -> dict[str, dict[str, Any]]:
    """Good options of every command, in plain values."""
    data, labels = Data(Path("list.json")), Labels({"liver": [1], "spleen": [2, 3]})
    options = {
        "train": train.TrainOptions(data, labels, Path("out"), Architecture(out_channels=3, feature_size=12)),
        "pretrain": pretrain.PretrainOptions(data, Path("out")),
        "predict": predict.PredictOptions([Path("best.pt")], [Path("image.nii.gz")]),
        "evaluate": EvaluateOptions(Path("predictions"), Path("labels"), classes={"liver": [1, 2]}),
        "export": ExportOptions(Path("best.pt"), Path("out")),
    }
    return {command: resume.plain(of) for command, of in options.items()}


def _run(command: str, argv: list[str]) -> str:
    """How the command line reads `argv`, up to where the command itself would begin."""
    module, got = importlib.import_module(f"swin_unetr.{command}"), []
    original, said = module.run, io.StringIO()
    module.run = lambda options: got.append(options) or 0
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            status = cli.main([command, *argv])
    except SystemExit as error:
        status = error.code
    finally:
        module.run = original
    if status not in (0, 2):
        raise Fault(f"exit status {status!r}: {said.getvalue()[-300:]}")
    if "Traceback" in said.getvalue() or not (got or said.getvalue().strip()):
        raise Fault(f"exit status {status} with the words {said.getvalue()[-300:]!r}")
    if not got:
        return "refused" if status else "help"
    architecture = getattr(got[0], "architecture", None)
    if architecture is not None and sum(architecture.depths) <= MOST_BLOCKS:
        with torch.device("meta"):
            architecture.build()
    return "taken"


def _mutant_file(draw: Draw, path: Path, options: dict[str, Any], presets: dict[str, str]) -> list[str]:
    text = yaml.safe_dump(options, sort_keys=False)
    kind = draw.choice(("number", "number", "tree", "tree", "text", "text", "bytes", "nothing"))
    if kind == "tree":
        text = yaml.safe_dump(mutate_tree(draw, options, (64, 96, "RAS", "auto", [96] * 3, 1e-4)), allow_unicode=True)
    elif kind == "number":
        text = mutate_number(draw, text)
    elif kind == "text":
        text = mutate_text(draw, text, YAML)
    data = text.encode("utf-8", "surrogatepass")
    path.write_bytes(mutate_bytes(draw, data) if kind == "bytes" else data)
    return ["--config", str(path)]


def _mutant_preset(draw: Draw, path: Path, options: dict[str, Any], presets: dict[str, str]) -> list[str]:
    name = draw.choice(sorted(presets))
    path.write_bytes(mutate_text(draw, presets[name], YAML).encode("utf-8", "surrogatepass"))
    argv = ["--preset", draw.choice((name, name, "", "none"))] if draw.chance(0.3) else ["--config", str(path)]
    return [*argv, *_words(options, ("data.datalist", "labels.classes", "out", "checkpoint", "input"))]


def _mutant_words(draw: Draw, path: Path, options: dict[str, Any], presets: dict[str, str]) -> list[str]:
    """Options as words, some with odd values, forms, or names."""
    path.write_text(yaml.safe_dump(options))
    argv = ["--config", str(path)]
    flat = _flat(options)
    for _ in range(draw.some()):
        name = draw.choice(sorted(flat))
        value = draw.choice((*WORDS, *map(str, NUMBERS), "[1,2,3]", "1,2,3", "{a: 1}", "[[1]]", str(flat[name])))
        name = draw.choice((name, name, name, name, name[1:], f"{name}.x", name.upper(), name.partition(".")[0]))
        if "\0" not in value:  # no shell can pass it on
            argv += draw.choice(([f"--{name}", value], [f"--{name}={value}"], [f"--{name}"], [value]))
    return argv


def _words(options: dict[str, Any], names: tuple[str, ...]) -> list[str]:
    flat = _flat(options)
    return [
        word for name in names if name in flat for word in (f"--{name}", yaml.safe_dump(flat[name]).split("\n...")[0])
    ]


def _flat(options: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in options.items():
        nested = isinstance(value, dict) and name != "classes"
        flat |= _flat(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
    return flat
