"""Where preprocessed cases are kept between visits: MONAI's caching datasets, filled and read safely."""

from __future__ import annotations

import hashlib
import json
import math
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import monai
import torch
from monai.data import CacheDataset, Dataset, PersistentDataset, SmartCacheDataset
from monai.transforms import Compose
from monai.utils import convert_to_tensor
from rich.console import Console
from rich.progress import Progress

from .. import files
from ..foreign import origin, reason
from .datalist import Case
from .images import BadCase

FORMAT = "swin-unetr cached case 1"


def kept(cases: Sequence[Case], transform: Compose, where: str, folder: Path | None, recipe: Any) -> Dataset:
    """`cases` after the deterministic `transform`, kept in memory, on disk or not at all.

    Args:
        where: memory, disk or none.
        recipe: what `transform` does, as plain values; each case on disk belongs to one recipe.
    """
    if where == "memory":
        return CacheDataset(cases, transform, progress=False, runtime_cache=True)
    if where == "disk":
        assert folder is not None  # options with cache "disk" have one
        return OnDisk(cases, transform, folder, recipe)
    return Dataset(cases, transform)


class OnDisk(PersistentDataset):
    """Cases as files of plain tensors, which are read with ``weights_only=True``.

    A file belongs to one state of the case's files (path, size, time of change) and one recipe; another state or recipe
    has another file. A truncated file is written again.
    """

    def __init__(self, cases: Sequence[Case], transform: Compose, folder: Path, recipe: Any) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise NotKept(folder, error) from error
        self.folder = folder
        self.recipe = json.dumps([FORMAT, monai.__version__, recipe], sort_keys=True, default=str)
        super().__init__(cases, transform, folder, hash_func=self.identity, weights_only=True)

    def identity(self, case: Case) -> bytes:
        state = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in case.files]
        return hashlib.sha256(json.dumps([state, self.recipe]).encode()).hexdigest().encode()

    def _cachecheck(self, case: Case) -> Any:
        path = self.folder / f"{self.identity(case).decode()}.pt"
        # Left by a run of an earlier version that was killed while it copied the file into place.
        if path.is_file() and not zipfile.is_zipfile(path):
            warnings.warn(f"{path}: is not a complete cache file; the case is preprocessed again", stacklevel=2)
            path.unlink(missing_ok=True)
        if path.is_file():
            return super()._cachecheck(case)
        # MONAI would first write into the folder for temporary files; if that is full, PyTorch aborts the process.
        item = self._pre_transform(deepcopy(case))
        try:
            with files.replacing(path) as file:
                torch.save(convert_to_tensor(item, convert_numeric=False, track_meta=self.track_meta), file)
        except OSError as error:
            raise NotKept(self.folder, error) from error
        return item


class NotKept(BadCase):
    """The cache on disk cannot store a case, whose own files are fine."""

    def __init__(self, folder: Path, error: OSError) -> None:
        super().__init__(folder, error)
        self.folder, self.error = folder, error

    def __str__(self) -> str:
        return (
            f"data.cache_folder: {self.folder} cannot be written to: {reason(self.error)}; accepted is a folder with "
            "room for all cases, or another data.cache"
        )


class Rolling(SmartCacheDataset):
    """A window of cases in memory, part of which is replaced by the next cases after each epoch.

    The window of an epoch depends only on the epoch's number, so that a run can start at any epoch.

    Args:
        size: cases in the window.
        rate: fraction of them that is replaced.
        epoch: the epoch to start with.
    """

    def __init__(
        self, cases: Sequence[Case], transform: Compose, size: int, rate: float, epoch: int, threads: int
    ) -> None:
        first = epoch * min(math.ceil(size * rate), len(cases) - size) % len(cases)
        with warnings.catch_warnings():
            # A window over all cases is a plain cache: MONAI warns of what is intended.
            warnings.filterwarnings("ignore", message="cache_num is greater or equal than dataset length")
            super().__init__(
                [*cases[first:], *cases[:first]],
                transform,
                replace_rate=rate,
                cache_num=size,
                num_init_workers=threads,
                num_replace_workers=threads,
                progress=False,
                shuffle=False,
                copy_cache=False,
            )

    def _load_cache_item(self, idx: int) -> Any:
        """A case that cannot be used is replaced by its error, which is raised where it is drawn: raised here, it would
        end MONAI's thread and leave the training waiting forever."""
        try:
            return super()._load_cache_item(idx)
        except Exception as error:
            return _bad(error, self.data[idx])


def fill(dataset: Dataset, cases: Sequence[int], threads: int, console: Console | None) -> None:
    """Visit `cases` once, so that they are cached and unusable ones are found before training begins.

    Raises:
        BadCase: a case cannot be used.
    """
    with one_thread(), ThreadPool(max(threads, 1)) as pool:
        visits = pool.imap(partial(visit, dataset), cases)
        with Progress(console=console, transient=True, disable=console is None) as progress:
            for _ in progress.track(visits, total=len(cases), description="preprocessing"):
                pass


def visit(dataset: Dataset, index: int) -> Any:
    """Case number `index` of `dataset`.

    Raises:
        BadCase: it cannot be used; the message names its file.
    """
    try:
        item = dataset[index]
    except Exception as error:
        raise _bad(error, dataset.data[index]) from error
    if isinstance(item, BadCase):
        raise item
    return item


def _bad(error: Exception, case: Case) -> BadCase:
    """The cause of `error`, which MONAI's transforms wrap, with the name of its case."""
    why = origin(error)
    if isinstance(why, NotKept):
        return why
    says = str(why).strip() or type(why).__name__
    if any(str(file) in says for file in case.files):
        return BadCase(says)
    return BadCase(f"{case.images[0]}: case {case.name!r} cannot be used: {says}")


@contextmanager
def one_thread() -> Iterator[None]:
    """Use one thread, as the worker processes do: with more, the last bits of sums over a volume differ."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
