"""`swin-unetr predict`: segment any number of images, with organ volumes and a report."""

from __future__ import annotations

import datetime
import math
import os
import platform
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial, reduce
from pathlib import Path
from typing import Literal

import monai
import numpy as np
import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from monai.transforms import Compose
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import swin_kernels

from . import distributed, imaging, lock
from .files import GIB, naming, replace
from .foreign import origin
from .imaging import dicom
from .interruption import Interrupted, status
from .names import say, some
from .prediction import ensemble as ensembles
from .prediction import report, volumes
from .prediction.ensemble import Ensemble, Mirrored
from .prediction.restore import Restored, axes_between
from .prediction.windows import Windows, slabs

WRITTEN = ("volumes.csv", "volumes.json", "report.html")
"""Files that cover all cases."""
ENTROPY = "entropy"
"""Folder of the entropy maps, inside the folder of results."""

PIECE = 16
"""Rows of the network's grid that are turned into labels at once: intermediate results of a few rows stay in caches."""


@dataclass
class PredictOptions:
    """Segment images.

    Writes into `out` a label map of each image in the image's own geometry (of DICOM a NIfTI file), volumes.csv,
    volumes.json and report.html. A case that cannot be segmented is reported, the others continue, and an earlier label
    map of it is kept. Under torchrun the cases are shared among ranks.

    Args:
        checkpoint: from `swin-unetr train`; of several, the mean decides.
        input: files (NIfTI, NRRD, MetaImage), folders of them, or folders of DICOM series.
        out: folder for the results.
        windows: how a volume is cut, and how much memory is used.
        mirror: axes of the network's volume along which mirrored copies are segmented, too, and averaged: [0, 1, 2]
            takes 8 times as long.
        entropy: write maps of the prediction's entropy into entropy/: 0 is certain, 1 is completely uncertain.
        identify: begin the names of DICOM series, and so those of their results, with the accession number (accession)
            or the patient's ID (patient); by default results contain no patient data except the names of folders.
        overwrite: replace existing results.
        largest: GiB that one image may take as float32 in its file, and while it is resampled to the network's spacing.
        device: cpu, cuda or cuda:N; by default a GPU if there is one.
    """

    checkpoint: list[Path]
    input: list[Path]
    out: Path = Path("predictions")
    windows: Windows = field(default_factory=Windows)
    mirror: tuple[int, ...] = ()
    entropy: bool = False
    identify: Literal["accession", "patient"] | None = None
    overwrite: bool = False
    largest: float = 16.0
    device: str | None = None

    def __post_init__(self) -> None:
        for name in ("checkpoint", "input"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty; accepted is one path or more")
        if len(set(self.mirror)) < len(self.mirror) or not set(self.mirror) <= {0, 1, 2}:
            raise ValueError(f"mirror is {tuple(self.mirror)}; accepted are different axes of (0, 1, 2)")
        if self.identify not in (None, *dicom.IDENTITIES):
            raise ValueError(f"identify is {self.identify!r}; accepted are {', '.join(dicom.IDENTITIES)} and null")
        if not self.largest > 0:
            raise ValueError(f"largest is {self.largest}; accepted is a size in GiB above 0")


def run(options: PredictOptions, console: Console | None = None) -> int:
    """Predict; returns the exit status: 0, 1 if a case could not be segmented, that of `interruption` after a signal.

    Raises:
        ValueError: a checkpoint or an input does not fit, results are there already, or `options.out` cannot be written
            to or is in use.
        OSError: writing failed, for example because the disk is full; tables and report of an earlier prediction are
            unchanged.
    """
    with distributed.job(options.device) as device:
        if not distributed.is_first():
            console = Console(quiet=True)
        return _run(options, device, console or Console())


def _run(options: PredictOptions, device: torch.device, console: Console) -> int:
    distributed.first(lambda: lock.check(options.out))
    left_out: list[tuple[Path, str]] = []
    sources = imaging.find(
        _once(options.input, partial(say, console, style="yellow")),
        options.largest,
        lambda path, why: left_out.append((path, why)),
        options.identify,
    )
    outputs = {source.name: options.out / f"{source.name}{imaging.output_suffix(source)}" for source in sources}
    with ExitStack() as until_written:
        distributed.first(lambda: _prepare(options, sources, outputs.values(), until_written))
        ensemble = ensembles.load(options.checkpoint, device)
        done, failed, signals = _cases(sources, outputs, ensemble, options, device, console)
        _show(done, failed, left_out, console)
        written = distributed.first(lambda: _write(done, failed, left_out, ensemble, options, device))
    if written:
        say(console, f"in {options.out}: {', '.join(written)}")
    else:
        say(
            console, f"no case was segmented; {', '.join(WRITTEN)} in {options.out} are of an earlier prediction", "red"
        )
    if signals:
        return status(signals[0])
    return 1 if failed else 0


def _once(paths: Sequence[Path], tell: Callable[[str], None]) -> list[Path]:
    """`paths` without those that lead to the same place as an earlier one: an image is one case, however often it is
    named."""
    by_place: dict[str, Path] = {}
    for path in paths:
        # Not `Path.resolve`, which raises for links that form a circle.
        first = by_place.setdefault(os.path.realpath(path), path)
        if first is not path:
            tell(f"input: {path} {'is there twice' if path == first else f'is the same as {first}'}; it is taken once")
    return list(by_place.values())


def _prepare(
    options: PredictOptions, sources: Sequence[imaging.Source], outputs: Collection[Path], until_written: ExitStack
) -> None:
    """Own the folder of the results by a context of `until_written`, and refuse results that would replace an image or,
    unless asked to, an earlier result."""
    until_written.enter_context(lock.owned(options.out, "prediction"))
    files = [*outputs, *(options.out / name for name in WRITTEN)]
    if options.entropy:
        files += [options.out / ENTROPY / path.name for path in outputs]
    images = {os.path.realpath(source.path) for source in sources}
    for path in files:
        if os.path.realpath(path) in images:
            raise ValueError(f"out: {path} is an image to segment; accepted is another folder")
    present = [path for path in files if path.exists()]
    if present and not options.overwrite:
        raise ValueError(f"out: {present[0]} is there already; accepted is another folder, or overwrite: true")
    if options.entropy:
        (options.out / ENTROPY).mkdir(exist_ok=True)


def _cases(
    sources: Sequence[imaging.Source],
    outputs: Mapping[str, Path],
    ensemble: Ensemble,
    options: PredictOptions,
    device: torch.device,
    console: Console,
) -> tuple[list[report.SegmentedCase], dict[str, str], list[int]]:
    """Segment `sources`; returns what is done, why the others failed, and the signals that arrived, of all ranks."""
    done: list[report.SegmentedCase] = []
    failed: dict[str, str] = {}
    signals: list[int] = []
    mine = distributed.share(sources)
    columns = (TextColumn("segmenting"), BarColumn(), MofNCompleteColumn(), TextColumn("ETA"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        for source in progress.track(mine):
            try:
                done.append(_case(source, outputs[source.name], ensemble, options, device))
            # One damaged file of many must not end the work, and libraries fail in many ways over damaged files.
            except Exception as error:
                why = origin(error)
                failed[source.name] = str(why).strip() if isinstance(why, (ValueError, OSError)) else repr(why)
            # What is done by then is included in the tables and the report.
            except Interrupted as error:
                signals.append(error.number)
                known = {case.name for case in done} | set(failed)
                failed |= {other.name: str(error) for other in mine if other.name not in known}
                break
    everywhere = distributed.gather((done, failed, signals))
    done = sorted((case for of_rank, _, _ in everywhere for case in of_rank), key=lambda case: case.name)
    failed = {name: why for _, of_rank, _ in everywhere for name, why in sorted(of_rank.items())}
    for name in failed:
        if outputs[name].exists():  # `_case` writes it last
            failed[name] += f"; {outputs[name].name} there is of an earlier prediction"
    return done, failed, [number for *_, of_rank in everywhere for number in of_rank]


def _case(
    source, output: Path, ensemble: Ensemble, options: PredictOptions, device: torch.device
) -> report.SegmentedCase:
    started = time.perf_counter()
    volume = source.read()
    notes = [*source.notes, *volume.notes]
    found = segment(
        volume, ensemble, options.windows, device, options.mirror, options.entropy, notes.append, options.largest
    )
    organs = volumes.measure(found.labels, volume.values[0], volume.affine, ensemble.labels)
    picture = report.picture(volume.values[0], found.labels, volume.affine, ensemble.labels)
    entropy = ""
    if found.entropy is not None:
        entropy = report.entropy_picture(found.entropy, found.labels, volume.affine)
        # In a separate folder: `evaluate` takes what lies beside label maps for label maps.
        _write_map(found.entropy, volume, options.out / ENTROPY / output.name)
    # Last, so that a case that fails keeps the earlier label map.
    _write_map(found.labels, volume, output)
    return report.SegmentedCase(
        name=source.name,
        source=str(source.path),
        output=output.name,
        shape=found.labels.shape,
        spacing=volume.spacing,
        organs=organs,
        warnings=volumes.warnings(organs, volume.spacing),
        notes=notes,
        seconds=time.perf_counter() - started,
        picture=picture,
        entropy=entropy,
    )


def _write_map(values: np.ndarray, volume: imaging.Volume, path: Path) -> None:
    with naming(path):
        imaging.write(values, volume, path)


@torch.inference_mode()
def segment(
    volume: imaging.Volume,
    ensemble: Ensemble,
    windows: Windows,
    device: torch.device,
    mirror: Sequence[int] = (),
    entropy: bool = False,
    say: Callable[[str], None] = lambda text: None,
    largest: float = math.inf,
) -> Restored:
    """Label map of `volume` on its own grid, and its entropy if asked for.

    Args:
        mirror: axes along which mirrored copies are segmented, too.
        say: is called with what a reader of the result should know about how it was made.
        largest: GiB that the image may take on the network's grid, and while it is resampled to it.

    Raises:
        ValueError: the volume has other channels than the networks, voxels of extents beyond any scanner, takes more
            than `largest` on the networks' grid, or has intensities there that are not finite; or the networks' output
            is not.
    """
    if len(volume.values) != ensemble.channels:
        raise ValueError(f"the image has {len(volume.values)} channels; the network takes {ensemble.channels}")
    # A copy: MONAI's transforms may write into their input, and `volume` is measured afterwards.
    image = MetaTensor(torch.tensor(volume.values), affine=torch.tensor(volume.affine))
    preprocessing = ensemble.preprocessing
    preprocessing.check_grid(image, largest)
    prepared = Compose([*preprocessing.geometry(("image",)), *preprocessing.scale()])({"image": image})["image"]
    if not prepared.isfinite().all():
        raise ValueError("the image's intensities are too large: some are not finite after preprocessing")
    grid = tuple(prepared.shape[1:])
    affine = prepared.affine.numpy().astype(np.float64)
    axes = axes_between(volume.affine, volume.values.shape[1:], affine, grid)
    classes = 4 * ensemble.labels.channels * math.prod(grid)  # bytes of the probabilities of all channels
    if axes is None and classes > largest * GIB:
        raise ValueError(
            f"the image's axes are not at right angles (a tilted gantry?), which takes {classes / GIB:.3g} GiB for "
            f"the classes of the whole volume at once; accepted are {largest:g} (largest)"
        )
    restored = Restored(volume.values.shape[1:], axes, ensemble.labels, entropy)
    # As MONAI's sliding window does where a volume is smaller than the window: zeros on both sides.
    lack = [max(0, extent - have) for extent, have in zip(ensemble.roi, grid, strict=True)]
    pad = [part for missing in reversed(lack) for part in (missing // 2, missing - missing // 2)]
    padded = F.pad(prepared.as_tensor().float()[None].to(device), pad)  # (1, C, *S)
    networks = [Mirrored(network, mirror) if mirror else network for network in ensemble.networks]
    inside = [slice(missing // 2, missing // 2 + extent) for missing, extent in zip(lack, grid, strict=True)]
    whole = []
    for first, logits in slabs(padded, networks, ensemble.labels.channels, ensemble.roi, windows, say):
        rows = inside[0] if lack[0] else slice(None)  # an axis that was padded has a single slab
        if not all(_is_finite(of_one) for of_one in logits):
            raise ValueError("the network's output for this image is not finite (NaN or infinite)")
        pieces = zip(*(of_one[0, :, rows, inside[1], inside[2]].split(PIECE, dim=1) for of_one in logits), strict=True)
        for number, piece in enumerate(pieces):  # each (channels, up to PIECE, *grid[1:]) of every network
            each = (ensemble.labels.probabilities(of_one[None])[0] for of_one in piece)
            probabilities = reduce(torch.add, each) / len(networks)
            if axes is None:
                whole.append(probabilities)
            else:
                restored.add(first + number * PIECE, probabilities)
    if axes is None:
        say("the image's axes are not at right angles (a tilted gantry?): the whole volume was interpolated at once")
        restored.add_whole(torch.cat(whole, dim=1), affine, volume.affine)
    return restored


def _is_finite(logits: torch.Tensor) -> bool:
    """Whether all values are finite, in one pass: minimum and maximum are NaN if any value is."""
    return all(math.isfinite(end) for end in torch.aminmax(logits))


def _write(
    done, failed, left_out, ensemble: Ensemble, options: PredictOptions, device: torch.device
) -> tuple[str, ...]:
    """Write tables and report, and return their names; a run that segmented nothing does not replace earlier ones."""
    if not done and any((options.out / name).exists() for name in WRITTEN):
        return ()
    prepared = (
        f"{name} {value}" for name, value in asdict(ensemble.preprocessing).items() if name != "crop_foreground"
    )
    how = {
        "checkpoints": "; ".join(f"{path}, SHA-256 {digest}" for path, digest in ensemble.files.items()),
        "windows": f"{' × '.join(map(str, ensemble.roi))} voxels, overlap {options.windows.overlap:g}, Gaussian",
        "mirrored axes": ", ".join(map(str, options.mirror)) or "none",
        "preprocessing": "; ".join(prepared),
        "device": f"{device}, {distributed.ranks()} rank(s)",
        "versions": f"swin-kernels {swin_kernels.__version__}, torch {torch.__version__}, MONAI {monai.__version__}, "
        f"Python {platform.python_version()}",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    contents = {**report.tables(done), "report.html": report.page(done, failed, how, ensemble.labels, left_out)}
    replace({options.out / name: contents[name] for name in WRITTEN})
    return WRITTEN


def _show(
    done: Sequence[report.SegmentedCase], failed: dict[str, str], left_out: Sequence[tuple[Path, str]], console: Console
) -> None:
    tell = partial(say, console)
    for case in done:
        organs = ", ".join(f"{organ.name} {organ.millilitres:,.1f} ml" for organ in case.organs)
        tell(f"{case.output}: {organs} ({case.seconds:.1f} s)")
        for text in (*case.warnings, *case.notes):
            tell(f"  {text}", "yellow")
    by_folder: dict[Path, list[str]] = {}
    for path, why in left_out:
        by_folder.setdefault(path.parent, []).append(f"{path.name} ({why})")
    for folder, files in by_folder.items():
        tell(f"{len(files)} file{'s' * (len(files) != 1)} left out of {folder}: {some(files)}", "yellow")
    for name, why in failed.items():
        tell(f"not segmented: {name}: {why}", "red")
