"""A trained network from its checkpoint: the file is read once, and the network built once."""

from __future__ import annotations

import hashlib

import pytest
import torch

from swin_unetr import model
from swin_unetr.architecture import Architecture
from swin_unetr.prediction import ensemble
from swin_unetr.segmenter import Segmenter

from .segmenter import checkpoint


def test_what_is_loaded_is_what_was_checked(tmp_path, monkeypatch):
    """A running training may replace best.pt at any moment."""
    path = checkpoint(tmp_path / "best.pt")
    digest, load = hashlib.sha256(path.read_bytes()).hexdigest(), torch.load

    def load_later(*arguments, **options):
        checkpoint(path, seed=1)
        return load(*arguments, **options)

    expected = Segmenter.read(path).state
    monkeypatch.setattr(torch, "load", load_later)
    found = ensemble.load([path], torch.device("cpu"))
    assert found.files == {str(path): digest}
    state = found.networks[0].state_dict()
    assert all(torch.equal(state[name], value) for name, value in expected.items())


def test_the_network_is_built_once(tmp_path, monkeypatch):
    path, built = checkpoint(tmp_path / "best.pt"), []

    class Counted(model.SwinUNETR):
        def __init__(self, **options) -> None:
            built.append(options)
            super().__init__(**options)

    monkeypatch.setattr(model, "SwinUNETR", Counted)
    ensemble.load([path], torch.device("cpu"))
    assert len(built) == 1


@pytest.mark.parametrize("options", [{}, {"use_v2": True, "downsample": "mergingv2"}, {"spatial_dims": 2}], ids=str)
def test_a_network_built_with_weights_is_one_that_got_them_later(options):
    architecture = Architecture(feature_size=12, depths=(1, 1, 1, 1), **options)
    later = architecture.build()
    state = {name: value.contiguous() for name, value in later.state_dict().items()}
    at_once = architecture.build({n: v.double() if v.is_floating_point() else v for n, v in state.items()})
    for parts in (torch.nn.Module.named_parameters, torch.nn.Module.named_buffers):
        for (name, expected), (other, found) in zip(parts(later), parts(at_once), strict=True):
            assert name == other
            assert torch.equal(found, expected)
            assert (found.dtype, found.stride()) == (expected.dtype, expected.stride())
            assert (type(found), found.requires_grad) == (type(expected), expected.requires_grad)
