"""Mutants of checkpoints, weights and logs: found intact, skipped or refused by name; no weights half loaded."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from swin_unetr import checkpoints
from swin_unetr.architecture import Architecture
from swin_unetr.labels import Labels
from swin_unetr.loading import load_pretrained
from swin_unetr.preprocessing import Preprocessing
from swin_unetr.segmenter import Segmenter
from swin_unetr.training import log, resume
from swin_unetr.training.options import Schedule

from ..swin_unetr import toy
from .mutation import NUMBERS, WORDS, Draw, Fault, mutate_bytes, mutate_text, mutate_tree, one_of


def prepare(folder: Path) -> Callable[[Draw, Path], str]:
    runs = {
        _damaged_checkpoint: _checkpoints_of_a_run(folder),
        _crafted_checkpoint: _described(),
        _damaged_weights: _bytes_of_weights(),
        _crafted_weights: _layouts(),
        _damaged_log: _lines(),
    }

    def case(draw: Draw, place: Path) -> str:
        kinds = (
            *((4, _damaged_checkpoint), (2, _crafted_checkpoint), (3, _damaged_weights), (1, _crafted_weights)),
            (1, _damaged_log),
        )
        kind = one_of(draw, kinds)
        draw.note(kind.__name__.strip("_").replace("_", " "))
        return kind(draw, place, runs[kind])

    return case


# --- a run's checkpoints ---


@dataclass(frozen=True)
class Written:
    """A checkpoint of a run: its file's bytes, and the checksum of their content."""

    data: bytes
    checksum: str


def _checkpoints_of_a_run(folder: Path) -> list[Written]:
    """Checkpoints of steps 1 and 2."""
    toy.loop(folder / "toy", schedule=Schedule(steps=2, validate_every=2, checkpoint_every=1)).run()
    paths = checkpoints.series(folder / "toy" / resume.CHECKPOINTS)
    return [Written(path.read_bytes(), checkpoints.checksum(checkpoints.read(path).content)) for path in paths]


def _damaged_checkpoint(draw: Draw, place: Path, written: list[Written]) -> str:
    """The newest is not what was written: the run resumes from the one before it."""
    run = place / resume.CHECKPOINTS
    run.mkdir()
    (run / checkpoints.name(1)).write_bytes(written[0].data)
    mutant = _mutant_of_zip(draw, written[1].data, written[0].data)
    if mutant == written[0].data:
        return "read"  # all of another checkpoint, and so intact
    (run / checkpoints.name(2)).write_bytes(mutant)
    path, content, damaged = checkpoints.newest(run)
    found = resume.find(place, "train", {}, fresh=False)
    if found is None or found.path != path:
        raise Fault(f"newest gives {path}, and resume goes on from {found}")
    step = content["progress"]["step"]
    if path != run / checkpoints.name(step) or checkpoints.checksum(content) != written[step - 1].checksum:
        raise Fault(f"{path.name} is read as something else than was written")
    if step == 2:
        return "read"
    if not any(str(run / checkpoints.name(2)) in str(error) for error in damaged):
        raise Fault(f"what was passed over is not named: {damaged}")
    return "passed over"


def _mutant_of_zip(draw: Draw, data: bytes, other: bytes) -> bytes:
    """Damage anywhere in a file of torch.save, or inside one of its members, whose checksum is then made right."""
    if draw.chance(0.6):
        return mutate_bytes(draw, data, other)
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as before, zipfile.ZipFile(out, "w") as after:
        members = before.infolist()
        chosen = draw.choice([m for m in members if m.filename.endswith(draw.choice(("data.pkl", "")))] or members)
        for member in members:
            content = before.read(member)
            if member is chosen:
                draw.note(f"in {member.filename}:")
                content = mutate_bytes(draw, content)
            after.writestr(member, content)
    return out.getvalue()


# --- a trained network's description ---


def _described() -> dict[str, Any]:
    """What `swin-unetr train` writes, for the smallest network there is."""
    architecture = Architecture(feature_size=12, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1), spatial_dims=2)
    preprocessing = Preprocessing()
    return {
        "kind": "train",
        "architecture": asdict(architecture),
        "labels": asdict(Labels({"organ": [1]})),
        "preprocessing": asdict(preprocessing),
        "roi": [64, 64],
        "model": {name: value.half() for name, value in architecture.build().state_dict().items()},
        "ema": None,
        "config": {},
    }


def _crafted_checkpoint(draw: Draw, place: Path, described: dict[str, Any]) -> str:
    """An intact file with another description: it is what it says, or is refused."""
    plain = {name: value for name, value in described.items() if name != "model"}
    changed = _plain(mutate_tree(draw, json.loads(json.dumps(plain)), words=({}, "train", [1, 2], {"organ": [300]})))
    state = dict(described["model"])
    if draw.chance(0.3):
        name = draw.choice(sorted(state))
        new = draw.choice((torch.ones(3), torch.tensor(1), state[name].double(), 5, None, "a", state[name].flatten()))
        draw.note(f"weight {name} is {type(new).__name__} {getattr(new, 'shape', new)}")
        state[name] = new
    if not isinstance(changed, dict):
        changed = {"content": changed}
    path = place / "best.pt"
    checkpoints.write(path, {"model": state, **changed})
    try:
        Segmenter.read(path)
    except ValueError as error:
        return _refused(error, path)
    return "read"


