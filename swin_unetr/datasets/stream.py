"""Numbered batches: what is in each, and the processes that draw them."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from monai.data import Dataset
from monai.transforms import Compose
from torch.utils.data import DataLoader, default_collate
from torch.utils.data import Dataset as TorchDataset

from ..interruption import SIGNALS
from .cache import one_thread, visit

ORDER, DRAW, WINDOW = range(3)
"""Purposes of random numbers: streams for different purposes must differ under one seed."""


def random_state(seed: int, purpose: int, number: int = 0) -> np.random.RandomState:
    """A generator that depends only on its arguments."""
    return np.random.RandomState(np.random.SeedSequence([seed, purpose, number]).generate_state(4))


@dataclass(frozen=True)
class BatchOrder:
    """Which case each place of each batch holds.

    An epoch is one pass over `cases`, in its own order; if the last batch is not full, the order starts over. The batch
    of all ranks together depends only on its size, and each rank has its part of it: more ranks with smaller batches
    draw the same.

    Attributes:
        cases: cases in an epoch.
        batch_size: cases in a batch on each rank.
        rank: the rank whose part this is.
        ranks: how many there are.
    """

    cases: int
    batch_size: int
    seed: int
    rank: int = 0
    ranks: int = 1

    @property
    def batches_per_epoch(self) -> int:
        return -(-self.cases // (self.batch_size * self.ranks))

    def batch(self, number: int) -> list[tuple[int, int]]:
        """This rank's part of batch `number`: for each place the case, and the number of the draw."""
        epoch, within = divmod(number, self.batches_per_epoch)
        order = random_state(self.seed, ORDER, epoch).permutation(self.cases)
        extent = self.batch_size * self.ranks
        places = range(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
        return [(int(order[(within * extent + place) % self.cases]), number * extent + place) for place in places]


class Draws(TorchDataset):
    """Crops of a case by ``(case, draw)``, on which alone they depend; or the error that prevented them from being
    drawn.

    An error is returned, not raised: raised in another process, an exception loses its type.
    """

    def __init__(self, cases: Dataset, draw: Compose, seed: int) -> None:
        self.cases = cases
        self.draw = draw
        self.seed = seed

    def __getitem__(self, place: tuple[int, int]) -> list[dict[str, torch.Tensor]] | ValueError:
        case, number = place
        try:
            item = visit(self.cases, case)
        except ValueError as error:
            return error
        self.draw.set_random_state(state=random_state(self.seed, DRAW, number))
        return self.draw(item)


def collate(draws: Sequence[Any]) -> dict[str, torch.Tensor] | ValueError:
    """The crops of all `draws` as one batch; or the first error, if there is one."""
    error = next((draw for draw in draws if isinstance(draw, ValueError)), None)
    return error or default_collate([crop for draw in draws for crop in draw])


def load(draws: Draws, batches: Iterable[list[tuple[int, int]]], workers: int, prefetch: int) -> Iterator[dict]:
    """Each of `batches`, drawn by `workers` processes, or in this process if that is 0.

    Raises:
        ValueError: a case cannot be used.
    """
    loader = DataLoader(
        draws,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        # Workers share the cases in memory, which only works with fork.
        multiprocessing_context="fork" if workers else None,
        pin_memory=torch.cuda.is_available(),
        # The loader seeds its workers from it. Nothing of ours draws from those seeds, and PyTorch's own generator,
        # which training depends on, stays where it is.
        generator=torch.Generator(),
        worker_init_fn=_leave_signals_to_training,
    )
    step: Callable = next if workers else _next_on_one_thread
    drawn = iter(loader)
    try:
        while (batch := step(drawn, None)) is not None:
            if isinstance(batch, ValueError):
                raise batch
            yield batch
    finally:
        del drawn  # ends the workers, which the traceback of an error would keep alive


def _leave_signals_to_training(worker: int) -> None:
    """A scheduler that ends a job signals all of its processes: workers must survive until training has saved."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _next_on_one_thread(batches: Iterator, default: None) -> Any:
    with one_thread():
        return next(batches, default)
