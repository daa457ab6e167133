"""A MONAI bundle (https://docs.monai.io/en/latest/mb_specification.html), with what MONAI Label reads from it.

MONAI Label builds ``network_def``, loads ``models/model.pt`` into it, and runs ``preprocessing``, ``inferer`` and
``postprocessing`` (without saving). The labels it shows are those of ``channel_def`` of the first output; its keys are
values of the label map, as the specification has it for an output of the format ``segmentation``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser

from ..files import replacing
from ..labels import HOLDS_ABOVE
from ..segmenter import Segmenter
from . import bundle_texts
from .formats import Run

SCHEMA = "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"
OWN_NETWORK, MONAI_NETWORK = "swin_unetr.SwinUNETR", "monai.networks.nets.SwinUNETR"


@dataclass(frozen=True)
class BundleOptions:
    """The MONAI bundle.

    Args:
        name: name of the bundle and its folder; MONAI Label shows it.
        version: version of the bundle.
        modality: modality of the images, such as CT or MR; n/a leaves it open.
        overlap: overlap of neighbouring windows, as a fraction of their extents.
        windows: how many windows go through the network at once.
    """

    name: str = "swin_unetr_segmentation"
    version: str = "0.1.0"
    modality: str = "n/a"
    overlap: float = 0.5
    windows: int = 4

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\w[\w.-]*", self.name, re.ASCII):
            raise ValueError(f"bundle.name is {self.name!r}; accepted are letters, digits, '_', '-' and '.'")
        if not 0 <= self.overlap < 1:
            raise ValueError(f"bundle.overlap is {self.overlap}; accepted is 0 ≤ overlap < 1")
        if self.windows < 1:
            raise ValueError(f"bundle.windows is {self.windows}; accepted is a number ≥ 1")


@dataclass(frozen=True)
class Bundle:
    """A folder for `monai.bundle` and MONAI Label, on MONAI's network where that computes what this one does."""

    options: BundleOptions
    portable: bool
    packages: tuple[str, ...] = ()

    @property
    def output(self) -> str:
        return self.options.name

    def write(self, segmenter: Segmenter, folder: Path) -> None:
        _refuse_code(segmenter.description.plain())
        root = folder / self.output
        for name in ("configs", "models", "docs"):
            (root / name).mkdir(parents=True)
        with replacing(root / "models/model.pt") as file:  # given a path, PyTorch aborts the process on a full disk
            torch.save(dict(segmenter.state), file)
        _write_json(root / "configs/inference.json", self._inference(segmenter))
        _write_json(root / "configs/metadata.json", self._metadata(segmenter))
        labels = zip(segmenter.description.labels.written(), segmenter.description.labels.names, strict=True)
        values = {
            "name": self.options.name,
            "network": self._target,
            "own_network": OWN_NETWORK,
            "labels": "\n".join(f"| {value} | {name} |" for value, name in [(0, "background"), *labels]),
            "roi": " × ".join(map(str, segmenter.description.roi)),
        }
        readme = bundle_texts.README + (bundle_texts.PORTABLE if self.portable else bundle_texts.LEGACY)
        (root / "docs/README.md").write_text(readme.format(**values), encoding="utf-8")
        (root / "LICENSE").write_text(bundle_texts.LICENSE, encoding="utf-8")

    def load(self, folder: Path) -> Run:
        """The network as a reader of bundles builds it."""
        root = folder / self.output
        parser = ConfigParser()
        parser.read_config(root / "configs/inference.json")
        network = parser.get_parsed_content("network_def")
        network.load_state_dict(torch.load(root / "models/model.pt", weights_only=True))
        return network.eval()

    @property
    def _target(self) -> str:
        return MONAI_NETWORK if self.portable else OWN_NETWORK

    def _inference(self, segmenter: Segmenter) -> dict[str, Any]:
        """``configs/inference.json``."""
        return {
            "imports": ["$import glob"],
            "bundle_root": ".",
            "dataset_dir": "$@bundle_root + '/images'",
            "output_dir": "$@bundle_root + '/predictions'",
            "datalist": "$[{'image': path} for path in sorted(glob.glob(@dataset_dir + '/*.nii.gz'))]",
            "device": "$torch.device('cuda' if torch.cuda.is_available() else 'cpu')",
            "network_def": {"_target_": self._target, **segmenter.description.plain()["architecture"]},
            "network": "$@network_def.to(@device)",
            "preprocessing": _compose(_preprocessing(segmenter)),
            "dataset": {"_target_": "Dataset", "data": "@datalist", "transform": "@preprocessing"},
            "dataloader": {"_target_": "DataLoader", "dataset": "@dataset", "batch_size": 1, "num_workers": 0},
            "inferer": {
                "_target_": "SlidingWindowInferer",
                "roi_size": list(segmenter.description.roi),
                "sw_batch_size": self.options.windows,
                "overlap": self.options.overlap,
                "mode": "gaussian",
            },
            "postprocessing": _compose(_postprocessing(segmenter)),
            "handlers": [
                {
                    "_target_": "CheckpointLoader",
                    "load_path": "$@bundle_root + '/models/model.pt'",
                    "load_dict": {"model": "@network"},
                    "map_location": "@device",
                }
            ],
            "evaluator": {
                "_target_": "SupervisedEvaluator",
                "device": "@device",
                "val_data_loader": "@dataloader",
                "network": "@network",
                "inferer": "@inferer",
                "postprocessing": "@postprocessing",
                "val_handlers": "@handlers",
            },
            "run": ["$@evaluator.run()"],
        }

    def _metadata(self, segmenter: Segmenter) -> dict[str, Any]:
        """``configs/metadata.json``."""
        labels, channels = segmenter.description.labels, segmenter.description.architecture.in_channels
        classes = {str(value): name for value, name in zip(labels.written(), labels.names, strict=True)}
        tensor = {"type": "image", "modality": self.options.modality, "spatial_shape": list(segmenter.description.roi)}
        packages = ["nibabel", "pytorch-ignite", "einops"] + ([] if self.portable else ["swin-kernels"])
        return {
            "schema": SCHEMA,
            "version": self.options.version,
            "changelog": {self.options.version: "written by swin-unetr export"},
            **{f"{name}_version": _version(package) for name, package in _REQUIRED.items()},
            "required_packages_version": {name: version for name in packages if (version := _version(name))},
            "name": self.options.name,
            "task": f"segmentation of {', '.join(labels.names)}",
            "description": f"Swin UNETR that segments {', '.join(labels.names)}, by sliding window",
            "authors": "not stated",
            "copyright": "not stated",
            "intended_use": "research; not for diagnosis",
            "references": [
                "Hatamizadeh et al. Swin UNETR. BrainLes 2021. https://arxiv.org/abs/2201.01266",
                "Tang et al. Self-Supervised Pre-Training of Swin Transformers for 3D Medical Image Analysis. "
                "CVPR 2022. "
                "https://arxiv.org/abs/2111.14791",
            ],
            "network_data_format": {
                "inputs": {
                    "image": {
                        **tensor,
                        "format": "hounsfield" if self.options.modality == "CT" else "magnitude",
                        "num_channels": channels,
                        "dtype": "float32",
                        "value_range": [0, 1] if segmenter.description.preprocessing.intensity == "window" else [],
                        "is_patch_data": True,
                        "channel_def": {str(i): f"image {i}" if channels > 1 else "image" for i in range(channels)},
                    }
                },
                "outputs": {
                    "pred": {
                        **tensor,
                        "format": "segmentation",
                        "num_channels": 1,
                        "dtype": "uint8",
                        "value_range": [0, max(labels.written())],
                        "is_patch_data": True,
                        "channel_def": {"0": "background", **classes},
                    }
                },
            },
        }


