"""`swin-unetr evaluate`: score label maps against labels, with confidence intervals, and compare two runs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from . import lock
from .evaluation import label_maps, report, statistics
from .evaluation.scores import METRICS, Score, by_case, scores
from .foreign import BadFile, reading
from .labels import by_name
from .names import some

FORMAT = "swin-unetr evaluation 1"


@dataclass
class EvaluateOptions:
    """Score predicted label maps against labels.

    Writes scores.csv (one line per case and class), evaluation.json (everything), scores.png, and, if another run is
    given, comparison.png. A case that cannot be scored is reported and the others continue.

    Args:
        predictions: folder of predicted label maps (NIfTI, NRRD, MetaImage).
        labels: folder of labels; a prediction belongs to the label of the same name, or of that name before "_...".
        out: folder for the results; those of an earlier evaluation in it are overwritten.
        classes: label values by class name, such as {liver: [1, 2], cancer: 2}; classes may overlap. By default every
            value above 0 in the labels is a class, unless there are more than a label map would have.
        tolerance: distance in mm up to which surfaces agree, for NSD.
        resamples: number of bootstrap samples.
        confidence: level of the intervals.
        seed: for the bootstrap.
        compare: evaluation.json of another run on the same labels; differences are this run minus that.
        largest: GiB that one label map may take uncompressed.
    """

    predictions: Path
    labels: Path
    out: Path = Path("evaluation")
    classes: dict[str, list[int] | int] | None = None
    tolerance: float = 2.0
    resamples: int = 9999
    confidence: float = 0.95
    seed: int = 0
    compare: Path | None = None
    largest: float = 16.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.tolerance) and self.tolerance > 0):
            raise ValueError(f"tolerance is {self.tolerance}; accepted is a distance in mm above 0")
        if self.classes is not None:
            self.classes = {**by_name(self.classes)}
        if self.classes is not None and not (self.classes and all(self.classes.values())):
            raise ValueError(f"classes is {self.classes}; accepted is at least one class, each with a label value")
        if not self.largest > 0:
            raise ValueError(f"largest is {self.largest}; accepted is a size in GiB above 0")
        if self.classes is not None and statistics.MEAN in self.classes:
            raise ValueError(f"classes has {statistics.MEAN!r}, the name of the mean over classes; accepted is another")


def run(options: EvaluateOptions, console: Console | None = None) -> int:
    """Evaluate; returns the exit status: 0, or 1 if a case has no prediction or could not be scored.

    Raises:
        ValueError: no case can be scored, `options.compare` is not an evaluation of the same labels, or `options.out`
            cannot be written to or is in use.
        OSError: writing failed, for example because the disk is full; results of an earlier evaluation are unchanged.
    """
    console = console or Console()
    how = statistics.Bootstrap(options.resamples, options.confidence, options.seed)
    other = _read_other(options.compare) if options.compare else None
    with lock.owned(options.out, "evaluation"):
        return _run(options, other, how, console)


def _run(options: EvaluateOptions, other: Mapping | None, how: statistics.Bootstrap, console: Console) -> int:
    found = _score_cases(options, console)
    results = {"format": FORMAT, "options": asdict(options), **found}
    results["summary"] = {metric: statistics.summary(by_case(found["scores"], metric), how) for metric in METRICS}
    report.write(results, options.out)  # before the comparison, which may be refused
    if other is not None:
        results["comparison"] = _compare(results, other, options, how)
        report.write(results, options.out)
    report.show(results, options.out, console)
    return 1 if found["failed"] or found["without_prediction"] else 0


def _score_cases(options: EvaluateOptions, console: Console) -> dict[str, Any]:
    """The scores of all cases, and the cases without scores."""
    labels, predictions = label_maps.find(options.labels), label_maps.find(options.predictions)
    pairs = label_maps.pair(predictions, labels)
    if not pairs:
        raise ValueError(
            f"no prediction in {options.predictions} belongs to a label in {options.labels}: "
            f"{_examples(predictions)} against {_examples(labels)}"
        )
    given = by_name(options.classes or {})
    classes = given or _values_of([labels[name] for name in pairs], options.largest)
    scored: dict[str, dict[str, Score]] = {}
    failed: dict[str, str] = {}
    columns = (TextColumn("scoring"), BarColumn(), MofNCompleteColumn(), TextColumn("ETA"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        for name in progress.track(sorted(pairs)):
            try:
                prediction, label = (label_maps.read(of[name], options.largest) for of in (pairs, labels))
                label_maps.check_same_grid(prediction, label)
            except ValueError as error:
                failed[name] = str(error)
                continue
            scored[name] = scores(prediction.values, label.values, classes, label.spacing, options.tolerance)
    if not scored:
        raise ValueError("no case could be scored: " + "; ".join(f"{name}: {why}" for name, why in failed.items()))
    absent = [
        name
        for name in classes
        if not any(score[name].label_ml or score[name].prediction_ml for score in scored.values())
    ]
    if given and len(absent) == len(classes):
        raise ValueError(
            f"classes is {classes}, and no label and no prediction has any of these values; accepted are values that "
            "some have"
        )
    used = set(pairs.values())
    return {
        "classes": classes,
        "absent": absent,
        "scores": scored,
        "files": {name: {"prediction": str(pairs[name]), "label": str(labels[name])} for name in scored},
        "failed": failed,
        "without_prediction": sorted(set(labels) - set(pairs)),
        "without_label": sorted(str(path) for path in predictions.values() if path not in used),
    }


def _values_of(labels: Sequence[Path], largest: float) -> dict[str, list[int]]:
    """A class for each value above 0 in the files `labels`; scoring reports files that cannot be read.

    Raises:
        ValueError: there is no such value, or a file has so many that it must be an image.
    """
    values: set[int] = set()
    unread: list[str] = []
    for path in labels:
        try:
            found = label_maps.read(path, largest).values
        except ValueError as error:
            unread.append(str(error))
            continue
        values |= label_maps.check_values(path, found, label_maps.MOST_CLASSES, "; where these have more, name classes")
    classes = {str(value): [value] for value in sorted(values) if value > 0}
    if not classes:
        why = f": {some(unread, 1)}" if unread else ""
        raise ValueError(f"the labels have no value above 0: there is nothing to score{why}")
    return classes


def _read_other(path: Path) -> dict[str, object]:
    """The evaluation in a file, with its scores as `Score`."""
    try:
        with reading(path, says="is not an evaluation"):
            other = json.loads(path.read_text(encoding="utf-8"))
            if other["format"] != FORMAT:
                raise ValueError(f"format is {other['format']!r}; accepted is {FORMAT!r}")
            float(other["options"]["tolerance"])
            other["scores"] = {
                case: {
                    name: Score(**{key: math.nan if value is None else float(value) for key, value in score.items()})
                    for name, score in classes.items()
                }
                for case, classes in other["scores"].items()
            }
            strange = [case for case, classes in other["scores"].items() if set(classes) != set(other["classes"])]
            if strange:
                raise ValueError(f"case {strange[0]!r} has other classes than {list(other['classes'])}")
    except BadFile as error:
        raise ValueError(f"compare: {error}") from error
    return other


def _compare(
    results: Mapping, other: Mapping, options: EvaluateOptions, how: statistics.Bootstrap
) -> dict[str, object]:
    """Differences of the scores that both runs have.

    Raises:
        ValueError: the runs share no case, or were scored by other classes, tolerance or labels.
    """
    if other["classes"] != results["classes"]:
        raise ValueError(f"compare: {options.compare} scores classes {other['classes']}, this run {results['classes']}")
    if other["options"]["tolerance"] != options.tolerance:
        raise ValueError(
            f"compare: {options.compare} has an NSD at {other['options']['tolerance']} mm, this run at "
            f"{options.tolerance} mm"
        )
    ours, theirs = results["scores"], other["scores"]
    common = sorted(set(ours) & set(theirs))
    if not common:
        raise ValueError(
            f"compare: {options.compare} has none of this run's cases: {_examples(theirs)} against {_examples(ours)}"
        )
    for case in common:
        if any(
            not math.isclose(ours[case][name].label_ml, theirs[case][name].label_ml, rel_tol=1e-6)
            for name in ours[case]
        ):
            raise ValueError(f"compare: case {case!r} was scored against another label in {options.compare}")
    return {
        "with": str(options.compare),
        "cases": common,
        "only_here": sorted(set(ours) - set(common)),
        "only_there": sorted(set(theirs) - set(common)),
        "differences": {
            metric: statistics.summary(statistics.differences(by_case(ours, metric), by_case(theirs, metric)), how)
            for metric in METRICS
        },
    }


def _examples(names) -> str:
    return some(list(names))
