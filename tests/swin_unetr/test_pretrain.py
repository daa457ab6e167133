"""Pretraining: views, heads, losses (also over ranks), and what a finished run gives to fine-tuning."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import torch.distributed as dist
from monai.losses import ContrastiveLoss

from swin_unetr import SwinUNETR, load_pretrained
from swin_unetr.pretraining import losses
from swin_unetr.pretraining.network import Answers, PretrainingNetwork, check_extents
from swin_unetr.pretraining.task import Tasks, answer, step_losses, two_views, validation_losses
from swin_unetr.pretraining.views import Cutout, check_rotation, cut_out, view

from ..ranks import on_ranks


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


# --- views ---


@pytest.mark.parametrize(("extents", "axes"), [((12, 16, 16), (1, 2)), ((16, 16, 8), (0, 1)), ((16, 16), (1, 0))])
def test_a_view_is_its_crop_rotated_with_blocks_replaced(extents, axes):
    crops = torch.rand(3, 2, *extents)
    seen = view(crops, Cutout(), axes, generator())
    for crop, whole, turns in zip(crops, seen.whole, seen.turns.tolist(), strict=True):
        # Turning back gives the crop: the class is the number of quarter turns in that plane.
        torch.testing.assert_close(whole.rot90(-turns, [axis + 1 for axis in axes]), crop, rtol=0, atol=0)
    kept = ~seen.cut.expand_as(crops)
    assert torch.equal(seen.image[kept], seen.whole[kept])
    assert (seen.image != seen.whole)[seen.cut.expand_as(crops)].float().mean() > 0.99
    assert seen.image.min() >= 0
    assert seen.image.max() <= 1


def test_views_take_all_four_turns_alike_and_repeat_under_a_seed():
    crops = torch.rand(400, 1, 4, 4)
    seen = view(crops, Cutout(max_fraction=0), (0, 1), generator())
    assert not seen.cut.any()
    assert seen.turns.bincount(minlength=4).min() > 70  # of 100 expected each
    again, other = (view(crops, Cutout(), (0, 1), generator(seed)) for seed in (0, 1))
    assert torch.equal(again.image, view(crops, Cutout(), (0, 1), generator()).image)
    assert not torch.equal(again.turns, other.turns)


def test_cutout_stays_within_its_fraction_and_block_sizes():
    whole = torch.rand(60, 1, 20, 40, 40)
    _, cut = cut_out(whole, Cutout(max_fraction=0.3), generator())
    fractions = cut.flatten(1).float().mean(1)
    assert 0.2 < fractions.max() <= 0.3
    assert fractions.min() < 0.05
    # A fraction with room for one block, which takes a quarter of each axis: 1/64 of the voxels.
    _, cut = cut_out(whole, Cutout(max_fraction=0.03, block=(0.25, 0.25)), generator())
    sizes = [
        tuple((found.max(0).values - found.min(0).values + 1).tolist()) for c in cut if len(found := c[0].nonzero())
    ]
    assert len(sizes) > 10
    assert set(sizes) == {(5, 10, 10)}


def test_blocks_hold_noise_or_what_another_crop_has_there():
    whole = torch.arange(1.0, 4.0)[:, None, None, None].expand(3, 1, 32, 32) / 4  # crops of one value each
    replaced, cut = cut_out(whole, Cutout(noise=0.0), generator())
    for i in range(3):
        found = set(replaced[i][cut[i]].unique().tolist())
        assert found
        assert found <= {0.25, 0.5, 0.75} - {whole[i, 0, 0, 0].item()}
    replaced, cut = cut_out(whole, Cutout(noise=1.0), generator())
    assert len(replaced[cut].unique()) > 100
    alone, cut = cut_out(whole[:1], Cutout(noise=0.0), generator())
    assert (alone != whole[:1])[cut].float().mean() > 0.9  # nothing else to take a block from


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_fraction": 1.0}, "max_fraction is 1.0; accepted is 0 ≤ max_fraction < 1"),
        ({"block": (0.3, 0.2)}, r"block is \(0.3, 0.2\); accepted is 0 < smallest ≤ largest ≤ 1"),
        ({"noise": 2.0}, "noise is 2.0; accepted is a probability"),
    ],
)
def test_cutout_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        Cutout(**options)


@pytest.mark.parametrize(
    ("extents", "axes", "message"),
    [
        ((64, 64, 32), (1, 2), r"\(64, 64, 32\) voxels have 64 and 32; a quarter turn needs them equal"),
        ((64, 64, 64), (1, 1), r"rotation_axes is \(1, 1\); accepted are two different axes of \(0, 1, 2\)"),
        ((64, 64), (1, 2), r"rotation_axes is \(1, 2\); accepted are two different axes of \(0, 1\)"),
    ],
)
def test_planes_that_cannot_be_turned_are_refused(extents, axes, message):
    with pytest.raises(ValueError, match=message):
        check_rotation(extents, axes)


# --- network ---


def network(**options) -> PretrainingNetwork:
    options = {"in_channels": 1, "out_channels": 2, "feature_size": 12, "depths": (1, 1, 1, 1)} | options
    model = SwinUNETR(**options)
    return PretrainingNetwork(model.swinViT, options["in_channels"], options.get("spatial_dims", 3))


@pytest.mark.parametrize("extents", [(64, 32, 32), (64, 64)])
def test_heads_answer_for_every_image(extents):
    model = network(in_channels=2, spatial_dims=len(extents))
    images = torch.rand(3, 2, *extents)
    answers = model(images)
    assert answers.turns.shape == (3, 4)
    assert answers.embedding.shape == (3, 512)
    assert answers.image.shape == images.shape
    sum(part.square().mean() for part in answers).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_rotation_reads_the_first_token_and_contrast_the_second():
    model = network()
    deepest = torch.rand(2, 192, 2, 1, 1)
    model.swinViT.forward = lambda image: [deepest]
    answers = model(torch.rand(2, 1, 64, 32, 32))
    torch.testing.assert_close(answers.turns, model.rotation_head(deepest[:, :, 0, 0, 0]))
    torch.testing.assert_close(answers.embedding, model.contrastive_head(deepest[:, :, 1, 0, 0]))


def test_published_sizes_of_the_heads():
    """Linear(768, 4), Linear(768, 512), and 768 channels halved to 48 on the way to the image."""
    encoder = torch.nn.Module()
    encoder.embed_dim = 48
    with torch.device("meta"):
        model = PretrainingNetwork(encoder, in_channels=1)
    assert model.rotation_head.weight.shape == (4, 768)
    assert model.contrastive_head.weight.shape == (512, 768)
    convolutions = [m for m in model.reconstruction_head.modules() if isinstance(m, torch.nn.Conv3d)]
    assert [m.out_channels for m in convolutions] == [384, 192, 96, 48, 48, 1]


@pytest.mark.parametrize("extents", [(32, 32, 32), (32, 32)])
def test_a_crop_whose_deepest_map_is_one_voxel_is_refused(extents):
    with pytest.raises(ValueError, match=r"roi is \(32, 32.*\), whose deepest feature map is a single voxel"):
        network(spatial_dims=len(extents))(torch.rand(2, 1, *extents))


@pytest.mark.parametrize("extents", [(48, 64, 64), (0, 64, 64)])
def test_a_crop_that_does_not_divide_is_refused(extents):
    with pytest.raises(ValueError, match=rf"roi is \({extents[0]}, 64, 64\); accepted are multiples of 32"):
        check_extents(extents)


def test_weights_load_into_the_segmentation_model(capsys):
    torch.manual_seed(3)
    pretrained, model = network(), SwinUNETR(1, 3, feature_size=12, depths=(1, 1, 1, 1))
    report = load_pretrained(model, pretrained.state_dict())
    encoder = {name: value for name, value in pretrained.state_dict().items() if name.startswith("swinViT.")}
    assert set(report.loaded) == set(encoder)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in encoder.items())
    assert all(name.split(".")[0].endswith("_head") for name in report.unexpected)
    assert f"swinViT ({len(encoder)})" in capsys.readouterr().out


# --- losses ---


def test_contrast_is_monais_nt_xent():
    first, second = torch.randn(5, 16), torch.randn(5, 16)
    for temperature in (0.5, 0.1):
        expected = ContrastiveLoss(temperature)(first, second)
        torch.testing.assert_close(losses.contrast(first, second, temperature), expected)


def test_contrast_refuses():
    with pytest.raises(ValueError, match="one crop on all ranks; accepted are 2 or more"):
        losses.contrast(torch.randn(1, 8), torch.randn(1, 8))
    with pytest.raises(ValueError, match=r"embeddings are \(2, 8\) and \(3, 8\)"):
        losses.contrast(torch.randn(2, 8), torch.randn(3, 8))


def test_reconstruction_of_all_voxels_or_of_those_cut_out():
    expected, found = torch.zeros(2, 2, 4, 4), torch.ones(2, 2, 4, 4)
    found[0, :, 0] = 5.0
    assert losses.reconstruction(found, expected) == (2 * 16 * 2 + 2 * 4 * 4) / 64
    cut = torch.zeros(2, 1, 4, 4, dtype=torch.bool)
    assert losses.reconstruction(found, expected, cut) == 0
    cut[0, :, 0] = True  # 4 voxels at a distance of 5
    cut[1, :, :2] = True  # 8 at a distance of 1, which count no more than the 4
    assert losses.reconstruction(found, expected, cut) == (5 + 1) / 2


# --- over ranks ---


def _embeddings() -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(11)
    return tuple(torch.randn(4, 6, generator=random) for _ in range(2))


def _contrast_on_a_rank(rank: int, folder: str) -> None:
    """Loss and gradient of a linear head that sees half of the batch, averaged as in data-parallel training."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        head = _head()
        first, second = (batch[2 * rank : 2 * rank + 2] for batch in _embeddings())
        loss = losses.contrast(head(first), head(second))
        loss.backward()
        for value in (gradient := head.weight.grad, loss := loss.detach()):
            dist.all_reduce(value)
            value /= 2
        torch.save({"loss": loss, "gradient": gradient}, f"{folder}/rank{rank}.pt")
    finally:
        dist.destroy_process_group()


