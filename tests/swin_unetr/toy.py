"""A task and batches that train in milliseconds, for tests of the loop around them; no files, no volumes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch import nn

from swin_unetr import checkpoints, distributed
from swin_unetr.training import state
from swin_unetr.training.loop import Loop
from swin_unetr.training.options import Optimization, Schedule

CPU = torch.device("cpu")


class Toy:
    """Regression of an image's mean by a convolution, dropout and a linear layer; a `Task`."""

    kind, figure, higher_is_better = "train", "error", False

    def __init__(self, noisy: bool = True, figures: list[float] | None = None) -> None:
        """
        Args:
            noisy: drop activations and draw numbers, which differ from rank to rank.
            figures: the results of validations, one after the other.
        """
        state.seed(0)
        self.network = self.core = nn.Sequential(
            nn.Conv3d(1, 4, 3),
            nn.Sequential(nn.Flatten(), nn.Dropout(0.3 * noisy), nn.Linear(4 * 2**3, 8), nn.Tanh()),
            nn.Linear(8, 1),
        )
        self.noisy, self.given = noisy, figures
        self.validations = 0

    def losses(self, network, batch, random):
        found = network(batch["image"])[:, 0]  # (B,)
        noise = 0.01 * random.random() if self.noisy else 0.0
        error = (found - batch["image"].mean(dim=(1, 2, 3, 4)) - noise).square().mean()
        return {"loss": error, "error": error}

    def scores(self, core):
        self.validations += 1
        torch.rand(3)  # validation may draw; training must not see it
        assert not core.training
        return {i: core(images(99, i, 1)).item() for i in distributed.share(range(5))}

    def figures(self, scores):
        if self.given is not None:
            return {"error": self.given[self.validations - 1]}
        merged = {i: value for part in scores for i, value in part.items()}
        return {"error": sum(value for _, value in sorted(merged.items()))}

    def content(self):
        return {"architecture": {}, "roi": [4, 4, 4]}


class WithHead(Toy):
    """A `Toy` whose core is followed by a layer that is trained but not kept."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.network = nn.Sequential(self.core, nn.Linear(1, 1))


class ToyBatches:
    """Batch k is `size` images for all ranks together, of which each rank has its part."""

    batches_per_epoch = 4

    def __init__(self, size: int = 6, *, before=lambda number: None) -> None:
        self.size, self.before = size, before

    def stream(self, start):
        torch.rand(5)  # what a DataLoader does when it starts: draw a seed from the global generator
        number = start
        while True:
            self.before(number)
            yield {"image": images(7, number, self.size)[distributed.rank() :: distributed.ranks()]}
            number += 1


def images(seed: int, number: int, size: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng([seed, number]).random((size, 1, 4, 4, 4), dtype=np.float32))


def loop(out: Path, task=None, batches=None, schedule=None, **optimization) -> Loop:
    return Loop(
        task or Toy(),
        batches or ToyBatches(),
        Optimization(**{"learning_rate": 1e-2, "weight_decay": 0.1, "precision": "fp32"} | optimization),
        schedule or Schedule(steps=12, warm_up=0.25, validate_every=4, checkpoint_every=3),
        out=out,
        device=CPU,
        seed=5,
        facts={"config": {}},
        console=Console(quiet=True),
    )


def resumed(out: Path, *arguments, **options) -> Loop:
    """A loop that resumes from the newest checkpoint in `out`."""
    made = loop(out, *arguments, **options)
    found = distributed.first(lambda: checkpoints.newest(out / "checkpoints"))
    made.restore(found[1])
    return made


def final(out: Path) -> dict:
    """The last checkpoint of a run."""
    return checkpoints.newest(out / "checkpoints")[1]
