"""`load_pretrained`: published and home-made Swin UNETR weights, whatever their layout.

Layouts found in the wild, all of which are converted to that of `SwinUNETR`'s state dict:

- ``module.layers1.0…mlp.fc1…``: the encoder of MONAI's self-supervised ``model_swinvit.pt``, below
  ``state_dict``; what `SwinUNETR.load_from` reads.
- ``encoder.layers1.0.0…``: the encoder of "Disruptive Autoencoders" (https://arxiv.org/abs/2307.16896),
  below ``model``; what MONAI's `filter_swinunetr` reads.
- ``swinViT.…``, ``swin_vit.…`` and the decoder's own names: a whole model, or a pretraining model with
  its heads; ``module.`` and ``_orig_mod.`` before any of them from data parallel and compiled models.
- a checkpoint of ``swin-unetr train`` or ``pretrain``, of which the averaged weights are taken if it has any.
"""

from __future__ import annotations

import os
import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
from safetensors.torch import load_file

from swin_kernels.modules import MERGING_MODES

from . import checkpoints

_RENAMES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^(module\.|_orig_mod\.)+", ""),
        (r"^swin_vit\.", "swinViT."),
        (r"^encoder\.(layers\d\.0)\.0\.", r"swinViT.\1."),
        (r"^encoder\.(?=patch_embed\.|layers\d)", "swinViT."),
        (r"^(?=patch_embed\.|layers\d)", "swinViT."),
        (r"\.mlp\.fc([12])\.", r".mlp.linear\1."),
    )
)

# Only code older than MONAI 1.5.0, which changed the merging order, is known to write these names.
_BEFORE_MERGING_CHANGE = re.compile(r"\.mlp\.fc[12]\.|^(module\.)?encoder\.layers\d\.0\.0\.")

_MERGING_CLASSES = {kind.__name__: name for name, kind in MERGING_MODES.items()}
"""The `downsample` argument for classes of these names, ours and MONAI's."""


@dataclass(frozen=True)
class LoadReport:
    """What `load_pretrained` did. Names are the model's own, those of `unexpected` the file's.

    Attributes:
        source: where the weights came from.
        loaded: entries of the model's state dict that were copied.
        missing: entries of the model that the weights lack; they keep their values.
        unexpected: entries of the weights that the model lacks.
        mismatched: entries that both have with different shapes, which were not copied: name to the shapes in the
            weights and in the model.
        downsample: the order of patch merging that the weights were made for: as a checkpoint of ours says, or
            ``"merging_legacy"`` where the layout shows that they are older than MONAI 1.5.0, whose ``"merging"``
            gathers in another order; None if it is unknown.
    """

    source: str
    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
    downsample: str | None

    def __str__(self) -> str:
        total = len(self.loaded) + len(self.missing) + len(self.mismatched)
        lines = [
            f"load_pretrained: {self.source}",
            f"  loaded      {len(self.loaded):4d} of {total}: {_summary(self.loaded)}",
            f"  missing     {len(self.missing):4d}, left as they were: {_summary(self.missing)}",
            f"  unexpected  {len(self.unexpected):4d}, not used: {_summary(self.unexpected)}",
            f"  mismatched  {len(self.mismatched):4d}, left as they were: {_shapes(self.mismatched)}",
        ]
        if self.downsample:
            lines.append(f"  merging     made for downsample={self.downsample!r}")
        elif any(".downsample." in name for name in self.loaded):
            lines.append(
                "  merging     the file does not tell; made with MONAI < 1.5, it needs downsample='merging_legacy'"
            )
        return "\n".join(lines)