def _head() -> torch.nn.Linear:
    torch.manual_seed(7)
    return torch.nn.Linear(6, 6, bias=False)


def test_two_ranks_contrast_as_one_process_with_the_whole_batch(tmp_path):
    on_ranks(_contrast_on_a_rank, (str(tmp_path),), 2)
    head = _head()
    expected = losses.contrast(*(head(batch) for batch in _embeddings()))
    expected.backward()
    for rank in range(2):
        found = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        torch.testing.assert_close(found["loss"], expected.detach())
        torch.testing.assert_close(found["gradient"], head.weight.grad)
    # The test can fail: without the other rank's negatives the loss differs.
    alone = losses.contrast(*(head(batch[:2]) for batch in _embeddings()))
    assert alone.item() != pytest.approx(expected.item(), rel=0.05)


# --- the tasks together ---


def test_a_step_weighs_its_three_losses_and_repeats_under_a_seed():
    model, crops = network(), torch.rand(2, 1, 64, 32, 32)
    tasks = Tasks(rotation=2.0, contrast=0.5, reconstruction=3.0)
    parts, again = (step_losses(model, crops, tasks, generator(4)) for _ in range(2))
    expected = 2 * parts["rotation"] + 0.5 * parts["contrast"] + 3 * parts["reconstruction"]
    torch.testing.assert_close(parts["loss"], expected)
    torch.testing.assert_close(parts, again, rtol=0, atol=0)
    masked = step_losses(model, crops, dataclasses.replace(tasks, region="masked"), generator(4))
    assert masked["reconstruction"] != parts["reconstruction"]
    assert masked["rotation"] == parts["rotation"]