def _refuse_code(value: Any) -> None:
    """Raise `ValueError` if text in `value` could be more than text to MONAI, which evaluates what starts with "$".

    It does so in both files of ``configs``, and looks up what starts with "@" or "%". A checkpoint must not bring code.
    """
    if isinstance(value, Mapping):
        _refuse_code([*value.keys(), *value.values()])
    elif isinstance(value, (list, tuple)):
        for item in value:
            _refuse_code(item)
    elif isinstance(value, str) and set("$@%") & set(value):
        raise ValueError(
            f"the checkpoint says {value!r}; accepted in a bundle is text without $, @ and %, MONAI's code"
        )


_REQUIRED = {"monai": "monai", "pytorch": "torch", "numpy": "numpy"}


def _version(package: str) -> str | None:
    """The installed version without a build's suffix; None if the package is not installed."""
    try:
        return metadata.version(package).partition("+")[0]
    except metadata.PackageNotFoundError:
        return None


def _compose(transforms: list[dict[str, Any]]) -> dict[str, Any]:
    return {"_target_": "Compose", "transforms": transforms}


def _preprocessing(segmenter: Segmenter) -> list[dict[str, Any]]:
    """What `Preprocessing` does, as MONAI's configurations write it."""
    how = segmenter.description.preprocessing
    steps: list[dict[str, Any]] = [{"_target_": "LoadImaged", "keys": "image", "ensure_channel_first": True}]
    if how.orientation is not None:
        steps.append({"_target_": "Orientationd", "keys": "image", "axcodes": how.orientation, "labels": None})
    if how.spacing is not None:
        steps.append({"_target_": "Spacingd", "keys": "image", "pixdim": list(how.spacing), "mode": "bilinear"})
    if how.intensity == "zscore":
        steps.append({"_target_": "NormalizeIntensityd", "keys": "image", "nonzero": True, "channel_wise": True})
    else:
        low, high = how.window
        limits = {"a_min": low, "a_max": high, "b_min": 0.0, "b_max": 1.0, "clip": True}
        steps.append({"_target_": "ScaleIntensityRanged", "keys": "image", **limits})
    return steps