def load_pretrained(
    model: nn.Module, path_or_state: str | os.PathLike[str] | Mapping[str, object], *, verbose: bool = True
) -> LoadReport:
    """Load weights into a Swin UNETR or its encoder, ours or MONAI's, from any known layout.

    Entries are matched by name after both sides are converted to one layout, and copied where the shapes agree. Nothing
    is copied if this raises.

    Args:
        model: the model, which may be wrapped by data parallel or `torch.compile`.
        path_or_state: a ``.safetensors`` file; a file written by `torch.save`, read with ``weights_only=True``; or the
            content of such a file: a state dict, or one under the key ``state_dict`` or ``model``, or a checkpoint of
            ``swin-unetr train`` or ``pretrain``, of which the averaged weights are taken if it has any.
        verbose: print the report.

    Returns:
        What was loaded, missing, unexpected and mismatched.

    Raises:
        TypeError: `path_or_state` is neither a path nor a mapping.
        FileNotFoundError, PermissionError: the file does not exist or may not be read.
        ValueError: the file is damaged or needs more than tensors to load, nothing matched, two entries mean the same
            parameter, an entry is not a dense tensor of finite real numbers, more shapes disagree than agree (because
            of another ``feature_size``, for example), or the model refuses an entry.
    """
    content: object
    if isinstance(path_or_state, Mapping):
        source, content = "a state dict", path_or_state
    elif isinstance(path_or_state, (str, os.PathLike)):
        source, content = os.fspath(path_or_state), _read(path_or_state)
    else:
        raise TypeError(
            f"load_pretrained: path_or_state is a {type(path_or_state).__name__}; accepted is a path or a state dict"
        )
    if checkpoints.is_ours(content):
        weights, averaged = checkpoints.weights(content)
        content = {**content, "model": weights}
        source += ", averaged weights" if averaged else ""
    state = _unwrap(content, source)
    target = {_canonical(name): (name, value) for name, value in model.state_dict().items()}

    used: dict[str, str] = {}
    values: dict[str, torch.Tensor] = {}
    unexpected, mismatched = [], {}
    for key, value in state.items():
        canonical = _canonical(key) if isinstance(key, str) else None
        if canonical not in target or not isinstance(value, torch.Tensor):
            unexpected.append(str(key))
            continue
        if value.layout is not torch.strided or value.is_meta or value.is_complex() or value.is_quantized:
            raise ValueError(
                f"load_pretrained: {key!r} of {source} is {_kind(value)}; accepted are dense tensors of real numbers"
            )
        if value.is_floating_point() != target[canonical][1].is_floating_point():
            raise ValueError(
                f"load_pretrained: {key!r} of {source} is {_kind(value)}, the model's {target[canonical][1].dtype}; "
                "accepted are weights as floating-point numbers: of quantised ones, those before"
            )
        if value.is_floating_point() and not value.to(target[canonical][1].dtype).isfinite().all():
            raise ValueError(
                f"load_pretrained: {key!r} of {source} has values that are not finite as "
                f"{target[canonical][1].dtype}; accepted are finite weights"
            )
        if canonical in used:
            raise ValueError(f"load_pretrained: {used[canonical]!r} and {key!r} of {source} mean the same parameter")
        used[canonical] = key
        name, present = target[canonical]
        if value.shape == present.shape:
            values[name] = value
        else:
            mismatched[name] = (tuple(value.shape), tuple(present.shape))
    report = LoadReport(
        source=source,
        loaded=tuple(values),
        missing=tuple(name for canonical, (name, _) in target.items() if canonical not in used),
        unexpected=tuple(unexpected),
        mismatched=mismatched,
        downsample=_made_for(content, state),
    )
    if not used:
        raise ValueError(
            f"load_pretrained: no entry of {source} is one of {type(model).__qualname__}'s; "
            f"it has {_examples(unexpected)}, the model has {_examples([name for name, _ in target.values()])}"
        )
    if len(mismatched) >= len(values):
        raise ValueError(
            f"load_pretrained: {len(mismatched)} shapes of {source} differ from the model's and {len(values)} agree; "
            f"was it made with another feature_size, window_size or spatial_dims? {_shapes(mismatched)}"
        )
    _copy(model, values, source)
    if verbose:
        print(report)
    if report.downsample and (other := _other_merging(model, values, report.downsample)):
        age = ", older than MONAI 1.5," if not checkpoints.is_ours(content) else ""
        warnings.warn(
            f"load_pretrained: {source}{age} was made for another order of patch merging; the model's {other} loads it "
            "without an error and computes something else. Build the model as "
            f"swin_unetr.SwinUNETR(..., downsample={report.downsample!r})",
            stacklevel=2,
        )
    return report


