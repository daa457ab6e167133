"""The same network on MONAI's own code: whether both agree, and how long each takes."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

import torch
from monai.losses import DiceCELoss
from monai.networks.nets import SwinUNETR as MonaiSwinUNETR
from monai.transforms import ResizeWithPadOrCrop, ScaleIntensityRange
from monai.utils import convert_to_tensor
from torch import nn

from .. import sliding, train
from .data import Patient

TOLERANCE = 1e-4
"""Largest difference of outputs over the largest output, and of gradients over their norm, that counts as equal."""


@dataclass(frozen=True)
class Timing:
    """Medians of interleaved runs of one task, in seconds, and the difference of the results."""

    work: str
    fused: float
    monai: float
    difference: float

    @property
    def agrees(self) -> bool:
        return self.difference <= TOLERANCE

    @property
    def speedup(self) -> float | None:
        """MONAI's time over the fused one; None unless the results agree."""
        return self.monai / self.fused if self.agrees else None


def compare(
    model: nn.Module,
    patient: Patient,
    options: train.TrainOptions,
    rounds: int,
    on_run: Callable[[], None] = lambda: None,
) -> list[Timing]:
    """Time a training step and a prediction of `model` beside MONAI's SwinUNETR with the same weights.

    Each round runs both, in alternating order; a first round is not counted.

    Args:
        model: the model trained with `options`, which is not changed.
        patient: the prediction takes the whole CT, the training step a batch of its middle window.
        rounds: counted runs of each task with each model.
        on_run: called after each of the `timed_runs(rounds)` runs.
    """
    device = next(model.parameters()).device
    monai = MonaiSwinUNETR(**asdict(options.architecture)).to(device)
    monai.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]  # PyTorch's stubs lack memory_format
    monai.load_state_dict(model.state_dict())
    pair = (copy.deepcopy(model), monai)
    low, high = options.preprocessing.window
    scaled = ScaleIntensityRange(low, high, 0.0, 1.0, clip=True)(torch.from_numpy(patient.ct[None]).float())
    image = torch.as_tensor(scaled).to(device)  # (1, X, Y, Z)
    label = torch.from_numpy(patient.labels[None]).to(device)
    size = options.data.batch_size * options.data.crops_per_volume
    batch = (
        convert_to_tensor(ResizeWithPadOrCrop(options.roi)(volume)).expand(size, -1, -1, -1, -1).contiguous()
        for volume in (image, label)
    )
    window, window_label = batch  # (B, 1, *roi)
    # Differences first, while the weights are still the same.
    prediction_difference = _prediction_difference(pair, window)
    step_difference = _gradient_difference(pair, window, window_label)
    steps = [_Step(m, options.optimization.learning_rate) for m in pair]
    step = _interleaved([partial(s, window, window_label) for s in steps], device, rounds, on_run)
    overlap = options.validation.overlap
    prediction = _interleaved([partial(_predict, m, image, options.roi, overlap) for m in pair], device, rounds, on_run)
    return [
        Timing("training step", step[0], step[1], step_difference),
        Timing("prediction", prediction[0], prediction[1], prediction_difference),
    ]


class _Step:
    """An optimisation step: DiceCE loss, AdamW."""

    def __init__(self, model: nn.Module, learning_rate: float) -> None:
        self.model = model.train()
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)

    def __call__(self, image: torch.Tensor, label: torch.Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        _loss(self.model, image, label).backward()
        self.optimizer.step()


def _loss(model: nn.Module, image: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    return DiceCELoss(to_onehot_y=True, softmax=True)(model(image), label)


@torch.inference_mode()
def _predict(model: nn.Module, image: torch.Tensor, roi, overlap: float) -> torch.Tensor:
    """Logits ``(1, classes, X, Y, Z)`` of ``image (1, X, Y, Z)``."""
    return sliding.logits_of(image[None], model.eval(), roi, 4, overlap)


def timed_runs(rounds: int) -> int:
    """How many runs `compare` makes: two models, two tasks, and a first round that does not count."""
    return 2 * 2 * (rounds + 1)


@torch.inference_mode()
def _prediction_difference(pair: tuple[nn.Module, nn.Module], window: torch.Tensor) -> float:
    fused, monai = (model.eval()(window) for model in pair)
    return ((fused - monai).abs().max() / monai.abs().max()).item()


def _gradient_difference(pair: tuple[nn.Module, nn.Module], image: torch.Tensor, label: torch.Tensor) -> float:
    gradients = []
    for model in pair:
        model.train().zero_grad()
        _loss(model, image, label).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    fused, monai = gradients
    return ((fused - monai).norm() / monai.norm()).item()


def _interleaved(
    work: list[Callable[[], object]], device: torch.device, rounds: int, on_run: Callable[[], None]
) -> list[float]:
    """Median seconds of each of `work` over `rounds` rounds."""
    seconds: list[list[float]] = [[] for _ in work]
    for r in range(rounds + 1):
        order = range(len(work)) if r % 2 else reversed(range(len(work)))
        for i in order:
            started = _now(device)
            work[i]()
            elapsed = _now(device) - started
            if r > 0:
                seconds[i].append(elapsed)
            on_run()
    return [statistics.median(s) for s in seconds]


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