def _postprocessing(segmenter: Segmenter) -> list[dict[str, Any]]:
    """From logits to a label map in the image's own geometry, as `Labels` decides it."""
    labels = segmenter.description.labels
    activation = {"sigmoid" if labels.overlapping else "softmax": True}
    steps: list[dict[str, Any]] = [{"_target_": "Activationsd", "keys": "pred", **activation}]
    if segmenter.description.preprocessing.geometry(["image"]):
        back = {"transform": "@preprocessing", "orig_keys": "image", "nearest_interp": False, "to_tensor": True}
        steps.append({"_target_": "Invertd", "keys": "pred", **back})
    if labels.overlapping:
        # The last of the classes present in a voxel: they are listed from the outermost in.
        last = (
            f"$lambda p: ((p > {HOLDS_ABOVE}) * torch.arange(1, len(p) + 1).view(-1, 1, 1, 1).to(p))"
            ".amax(0, keepdim=True)"
        )
        steps.append({"_target_": "Lambdad", "keys": "pred", "func": last})
    else:
        steps.append({"_target_": "AsDiscreted", "keys": "pred", "argmax": True})
    written = list(labels.written())
    steps.append(
        {
            "_target_": "MapLabelValued",
            "keys": "pred",
            "orig_labels": list(range(1, len(written) + 1)),
            "target_labels": written,
            "dtype": "$torch.uint8",
        }
    )
    steps.append(
        {
            "_target_": "SaveImaged",
            "keys": "pred",
            "output_dir": "@output_dir",
            "output_postfix": "seg",
            "output_dtype": "$np.uint8",
            "resample": False,
            "separate_folder": False,
        }
    )
    return steps


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=4, ensure_ascii=False) + "\n", encoding="utf-8")
