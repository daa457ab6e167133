"""What the channels of a segmentation network mean: classes that exclude each other, or regions that overlap."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from . import lazily

if lazily.MYPY:
    import torch
else:
    torch = lazily.Module("torch")
HOLDS_ABOVE = 0.5
"""The probability above which an overlapping class is present: that of the logit 0."""


def by_name(classes: Mapping[str, Sequence[int] | int]) -> dict[str, list[int]]:
    """Label values by class name, each as a list; a single value may be given without one.

    Raises:
        ValueError: a class has no name.
    """
    if any(not str(name).strip() for name in classes):
        raise ValueError(f"classes is {dict(classes)}; accepted are classes with a name each")
    return {str(name): [values] if isinstance(values, int) else list(values) for name, values in classes.items()}


@dataclass(frozen=True)
class Labels:
    """Classes of a label map, and how a network's output becomes one.

    Args:
        classes: label values by class name, such as {spleen: 1, liver: [2, 3]}; the background's value is 0 and it is
            not listed. Overlapping classes are listed from the outermost in: {whole tumour: [1, 2, 4], tumour core:
            [1, 4], enhancing tumour: [4]}.
        overlapping: the channels are the classes, each with a sigmoid of its own; otherwise they are background and
            classes under one softmax.
    """

    classes: Mapping[str, Sequence[int] | int]
    overlapping: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", by_name(self.classes))
        values = [value for group in self.groups.values() for value in group]
        if not self.classes or not all(self.groups.values()) or any(not 0 < value < 256 for value in values):
            raise ValueError(f"classes is {dict(self.classes)}; accepted is one value from 1 to 255 or more a class")
        if not self.overlapping and len(set(values)) < len(values):
            raise ValueError(f"classes is {dict(self.classes)}; a value of two classes needs overlapping: true")
        if self.overlapping:
            self.written()

    @property
    def groups(self) -> dict[str, list[int]]:
        """Label values by class name, as a list each."""
        return by_name(self.classes)

    @property
    def channels(self) -> int:
        """Channels of the network's output."""
        return len(self.classes) + (not self.overlapping)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the classes, in the order of their channels."""
        return tuple(self.classes)

    def target(self, label: torch.Tensor) -> torch.Tensor:
        """What a loss or metric compares the output's channels with.

        Args:
            label: label values ``(B, 1, *S)``; values that belong to no class are background.

        Returns:
            For softmax the index of the channel, int64 ``(B, 1, *S)``; for overlapping classes a mask each, float32
            ``(B, classes, *S)``.
        """
        masks = [
            torch.isin(label, torch.tensor(values, dtype=label.dtype, device=label.device))
            for values in self.groups.values()
        ]  # each (B, 1, *S)
        if self.overlapping:
            return torch.cat(masks, dim=1).float()  # (B, classes, *S)
        index = torch.zeros_like(label, dtype=torch.int64)
        for channel, mask in enumerate(masks, start=1):
            index.masked_fill_(mask, channel)
        return index

    def decide(self, logits: torch.Tensor) -> torch.Tensor:
        """Which classes are present, from ``logits (B, channels, *S)``, in the form that `target` returns."""
        return self._decide(logits, 0.0)

    def decide_by_probabilities(self, probabilities: torch.Tensor) -> torch.Tensor:
        """As `decide`, from what `probabilities` returns."""
        return self._decide(probabilities, HOLDS_ABOVE)

    def _decide(self, scores: torch.Tensor, threshold: float) -> torch.Tensor:
        """The one rule: each overlapping class whose score is above `threshold`; otherwise the class of the highest
        score."""
        # On a CPU `argmax` takes four times as long as `max`.
        return (scores > threshold).float() if self.overlapping else scores.max(dim=1, keepdim=True).indices

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """Probability of each channel, in float32: ``(B, channels, *S)``."""
        return logits.float().sigmoid() if self.overlapping else logits.float().softmax(dim=1)

    def label_map(self, decided: torch.Tensor) -> torch.Tensor:
        """Label values uint8 ``(B, 1, *S)`` for what was decided; where classes overlap, that of the innermost."""
        if not self.overlapping:
            return torch.tensor([0, *self.written()], dtype=torch.uint8, device=decided.device)[decided]
        label = torch.zeros_like(decided[:, :1], dtype=torch.uint8)
        for channel, value in enumerate(self.written()):
            label.masked_fill_(decided[:, channel : channel + 1] > 0, value)
        return label

    def written(self) -> tuple[int, ...]:
        """The value that represents each class in a label map: the first that no later class has.

        Raises:
            ValueError: a class has no such value, so a label map could not distinguish it from the classes inside it.
        """
        groups = list(self.groups.items())
        chosen = []
        for place, (name, values) in enumerate(groups):
            inner = {value for _, later in groups[place + 1 :] for value in later}
            own = [value for value in values if value not in inner]
            if not own:
                raise ValueError(
                    f"classes: {name} has only values {sorted(values)} that later classes have too; accepted are "
                    "overlapping classes from the outermost in, each with a value of its own"
                )
            chosen.append(own[0])
        return tuple(chosen)
