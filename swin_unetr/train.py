"""`swin-unetr train`: train or fine-tune a segmentation network, on one device or many."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from rich.console import Console

from . import interruption, lazily
from .architecture import Architecture
from .datasets import Data
from .labels import Labels
from .preprocessing import Preprocessing
from .training.options import Loss, Optimization, Schedule, Validation, check_run

if lazily.MYPY:
    from . import datasets
    from .training import segmentation, session
else:
    datasets = lazily.Module("swin_unetr.datasets")
    segmentation = lazily.Module("swin_unetr.training.segmentation")
    session = lazily.Module("swin_unetr.training.session")


@dataclass
class TrainOptions:
    """Train a segmentation network.

    Writes into `out`: best.pt (weights for prediction), checkpoints/ (to resume from), config.yaml, log.jsonl and
    tensorboard/. The same command continues where it was stopped. Under torchrun it trains on all ranks.

    Args:
        data: cases and how crops are taken from them.
        labels: the classes to segment.
        out: folder of this run.
        architecture: the network; its out_channels are the classes, and the background unless they overlap.
        preprocessing: what is done to every image, in prediction too.
        roi: voxels of a crop, multiples of 32.
        loss: what is minimised.
        optimization: how the network is optimised.
        schedule: how long to train, and when to validate and save.
        validation: how whole cases are segmented to choose the best weights.
        initial: weights to start from: from pretrain, from another training, or published ones.
        resume: auto continues from the newest checkpoint in `out`; never refuses a folder that has any.
        seed: for weights, crops, augmentation and dropout.
        device: cpu, cuda or cuda:N; by default a GPU if there is one.
    """

    data: Data
    labels: Labels
    out: Path
    architecture: Architecture = field(default_factory=Architecture)
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    roi: tuple[int, ...] = (96, 96, 96)
    loss: Loss = field(default_factory=Loss)
    optimization: Optimization = field(default_factory=Optimization)
    schedule: Schedule = field(default_factory=Schedule)
    validation: Validation = field(default_factory=Validation)
    initial: Path | None = None
    resume: Literal["auto", "never"] = "auto"
    seed: int = 0
    device: str | None = None

    def __post_init__(self) -> None:
        check_run(self.architecture.spatial_dims, self.roi, self.seed, self.resume)
        if any(extent < 32 or extent % 32 for extent in self.roi):
            raise ValueError(f"roi is {tuple(self.roi)}; accepted are 3 multiples of 32")
        if math.prod(self.roi) == 32**3:
            raise ValueError(
                f"roi is {tuple(self.roi)}, whose deepest feature map is a single voxel, of which instance norm makes "
                "zero; accepted is a roi with at least one axis of 64 or more"
            )
        channels = self.labels.channels
        if self.architecture.out_channels != channels:
            background = "" if self.labels.overlapping else " and the background"
            raise ValueError(
                f"architecture.out_channels is {self.architecture.out_channels}; accepted is {channels}: "
                f"{', '.join(self.labels.names)}{background}"
            )


def run(options: TrainOptions, console: Console | None = None) -> int:
    """Train; returns the exit status: 0 done, 1 if loss or gradient were not finite or a rank was lost, 75
    interrupted, 130 interrupted from the keyboard; then all is saved.

    Raises:
        ValueError: data or options do not fit, or `options.out` holds another run, cannot be written to or is in use.
        OSError: writing failed, for example because the disk is full.
    """
    with interruption.exiting():
        lazily.load(session, segmentation)
    return session.run(
        "train",
        options,
        lambda console: datasets.open_dataset(
            options.data,
            options.preprocessing,
            options.roi,
            options.labels,
            options.seed,
            channels=options.architecture.in_channels,
            console=console,
        ),
        lambda dataset: segmentation.Segmentation(
            options.architecture,
            options.labels,
            options.preprocessing,
            options.roi,
            options.loss,
            options.validation,
            dataset.validation,
        ),
        console,
        lambda say: datasets.identify(options.data, labelled=True, channels=options.architecture.in_channels, say=say),
    )