def _copy(model: nn.Module, values: Mapping[str, torch.Tensor], source: str) -> None:
    """Copy `values` into entries of `model`: all of them, or none if the model refuses one."""
    before = {name: value.clone() for name, value in model.state_dict().items() if name in values}
    try:
        model.load_state_dict(values, strict=False)
    except RuntimeError as error:  # raised at the end, when what can be copied has been
        model.load_state_dict(before, strict=False)
        reasons = " ".join(line.strip() for line in str(error).splitlines()[1:])
        raise ValueError(f"load_pretrained: {source} does not fit the model: {reasons}") from error


def _made_for(content: object, state: Mapping[str, object]) -> str | None:
    """The order of patch merging that `state`, a part of `content`, was made for, as `downsample` names it."""
    if checkpoints.is_ours(content) and isinstance(content.get("architecture"), Mapping):
        return content["architecture"].get("downsample")
    return "merging_legacy" if any(_BEFORE_MERGING_CHANGE.search(str(key)) for key in state) else None


def _read(path: str | os.PathLike[str]) -> object:
    path = Path(path)
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (FileNotFoundError, PermissionError, MemoryError):
            raise
        # A header that is not JSON, a data type that PyTorch lacks, a folder: each fails in its own way.
        except Exception as error:
            raise ValueError(f"load_pretrained: {path} is not a safetensors file: {error}") from error
    try:
        return checkpoints.load(path).content
    except checkpoints.Damaged as error:
        raise ValueError(f"load_pretrained: {path} {error.reason}") from error


def _unwrap(content: object, source: str) -> Mapping[str, object]:
    """The state dict inside the checkpoint `content`, which came from `source`."""
    outer: list[object] = []
    while isinstance(content, Mapping):
        if any(content is one for one in outer):
            raise ValueError(f"load_pretrained: {source} holds itself; accepted is a state dict")
        outer.append(content)
        inner = next((content[key] for key in ("state_dict", "model") if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            return content
        content = inner
    raise ValueError(f"load_pretrained: {source} holds a {type(content).__name__}; accepted is a state dict")


def _kind(value: torch.Tensor) -> str:
    """What is special about a tensor: its layout, type or lack of data."""
    return f"a {'meta ' if value.is_meta else ''}tensor of layout {value.layout} and type {value.dtype}"


def _canonical(key: str) -> str:
    """`key` as `SwinUNETR` names it; unknown names are kept."""
    for pattern, replacement in _RENAMES:
        key = pattern.sub(replacement, key)
    return key


def _other_merging(model: nn.Module, loaded: Mapping[str, torch.Tensor], downsample: str) -> str:
    """The class that merges patches in `model` in another order, if it got weights from `loaded`; else ""."""
    for name, module in model.named_modules():
        weight = loaded.get(f"{name}.reduction.weight")
        # 8C inputs to 2C outputs is 3D. In 2D all orders are the same.
        if weight is not None and weight.shape[1] == 4 * weight.shape[0]:
            names = (kind.__name__ for kind in type(module).__mro__)
            if next((_MERGING_CLASSES[name] for name in names if name in _MERGING_CLASSES), None) != downsample:
                return type(module).__qualname__
    return ""


def _summary(names: Sequence[str]) -> str:
    """`names`, counted by the part of the model they belong to."""
    parts = Counter(_canonical(name).split(".")[0] for name in names)
    return ", ".join(f"{part} ({count})" for part, count in parts.items()) or "none"


def _shapes(mismatched: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]) -> str:
    shown = [f"{name} {file} for {model}" for name, (file, model) in list(mismatched.items())[:6]]
    more = len(mismatched) - len(shown)
    return "; ".join(shown + [f"and {more} more"] * (more > 0)) or "none"


def _examples(names: Sequence[str]) -> str:
    return f"{', '.join(names[:3])}, … ({len(names)})" if names else "none"
