"""Options of training data: which cases, how they are cached, and what is drawn from them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

MOST = {"workers": 256, "prefetch": 256, "batch_size": 4096, "crops_per_volume": 4096}
"""No machine has more processes or memory than these need."""


@dataclass(frozen=True)
class Augmentation:
    """Random changes of a crop; a probability of 0 turns one off.

    Args:
        flip: probability of a mirror, for each axis.
        rotate90: probability of a rotation by 90, 180 or 270 degrees, in the first plane of axes that are equally long
            in the crop.
        affine: probability of a rotation about the third axis together with a zoom.
        degrees: largest rotation of `affine`, either way.
        zoom: largest relative change of size in `affine`, either way.
        intensity: probability of a change of scale, and of one of offset.
        intensity_scale: largest relative change of scale.
        intensity_shift: largest change of offset, in intensities after preprocessing.
        noise: probability of Gaussian noise.
        noise_std: largest standard deviation of the noise, in intensities after preprocessing.
    """

    flip: float = 0.2
    rotate90: float = 0.2
    affine: float = 0.0
    degrees: float = 15.0
    zoom: float = 0.2
    intensity: float = 0.1
    intensity_scale: float = 0.1
    intensity_shift: float = 0.1
    noise: float = 0.0
    noise_std: float = 0.1

    def __post_init__(self) -> None:
        for name in ("flip", "rotate90", "affine", "intensity", "noise"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; accepted is a probability from 0 to 1")
        for name in ("intensity_scale", "intensity_shift", "noise_std"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; accepted is 0 or more")
        if not 0 <= self.degrees <= 180:
            raise ValueError(f"degrees is {self.degrees}; accepted is 0 to 180")
        if not 0 <= self.zoom < 1:
            raise ValueError(f"zoom is {self.zoom}; accepted is 0 or more, below 1")


@dataclass(frozen=True)
class Data:
    """Cases of a datalist, and the batches drawn from them.

    Args:
        datalist: JSON file: the Medical Segmentation Decathlon's dataset.json, or a datalist of MONAI. Or an archive of
            the Decathlon, such as Task09_Spleen.tar, which is unpacked beside it, once.
        root: folder that the datalist's entries start from; by default the datalist's own. An entry that leads out of
            it is refused.
        trusted: more folders that entries may lead into, by an absolute path or a symbolic link.
        sections: lists in the datalist whose cases are used, such as [training, test] for pretraining.
        fold: which of the folds is for validation. By default the datalist's list "validation" does where it has one,
            else fold 0.
        folds: parts that cases are split into where the datalist gives them no fold; 1 trains on all of them and
            validates on none.
        split_seed: seed of that split.
        background: label values that count as background, besides 0. Any other value that belongs to no class is an
            error.
        largest: GiB that one image may take uncompressed in its file, and while it is resampled.
        cache: where preprocessed cases are kept: memory; disk (in `cache_folder`); smart, some in memory and part of
            them replaced after each epoch; none.
        cache_folder: folder of the cache on disk; runs may share it.
        smart_cases: cases in the smart cache; an epoch is one pass over them.
        smart_replaced: fraction of the smart cache that is replaced after each epoch.
        workers: processes that draw batches on each rank; 0 draws them in the training process.
        prefetch: batches that each worker draws ahead.
        batch_size: volumes in a batch on each rank.
        crops_per_volume: crops of each volume in a batch, so that the network sees batch_size × crops_per_volume.
        crop: labelled centres crops on labelled and other voxels (in pretraining: on any that are not air); anywhere
            draws them from the whole volume.
        positive: weight of crops that are centred on a labelled voxel.
        negative: weight of crops that are centred on an unlabelled one.
        image_threshold: crops are centred on unlabelled voxels only where the intensity after preprocessing, without
            its sign, is above this.
        augmentation: random changes of the crops.
    """

    datalist: Path
    root: Path | None = None
    trusted: tuple[Path, ...] = ()
    sections: tuple[str, ...] = ("training",)
    fold: int | None = None
    folds: int = 5
    split_seed: int = 0
    background: tuple[int, ...] = ()
    largest: float = 16.0
    cache: Literal["memory", "disk", "smart", "none"] = "memory"
    cache_folder: Path | None = None
    smart_cases: int = 32
    smart_replaced: float = 0.25
    workers: int = 2
    prefetch: int = 2
    batch_size: int = 1
    crops_per_volume: int = 4
    crop: Literal["labelled", "anywhere"] = "labelled"
    positive: float = 1.0
    negative: float = 1.0
    image_threshold: float = 0.0
    augmentation: Augmentation = field(default_factory=Augmentation)

    def __post_init__(self) -> None:
        least = {"folds": 1, "smart_cases": 1, "workers": 0, "prefetch": 1, "batch_size": 1, "crops_per_volume": 1}
        for name, lowest in least.items():
            if getattr(self, name) < lowest:
                raise ValueError(f"{name} is {getattr(self, name)}; accepted is {lowest} or more")
        for name, highest in MOST.items():
            if getattr(self, name) > highest:
                raise ValueError(f"{name} is {getattr(self, name)}; accepted is {highest} or fewer")
        if not 0 <= self.split_seed < 2**32:
            raise ValueError(f"split_seed is {self.split_seed}; accepted are 0 to {2**32 - 1}")
        strange = [value for value in self.background if not 0 <= value <= 255]
        if strange:
            raise ValueError(f"background is {tuple(self.background)}; accepted are label values from 0 to 255")
        if self.fold is not None and self.fold < 0:
            raise ValueError(f"fold is {self.fold}; accepted is 0 or more")
        if not self.sections:
            raise ValueError("sections is empty; accepted is one name of a list in the datalist or more")
        if not self.largest > 0:
            raise ValueError(f"largest is {self.largest}; accepted is a size in GiB above 0")
        if not 0 < self.smart_replaced <= 1:
            raise ValueError(f"smart_replaced is {self.smart_replaced}; accepted is above 0, up to 1")
        if self.cache not in ("memory", "disk", "smart", "none"):
            raise ValueError(f"cache is {self.cache!r}; accepted are 'memory', 'disk', 'smart' and 'none'")
        if self.cache == "disk" and self.cache_folder is None:
            raise ValueError("cache_folder is missing; cache 'disk' needs a folder")
        if self.crop not in ("labelled", "anywhere"):
            raise ValueError(f"crop is {self.crop!r}; accepted are 'labelled' and 'anywhere'")
        if not (self.positive >= 0 and self.negative >= 0 and 0 < self.positive + self.negative < math.inf):
            raise ValueError(
                f"positive and negative are {self.positive} and {self.negative}; accepted are 0 or more, not both 0"
            )
        if not 0 <= self.image_threshold < math.inf:
            raise ValueError(f"image_threshold is {self.image_threshold}; accepted is 0 or more")