def _plain(value: Any) -> Any:
    """`value` as a checkpoint can hold it: keys of dictionaries are text."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _refused(error: Exception, path: Path) -> str:
    if str(path) not in str(error):
        raise Fault(f"the message does not name {path.name}: {error}") from error
    return "refused"


# --- weights for `load_pretrained` ---


class Net(nn.Module):
    """The names of a Swin UNETR's parameters, with little data."""

    def __init__(self) -> None:
        super().__init__()
        self.swinViT = nn.ModuleDict({"patch_embed": nn.ModuleDict({"proj": nn.Conv3d(1, 2, 2)})})
        mlp = nn.ModuleDict({"linear1": nn.Linear(2, 8), "linear2": nn.Linear(8, 2)})
        self.swinViT["layers1"] = nn.ModuleList(
            [nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict({"mlp": mlp})])})]
        )
        self.encoder1 = nn.Conv3d(1, 2, 3)


def _layouts() -> list[dict[str, Any]]:
    torch.manual_seed(0)
    state = dict(Net().state_dict())
    encoder = {name.removeprefix("swinViT."): value for name, value in state.items() if name.startswith("swinViT.")}
    published = {f"module.{name.replace('linear', 'fc')}": value for name, value in encoder.items()}
    ours = {"format": checkpoints.FORMAT, "model": state, "ema": state, "architecture": {"downsample": "merging"}}
    return [state, {"state_dict": published}, {"model": {f"encoder.{n}": v for n, v in encoder.items()}}, ours]


def _bytes_of_weights() -> list[tuple[str, bytes]]:
    files = []
    for layout in _layouts():
        for zipped in (True, False):
            file = io.BytesIO()
            torch.save(layout, file, _use_new_zipfile_serialization=zipped)
            files.append(("weights.pt", file.getvalue()))
    state = _layouts()[0]
    files.append(("weights.safetensors", safetensors.torch.save(state)))
    files.append(("weights.pt", pickle.dumps(print)))
    files.append(("weights.pt", b""))
    files.append(("weights.pt", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"))
    return files


def _damaged_weights(draw: Draw, place: Path, files: list[tuple[str, bytes]]) -> str:
    name, data = draw.choice(files)
    if name.endswith("pt") and data.startswith(b"PK"):
        data = _mutant_of_zip(draw, data, draw.choice(files)[1])
    elif name.endswith(".safetensors") and draw.chance(0.5):
        length = int.from_bytes(data[:8], "little")
        header = mutate_text(draw, data[8 : 8 + length].decode()).encode("utf-8", "surrogatepass")
        data = len(header).to_bytes(8, "little") + header + data[8 + length :]
    else:
        data = mutate_bytes(draw, data, draw.choice(files)[1])
    (place / name).write_bytes(data)
    return _load(place / name)


def _load(path: Path) -> str:
    """Load a file of weights; a model into which nothing could be loaded stays as it was."""
    torch.manual_seed(1)
    net = Net()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    try:
        report = load_pretrained(net, path, verbose=False)
    except ValueError as error:
        if any(not torch.equal(value, before[name]) for name, value in net.state_dict().items()):
            raise Fault(f"weights were changed, and then refused: {error}") from error
        return _refused(error, path)
    unnamed = [n for n, v in net.state_dict().items() if not _same(v, before[n]) and n not in report.loaded]
    if unnamed:
        raise Fault(f"{unnamed} changed and are not among the loaded ones of the report")
    str(report)
    return "loaded"


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a, b)


def _crafted_weights(draw: Draw, place: Path, layouts: list[dict[str, Any]]) -> str:
    """A file that loads, with other content: other types, names and shapes, or content that contains itself."""
    content = draw.choice(layouts)
    content = {name: dict(value) if isinstance(value, dict) else value for name, value in content.items()}
    tensors = (torch.ones(3), torch.tensor(1), torch.ones(0), torch.ones(2, 1, 2, 2, 2).to_sparse(), torch.ones(2) * 1j)
    for _ in range(draw.some()):
        inner = draw.choice([content, *(value for value in content.values() if isinstance(value, dict))])
        key = draw.choice(sorted(inner, key=str) or ["model"])
        new = draw.choice((*tensors, *NUMBERS[:20], *WORDS[:12], None, [], {}, inner, content, {"model": {}}))
        kind = draw.choice(("replace", "drop", "add", "rename"))
        draw.note(f"{kind} {key!r}: {type(new).__name__}")
        if kind == "replace":
            inner[key] = new
        elif kind == "drop":
            inner.pop(key, None)
        elif kind == "rename" and key in inner:
            name = draw.choice((f"module.{key}", "model", "state_dict", 5, str(key).replace("swinViT.", "")))
            inner[name] = inner.pop(key)
        else:
            inner[draw.choice(("model", "state_dict", "format", "ema", "x", 5))] = new
    path = place / "weights.pt"
    torch.save(content, path)
    return _load(path)


# --- a run's log ---


def _lines() -> str:
    return "".join(json.dumps({"event": "train", "step": step, "loss": 1 / step}) + "\n" for step in range(1, 7))


def _damaged_log(draw: Draw, place: Path, text: str) -> str:
    """A log never keeps a run from resuming; what is intact in it up to the checkpoint stays."""
    more = ("17", "null", "{}", "[]", '{"step": "3"}', '{"step": null}', '{"step": 3', '{"step": 1e999}', '"x"')
    data = mutate_text(draw, text, more).encode("utf-8", "surrogatepass")
    if draw.chance(0.5):
        data = mutate_bytes(draw, data)
    (place / log.LINES).write_bytes(data)
    step = draw.choice((0, 3, 6))
    whole = [line for line in text.splitlines() if json.loads(line)["step"] <= step]
    kept_before = [line for line in whole if line.encode() in data.split(b"\n")]
    log.Log(place, step).close()
    lines = log.read(place)
    missing = [line for line in kept_before if json.loads(line) not in lines]
    if missing:
        raise Fault(f"lines of the log were lost: {missing[:2]}")
    return "gone on"
