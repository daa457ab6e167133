"""The cases of a datalist, as training and validation see them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

import numpy as np
import torch
from rich.console import Console

from .. import distributed
from ..imaging.nifti import read_nifti
from ..labels import Labels
from ..names import say
from ..preprocessing import Preprocessing
from . import archives, cache, datalist, transforms
from .datalist import Case
from .images import BadCase, ReadCase
from .options import Data
from .stream import WINDOW, BatchOrder, Draws, load, random_state


@dataclass(frozen=True)
class ValidationCase:
    """A case that is not trained on.

    Attributes:
        name: of the case.
        load: returns the whole case on the preprocessed grid, ``{"image": float32 (C, *S), "label": uint8 (1, *S)}`` as
            plain
            tensors, which may be cached: do not write into them. Without labels there is only the image. Raises
            `ValueError` if the case cannot be used.
    """

    name: str
    load: Callable[[], dict[str, torch.Tensor]]


class Dataset:
    """Endless batches, and cases to validate on.

    Attributes:
        batches_per_epoch: batches in one pass over the cases, on each rank.
        validation: the cases that are not trained on, by name; the same on every rank.
    """

    def __init__(
        self,
        data: Data,
        cases: tuple[list[Case], list[Case]],
        read: ReadCase,
        preprocessing: Preprocessing,
        roi: Sequence[int],
        labels: Labels | None,
        seed: int,
    ) -> None:
        self._data = data
        self._seed = seed
        training, held_out = cases
        labelled = () if labels is None else set(itertools.chain(*labels.groups.values()))
        self._draw = transforms.draw(data, roi, labels is not None)
        self._prepare = transforms.for_cropping(read, preprocessing, data, roi, labelled)
        recipe = {"preprocessing": asdict(preprocessing), "values": sorted(read.values or ())}
        crops = {"roi": list(roi), "crop": data.crop, "threshold": data.image_threshold, "labelled": sorted(labelled)}
        # The window of the smart cache is created when a stream begins, for the epoch in which it begins.
        where = "none" if data.cache == "smart" else data.cache
        self._cases = training
        if data.cache == "smart":
            self._cases = [training[place] for place in random_state(seed, WINDOW).permutation(len(training))]
        self._training = cache.kept(training, self._prepare, where, data.cache_folder, {**recipe, **crops})
        whole = transforms.for_validation(read, preprocessing)
        self._held_out = cache.kept(held_out, whole, where, data.cache_folder, recipe)
        self.validation = [ValidationCase(case.name, self._loader(place)) for place, case in enumerate(held_out)]
        self._streams: list[Generator[dict[str, torch.Tensor]]] = []

    @property
    def batches_per_epoch(self) -> int:
        return self._order().batches_per_epoch

    def stream(self, start: int) -> Iterator[dict[str, torch.Tensor]]:
        """Batches number `start`, `start` + 1, …: ``{"image": float32 (B, C, *roi), "label": uint8 (B, 1, *roi)}``.

        B is batch_size × crops_per_volume; without labels there is only the image. A batch depends on the seed, its
        number, the rank and the number of ranks.

        Raises:
            ValueError: a case cannot be used; the message names its file.
        """
        stream = self._windows(start) if self._data.cache == "smart" else self._batches(start)
        self._streams.append(stream)
        return stream

    def close(self) -> None:
        """End the processes and threads of all streams."""
        for stream in self._streams:
            stream.close()
        self._streams.clear()

    def fill(self, console: Console | None) -> None:
        """Preprocess the cases that are cached; with a cache on disk, each rank does its share."""
        cases: Sequence[int] = range(len(self._cases))
        if self._data.cache == "disk":
            cases = distributed.share(cases)
        error = None
        try:
            cache.fill(self._training, cases, self._data.workers, console if distributed.is_first() else None)
        except BadCase as bad:
            error = str(bad)
        # All ranks end alike: one that continued would wait for the others until it timed out.
        first = next((text for text in distributed.gather(error) if text is not None), None)
        if first is not None:
            raise BadCase(first)

    def _order(self) -> BatchOrder:
        count = len(self._cases)
        if self._data.cache == "smart":
            count = min(count, self._data.smart_cases)
        return BatchOrder(count, self._data.batch_size, self._seed, distributed.rank(), distributed.ranks())

    def _batches(self, start: int) -> Generator[dict[str, torch.Tensor]]:
        batches = map(self._order().batch, itertools.count(start))
        draws = Draws(self._training, self._draw, self._seed)
        yield from load(draws, batches, self._data.workers, self._data.prefetch)

    def _windows(self, start: int) -> Generator[dict[str, torch.Tensor]]:
        order = self._order()
        epoch = start // order.batches_per_epoch
        window = cache.Rolling(
            self._cases, self._prepare, order.cases, self._data.smart_replaced, epoch, max(self._data.workers, 1)
        )
        try:
            window.start()
            while True:
                end = (epoch + 1) * order.batches_per_epoch
                batches = map(order.batch, range(start, end))
                draws = Draws(window, self._draw, self._seed)
                # The workers of an epoch are forked, and see what this process holds in that epoch.
                yield from load(draws, batches, self._data.workers, self._data.prefetch)
                window.update_cache()
                start, epoch = end, epoch + 1
        finally:
            window.shutdown()

    def _loader(self, place: int) -> Callable[[], dict[str, torch.Tensor]]:
        return lambda: cache.visit(self._held_out, place)


def _check_labelled(cases: tuple[list[Case], list[Case]], labels: Labels, data: Data) -> None:
    """Raise `ValueError` if no case to train on, or none to validate on, has a voxel of a class.

    Usually it reads one label of each group. A label that cannot be read is reported later, where it is used.
    """
    classes = sorted(set(itertools.chain(*labels.groups.values())))
    for group, purpose in zip(cases, ("train", "validate"), strict=True):
        found: set[float] = set()
        for case in group:
            assert case.label is not None  # the datalist was read for labels
            try:
                values, _ = read_nifti(case.label, data.largest)
            except BadCase:
                break
            if np.isin(values, classes).any():
                break
            found.update(np.unique(values).tolist())
        else:
            if group:
                names = ", ".join(f"{name} {values}" for name, values in labels.groups.items())
                held = ", ".join(f"{value:g}" for value in sorted(found)[:10])
                raise ValueError(
                    f"labels.classes: none of the {len(group)} cases to {purpose} on has a voxel of {names}: their "
                    f"labels, such as {group[0].label}, hold {held}"
                )


def open_dataset(
    data: Data,
    preprocessing: Preprocessing,
    roi: Sequence[int],
    labels: Labels | None,
    seed: int,
    *,
    channels: int | None = None,
    console: Console | None = None,
) -> Dataset:
    """The cases of `data`, checked; on all ranks.

    Args:
        roi: extents of the crops, in voxels.
        labels: what the label maps hold; None for training without labels.
        seed: for every draw.
        channels: channels of the images; None accepts any number.
        console: shows the progress of preprocessing cases that are cached.

    Raises:
        ValueError: the datalist or a case that is cached (in memory or on disk) cannot be used; the message names its
            entry and file. Or no label has a voxel of a class.
    """
    if len(roi) != 3 or any(extent < 1 for extent in roi):
        raise ValueError(f"roi is {tuple(roi)}; accepted are three extents in voxels")
    classes = set() if labels is None else set(itertools.chain(*labels.groups.values()))
    if classes & set(data.background):
        raise ValueError(f"background is {data.background}; accepted are values of no class")
    values = None if labels is None else {0, *data.background, *classes}
    if archives.is_archive(data.datalist):
        tell = partial(say, console) if console else lambda text: None
        data = replace(data, datalist=distributed.first(partial(archives.datalist_in, data.datalist, tell)))
    cases = datalist.read(data, labels is not None, channels)
    if labels is not None:
        distributed.first(lambda: _check_labelled(cases, labels, data))
    dataset = Dataset(data, cases, ReadCase(values, channels, data.largest), preprocessing, roi, labels, seed)
    if data.cache in ("memory", "disk"):
        dataset.fill(console)
    return dataset
