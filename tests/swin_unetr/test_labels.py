"""What channels mean: targets, decisions, label maps, and classes that cannot be told apart."""

from __future__ import annotations

import pytest
import torch

from swin_unetr.labels import Labels

BRATS = Labels({"whole tumour": [1, 2, 4], "tumour core": [1, 4], "enhancing tumour": [4]}, overlapping=True)
ORGANS = Labels({"liver": [1, 2], "spleen": [7]})


def one_hot(index: torch.Tensor, channels: int) -> torch.Tensor:
    """Logits ``(B, channels, *S)`` that decide for ``index (B, 1, *S)``."""
    return 10 * torch.nn.functional.one_hot(index[:, 0], channels).movedim(-1, 1).float() - 5


def test_classes_become_channels_and_channels_label_values():
    label = torch.tensor([0, 1, 2, 7, 9]).view(1, 1, 1, 5)
    assert ORGANS.channels == 3
    target = ORGANS.target(label)
    assert target.flatten().tolist() == [0, 1, 1, 2, 0]
    decided = ORGANS.decide(one_hot(target, 3))
    assert torch.equal(decided, target)
    assert ORGANS.label_map(decided).flatten().tolist() == [0, 1, 1, 7, 0]
    torch.testing.assert_close(ORGANS.probabilities(one_hot(target, 3)).sum(1), torch.ones(1, 1, 5))


def test_overlapping_classes_are_masks_and_the_innermost_is_written():
    label = torch.tensor([0, 1, 2, 4]).view(1, 1, 4)
    assert BRATS.channels == 3
    masks = BRATS.target(label.float())
    assert masks.tolist() == [[[0, 1, 1, 1], [0, 1, 0, 1], [0, 0, 0, 1]]]
    assert torch.equal(BRATS.decide(10 * masks - 5), masks)
    assert BRATS.written() == (2, 1, 4)
    assert torch.equal(BRATS.label_map(masks), label.to(torch.uint8))


@pytest.mark.parametrize(
    ("classes", "overlapping", "message"),
    [
        ({}, False, "accepted is one value from 1 to 255 or more a class"),
        ({"a": []}, False, "accepted is one value from 1 to 255 or more a class"),
        ({"a": [0]}, True, "accepted is one value from 1 to 255 or more a class"),
        ({"a": [256]}, False, "accepted is one value from 1 to 255 or more a class"),
        ({"a": [1], "b": [1, 2]}, False, "a value of two classes needs overlapping: true"),
        ({"core": [1], "whole": [1, 2]}, True, "core has only values .1. that later classes have too"),
    ],
)
def test_classes_that_cannot_be_told_apart_are_refused(classes, overlapping, message):
    with pytest.raises(ValueError, match=message):
        Labels(classes, overlapping)


@pytest.mark.parametrize("labels", [ORGANS, BRATS], ids=["softmax", "overlapping"])
def test_logits_and_their_probabilities_are_decided_alike(labels):
    logits = torch.tensor([-2.0, -0.5, 0.0, 0.0, 0.5, 3.0, 0.5]).view(1, 1, -1).repeat(1, 3, 1)
    logits[:, 1] = logits[:, 1].flip(-1)
    expected = labels.decide(logits)
    assert torch.equal(labels.decide_by_probabilities(labels.probabilities(logits)), expected)
    assert len(expected.unique()) > 1
