"""`swin-unetr pretrain`: train the encoder on volumes without labels, on one device or many."""

from __future__ import annotations

from dataclasses import dataclass, field
from os import environ
from pathlib import Path
from typing import Literal

from rich.console import Console

from . import interruption, lazily
from .architecture import Architecture
from .datasets import Data
from .preprocessing import Preprocessing
from .pretraining.options import Tasks
from .training.options import Optimization, Schedule, check_run

if lazily.MYPY:
    from . import datasets
    from .pretraining import self_supervision
    from .training import session
else:
    datasets = lazily.Module("swin_unetr.datasets")
    self_supervision = lazily.Module("swin_unetr.pretraining.self_supervision")
    session = lazily.Module("swin_unetr.training.session")
MOST = 65536
"""More fits into no machine's memory."""


@dataclass
class PretrainOptions:
    """Train the encoder of a Swin UNETR to recognise rotations and a crop's other view, and to fill in cutouts.

    Writes into `out`: best.pt (weights that `train --initial` starts from), checkpoints/ (to resume from), config.yaml,
    log.jsonl and tensorboard/. The same command continues where it was stopped. Under torchrun it trains on all ranks,
    and each view has the views of every rank as negatives.

    Args:
        data: cases, whose labels are not read, and how crops are taken from them.
        out: folder of this run.
        architecture: the network whose encoder is trained; the one to fine-tune later.
        preprocessing: what is done to every image; it maps intensities to 0..1.
        roi: voxels of a crop, multiples of 32, equal along the plane of tasks.rotation_axes.
        tasks: the weight of each task, and how views are made.
        embedding: length of the vectors that the contrastive task compares.
        validation_crops: crops of each validation case.
        optimization: how the network is optimised.
        schedule: how long to train, and when to validate and save.
        initial: weights to start from: from another pretraining, or published ones.
        resume: auto continues from the newest checkpoint in `out`; never refuses a folder that has any.
        seed: for weights, crops, views and dropout.
        device: cpu, cuda or cuda:N; by default a GPU if there is one.
    """

    data: Data
    out: Path
    architecture: Architecture = field(default_factory=Architecture)
    preprocessing: Preprocessing = field(default_factory=lambda: Preprocessing(window=(-1000.0, 1000.0)))
    roi: tuple[int, ...] = (96, 96, 96)
    tasks: Tasks = field(default_factory=Tasks)
    embedding: int = 512
    validation_crops: int = 2
    optimization: Optimization = field(
        default_factory=lambda: Optimization(learning_rate=4e-4, weight_decay=0.1)  # as published
    )
    schedule: Schedule = field(default_factory=lambda: Schedule(steps=100_000, warm_up=0.005))
    initial: Path | None = None
    resume: Literal["auto", "never"] = "auto"
    seed: int = 0
    device: str | None = None

    def __post_init__(self) -> None:
        check_run(self.architecture.spatial_dims, self.roi, self.seed, self.resume)
        self.tasks.check(self.roi)
        if self.preprocessing.intensity != "window":
            raise ValueError(
                f"preprocessing.intensity is {self.preprocessing.intensity!r}; accepted is 'window', since cutouts are "
                "filled with noise in 0..1"
            )
        for name in ("embedding", "validation_crops"):
            if not 1 <= getattr(self, name) <= MOST:
                raise ValueError(f"{name} is {getattr(self, name)}; accepted is a number ≥ 1, up to {MOST}")


def run(options: PretrainOptions, console: Console | None = None) -> int:
    """Pretrain; returns the exit status: 0 done, 1 if loss or gradient were not finite or a rank was lost, 75
    interrupted, 130 interrupted from the keyboard; then all is saved.

    Raises:
        ValueError: data or options do not fit, or `options.out` holds another run, cannot be written to or is in use.
        OSError: writing failed, for example because the disk is full.
    """
    crops = options.data.batch_size * options.data.crops_per_volume * int(environ.get("WORLD_SIZE", "1"))
    if crops < 2:
        raise ValueError(
            "data.batch_size and data.crops_per_volume are 1, on one rank; accepted are 2 crops a step or more, since "
            "contrast tells each from the others"
        )
    with interruption.exiting():
        lazily.load(session, self_supervision)
    return session.run(
        "pretrain",
        options,
        lambda console: datasets.open_dataset(
            options.data,
            options.preprocessing,
            options.roi,
            None,
            options.seed,
            channels=options.architecture.in_channels,
            console=console,
        ),
        lambda dataset: self_supervision.SelfSupervision(
            options.architecture,
            options.preprocessing,
            options.roi,
            options.tasks,
            options.embedding,
            dataset.validation,
            options.validation_crops,
            options.seed,
        ),
        console,
        lambda say: datasets.identify(options.data, labelled=False, channels=options.architecture.in_channels, say=say),
    )