def test_reconstruction_is_asked_for_what_was_cut_out():
    """The target is the rotated crop with nothing cut out, for both views."""
    crops, tasks = torch.rand(3, 1, 64, 64), Tasks(rotation_axes=(0, 1))
    views = two_views(crops, tasks, generator(1))
    perfect = Answers(torch.zeros(6, 4), torch.randn(6, 8), views.whole)
    found = step_losses(lambda image: perfect, crops, tasks, generator(1))
    assert found["reconstruction"] == 0
    turns = torch.nn.functional.one_hot(views.turns, 4) * 100.0
    assert step_losses(lambda image: perfect._replace(turns=turns), crops, tasks, generator(1))["rotation"] == 0


def test_validation_does_not_depend_on_how_cases_are_shared():
    model, tasks = network(), Tasks(rotation_axes=(1, 2))
    crops = torch.rand(3, 2, 1, 64, 32, 32)
    answers = [answer(model, i, crops[i], tasks, seed=5) for i in range(3)]
    expected = validation_losses(answers, tasks)
    # Two ranks, of which the second repeats a case so that both have as many.
    shared = [answer(model, i, crops[i], tasks, seed=5) for i in (0, 2, 1, 0)]
    assert validation_losses(shared, tasks) == expected
    assert expected["loss"] == pytest.approx(
        expected["rotation"] + expected["contrast"] + expected["reconstruction"], rel=1e-6
    )
    assert expected["rotation"] == pytest.approx(np.mean([case.rotation for case in answers]))
    assert 0 <= expected["rotation_accuracy"] <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rotation": -1.0}, r"weights of rotation, contrast, reconstruction are \[-1.0, 1.0, 1.0\]"),
        ({"rotation": 0.0, "contrast": 0.0, "reconstruction": 0.0}, "accepted are numbers ≥ 0, not all of them 0"),
        ({"temperature": 0.0}, "temperature is 0.0; accepted is a number above 0"),
        ({"region": "outside"}, "region is 'outside'; accepted are 'whole' and 'masked'"),
        ({"region": "masked", "cutout": Cutout(max_fraction=0)}, "cutout.max_fraction 0"),
    ],
)
def test_tasks_refuse(options, message):
    with pytest.raises(ValueError, match=message):
        Tasks(**options)
