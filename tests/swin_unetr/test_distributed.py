"""Several ranks train the same as one; all of them stop together; a rank that dies is reported and costs little."""

from __future__ import annotations

import gc
import math
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from swin_unetr import checkpoints, distributed
from swin_unetr.architecture import Architecture
from swin_unetr.labels import Labels
from swin_unetr.preprocessing import Preprocessing
from swin_unetr.training import log, session
from swin_unetr.training.loop import Loop
from swin_unetr.training.options import Schedule
from swin_unetr.training.segmentation import Loss, Segmentation, Validation

from ..ranks import on_ranks
from . import toy_job
from .toy import CPU, Toy, ToyBatches, WithHead, final, loop, resumed

REPOSITORY = Path(__file__).parents[2]
SHORT = Schedule(steps=6, warm_up=0.2, validate_every=3, checkpoint_every=2)
TRAINED = {
    "ddp": {"accumulation": 2, "ema": 0.9},
    "fsdp": {"accumulation": 2, "ema": 0.9, "parallel": "fsdp"},
}
TOLERANCE = {"rtol": 0, "atol": 1e-6}
"""Weights are about 0.1 to 1, and sums over ranks are rounded in another order; each of six steps moves them 1e-2."""


# --- what ranks do, run on all of them by the fixture `job` ---


def train(out: Path) -> None:
    for name, options in TRAINED.items():
        assert loop(out / name, WithHead(noisy=False), schedule=SHORT, **options).run()


def resume_across(out: Path) -> None:
    """FSDP2 resumes from what DDP, FSDP2 and one process saved at step 4."""
    for name in TRAINED:
        _only_first_four_steps(out / name, out / f"{name} then fsdp")
        assert resumed(out / f"{name} then fsdp", WithHead(noisy=False), schedule=SHORT, **TRAINED["fsdp"]).run()


def resume_noisy(out: Path) -> None:
    """With separate dropout and noise on every rank, interrupted inside a step."""
    assert loop(out / "whole", schedule=SHORT, **TRAINED["ddp"]).run()
    with pytest.raises(ZeroDivisionError):
        loop(out / "parts", None, ToyBatches(before=lambda number: 1 / (9 - number)), SHORT, **TRAINED["ddp"]).run()
    torch.rand(distributed.rank() + 1)
    assert resumed(out / "parts", schedule=SHORT, **TRAINED["ddp"]).run()


def signal_on_one_rank(out: Path) -> None:
    def before(number):
        if number == 3 and distributed.rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    assert not loop(out / "signalled", None, ToyBatches(before=before), SHORT).run()
    distributed.gather(None)  # waits for all ranks
    assert final(out / "signalled")["progress"]["step"] == 4


def signal_in_validation_of_one_rank(out: Path) -> None:
    """Rank 1 aborts it, rank 0 does not; the resumed run repeats it."""

    class Signalled(Toy):
        def scores(self, core):
            if distributed.rank() == 1:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(60)
            return super().scores(core)

    assert not loop(out / "validation", Signalled(noisy=False), schedule=SHORT, **TRAINED["ddp"]).run()
    distributed.gather(None)  # waits for all ranks
    assert final(out / "validation")["progress"]["step"] == 3
    assert final(out / "validation")["progress"]["validated"] == 0
    assert resumed(out / "validation", Toy(noisy=False), schedule=SHORT, **TRAINED["ddp"]).run()
    assert final(out / "validation")["progress"]["validated"] == 6


def not_finite_on_one_rank(out: Path) -> None:
    class Bad(Toy):
        def losses(self, network, batch, random):
            losses = super().losses(network, batch, random)
            return losses | ({"loss": losses["loss"] * math.nan} if distributed.rank() == 1 else {})

    for precision in ("fp32", "fp16"):
        with pytest.raises(FloatingPointError, match=rf"step 1: .* on rank {distributed.rank()}"):
            loop(out / f"bad {precision}", Bad(), schedule=SHORT, precision=precision).run()


def full_disk(out: Path) -> None:
    """Only rank 0 writes, and every rank learns that it could not."""
    save = torch.save
    full = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
    torch.save = lambda value, file, **how: save(value, full if "progress" in value else file, **how)
    try:
        with pytest.raises(checkpoints.NotSaved, match="what was there before is untouched"):
            loop(out / "full", schedule=SHORT).run()
    finally:
        torch.save = save


def segment(out: Path) -> None:
    """Swin UNETR itself, with deep supervision, on DDP and FSDP2."""
    for name in TRAINED:
        task, batches = segmentation(), Crops()
        assert loop(out / f"segment {name}", task, batches, Schedule(steps=1), parallel=name).run()


def do_the_job(out: Path) -> None:
    """What `toy_job` does, uninterrupted."""
    options = toy_job.ToyOptions(out / "job")
    assert Loop(
        Toy(), ToyBatches(), options.optimization, options.schedule, out=options.out, device=CPU, seed=options.seed
    ).run()


SCENARIOS = {
    2: (
        do_the_job,
        train,
        resume_across,
        resume_noisy,
        signal_on_one_rank,
        signal_in_validation_of_one_rank,
        not_finite_on_one_rank,
        full_disk,
        segment,
    ),
    3: (train, resume_noisy),
}


class Crops(ToyBatches):
    """Two crops with one bright class, for all ranks together."""

    def stream(self, start):
        number = start
        while True:
            batch = {
                name: value[distributed.rank() :: distributed.ranks()] for name, value in volume(number, 2).items()
            }
            yield batch
            number += 1


class Volume:
    def __init__(self, number: int) -> None:
        self.name, self.number = f"case {number}", number

    def load(self):
        return {name: value[0] for name, value in volume(100 + self.number, 1).items()}


def volume(seed: int, size: int) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    label = (torch.rand(size, 1, 64, 32, 32, generator=random) > 0.7).float()
    return {"image": label + torch.rand(label.shape, generator=random), "label": label}


def segmentation() -> Segmentation:
    torch.manual_seed(1)
    architecture = Architecture(feature_size=12, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8))
    labels, loss = Labels({"bright": [1]}), Loss(deep_supervision=2)
    cases = [Volume(i) for i in range(3)]
    return Segmentation(architecture, labels, Preprocessing(), (64, 32, 32), loss, Validation(overlap=0.0), cases)


def _only_first_four_steps(source: Path, target: Path) -> None:
    name = checkpoints.name(4)
    if distributed.is_first():
        (target / "checkpoints").mkdir(parents=True)
        (target / "checkpoints" / name).write_bytes((source / "checkpoints" / name).read_bytes())
    distributed.gather(None)  # waits for all ranks


def _rank(rank: int, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    patience = timedelta(minutes=2)  # for a rank that was left alone, so that its test fails and does not hang
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks, timeout=patience)
    for scenario in SCENARIOS[ranks]:
        scenario(Path(folder))
        distributed.gather(None)  # waits for all ranks
    gc.collect()  # as `distributed.job` does
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """The folder of a job with that many ranks, in which all its `SCENARIOS` ran."""
    folders: dict[int, Path] = {}

    def run(ranks: int) -> Path:
        if ranks not in folders:
            folders[ranks] = tmp_path_factory.mktemp(f"{ranks}-ranks")
            if ranks == 1:
                train(folders[ranks])
            else:
                on_ranks(_rank, (ranks, str(folders[ranks])), ranks)
        return folders[ranks]

    return run


# --- the outcome ---


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("name", TRAINED)
def test_ranks_train_what_one_process_trains_on_the_whole_batch(job, ranks, name):
    one, several = final(job(1) / "ddp"), final(job(ranks) / name)
    for key in ("model", "ema"):
        assert list(one[key]) == list(several[key])
        torch.testing.assert_close(several[key], one[key], **TOLERANCE)
    torch.testing.assert_close(several["training"]["heads"], one["training"]["heads"], **TOLERANCE)
    assert several["progress"]["best"] == pytest.approx(one["progress"]["best"], rel=1e-5)
    best = [checkpoints.read(folder / "best.pt").content for folder in (job(1) / "ddp", job(ranks) / name)]
    for key in ("model", "ema"):
        torch.testing.assert_close(best[1][key], best[0][key], **TOLERANCE)
    lines = [
        [line["loss"] for line in log.read(f) if line["event"] == "train"] for f in (job(1) / "ddp", job(ranks) / name)
    ]
    assert lines[1] == pytest.approx(lines[0], rel=1e-5)


@pytest.mark.parametrize("name", TRAINED)
def test_a_checkpoint_goes_on_under_another_way_to_share_the_work(job, tmp_path, name):
    across = final(job(2) / f"{name} then fsdp")
    _only_first_four_steps(job(2) / name, tmp_path)
    assert resumed(tmp_path, WithHead(noisy=False), schedule=SHORT, **TRAINED["ddp"]).run()
    for found in (across, final(tmp_path)):
        for key in ("model", "ema"):
            torch.testing.assert_close(found[key], final(job(1) / "ddp")[key], **TOLERANCE)


@pytest.mark.parametrize("ranks", [2, 3])
def test_every_rank_goes_on_with_its_own_random_numbers(job, ranks):
    whole, parts = final(job(ranks) / "whole"), final(job(ranks) / "parts")
    assert len({state["torch"].numpy().tobytes() for state in whole["training"]["random"]}) == ranks
    assert checkpoints.checksum(parts) == checkpoints.checksum(whole)


def test_swin_unetr_trains_and_validates_alike_on_any_number_of_ranks(job, tmp_path):
    """Gradients are compared as AdamW keeps them: its first step is their sign, which rounding flips near 0."""
    assert loop(tmp_path, segmentation(), Crops(), Schedule(steps=1)).run()
    expected, figures = _gradients(tmp_path)
    assert set(figures) == {"event", "step", "dice", "dice of bright", "seconds"}
    for name in TRAINED:
        found, found_figures = _gradients(job(2) / f"segment {name}")
        assert found.keys() == expected.keys()
        for parameter, gradient in expected.items():
            error = (found[parameter] - gradient).norm() / gradient.norm()
            assert error < 1e-3, parameter
        assert found_figures["dice"] == pytest.approx(figures["dice"], rel=1e-2)


def _gradients(out: Path) -> tuple[dict[str, torch.Tensor], dict]:
    state = final(out)["training"]["optimizer"]["state"]
    (validation,) = (line for line in log.read(out) if line["event"] == "validation")
    return {name: of_parameter["exp_avg"] for name, of_parameter in state.items()}, validation


def test_validation_does_not_depend_on_how_cases_are_shared(monkeypatch):
    """Each case counts once and equally: three cases on one rank, or on two ranks, one of which has two."""
    task = segmentation()
    core = task.core.eval()
    alone = task.figures([task.scores(core)])
    shares = []
    for indices in ([0, 2], [1]):
        monkeypatch.setattr(distributed, "share", lambda items, indices=indices: indices)
        shares.append(task.scores(core))
    assert task.figures(shares) == alone


@pytest.mark.parametrize(("norm", "wanted"), [(torch.nn.InstanceNorm3d, False), (torch.nn.BatchNorm3d, True)])
def test_running_statistics_alone_are_broadcast(monkeypatch, norm, wanted):
    monkeypatch.setattr(distributed, "ranks", lambda: 2)
    monkeypatch.setattr(distributed, "DistributedDataParallel", lambda network, **options: options)
    network = torch.nn.Sequential(norm(2), Architecture(feature_size=12, out_channels=2).build())
    assert distributed.parallel(network, "ddp", CPU)["broadcast_buffers"] == wanted


# --- under torchrun ---


def torchrun(out: Path, *arguments: str, restarts: int = 0) -> subprocess.Popen:
    """On one node, started as by scripts/slurm/train.sbatch."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", str(restarts), "--monitor-interval", "0.1"]
    command += ["--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1", "--shutdown-timeout", "60"]
    command += ["-m", "tests.swin_unetr.toy_job", str(out), *arguments]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=REPOSITORY, env=environment, stderr=subprocess.PIPE, text=True)


def test_a_killed_rank_is_reported_and_the_job_goes_on_from_the_last_checkpoint(job, tmp_path):
    """Rank 1 dies within step 8, after checkpoints at steps 3 and 6."""
    process = torchrun(tmp_path / "killed", "15", restarts=1)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert "swin-unetr train: rank 0 of 2 lost another rank, whose own output says why" in errors
    assert "Traceback" not in errors.partition("lost another rank")[0]
    lines = [line["step"] for line in log.read(tmp_path / "killed") if line["event"] == "train"]
    assert lines == list(range(1, 9))
    assert final(tmp_path / "killed")["progress"]["step"] == 8
    for key in ("model", "ema"):
        assert checkpoints.checksum(final(tmp_path / "killed")[key]) == checkpoints.checksum(final(job(2) / "job")[key])
    steps = checkpoints.series(tmp_path / "killed" / "checkpoints")
    assert [path.name for path in steps] == [checkpoints.name(step) for step in (3, 6, 8)]


def test_ranks_that_differ_all_end_and_say_in_what(tmp_path):
    started = time.monotonic()
    process = torchrun(tmp_path, toy_job.DIFFERENT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert time.monotonic() - started < 60  # imports take most of it
    says = (
        "the ranks of this job differ: schedule.steps is 8 on rank 0 and 9 on rank 1; "
        "on rank 1, compared with rank 0, cases case 0 are gone from the data; "
        "on rank 1, compared with rank 0, cases case 1 are new in the data; "
        "on rank 1, compared with rank 0, cases case have other files; accepted are the same on all"
    )
    assert errors.count(says) == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"seed": 1}, "seed is 0 on rank 0 and 1 on rank 1; accepted are the same on all"),
        ({"data": {"datalist": "elsewhere", "workers": 7, "root": "b"}, "device": "cuda:1"}, None),
        ({"data": {"datalist": "here", "batch_size": 2}}, "data.batch_size is not set on rank 0 and 2 on rank 1"),
    ],
)
def test_what_may_differ_among_ranks_and_what_not(monkeypatch, others, message):
    config = {"seed": 0, "data": {"datalist": "here", "workers": 2, "root": None}, "device": None}
    monkeypatch.setattr(distributed, "gather", lambda value: [value, ({**value[0], **others}, *value[1:])])
    monkeypatch.setattr(distributed, "ranks", lambda: 2)
    if message is None:
        assert session._agreed(config, None, lambda: {"training": {"a": "1"}}) == {"training": {"a": "1"}}
    else:
        with pytest.raises(ValueError, match=f"the ranks of this job differ: {message}"):
            session._agreed(config, None, dict)


def test_data_that_one_rank_cannot_read_end_all(monkeypatch):
    monkeypatch.setattr(distributed, "gather", lambda value: [value, (value[0], {}, "the datalist cannot be read")])
    monkeypatch.setattr(distributed, "ranks", lambda: 2)
    with pytest.raises(ValueError, match="the ranks of this job differ: on rank 1 the datalist cannot be read"):
        session._agreed({}, None, dict)


def test_a_signal_to_torchrun_saves(tmp_path):
    process = torchrun(tmp_path, toy_job.ENDLESS)
    deadline = time.monotonic() + 120
    while len(log.read(tmp_path)) < 3:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGUSR1)
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    saved = final(tmp_path)["progress"]["step"]
    assert saved == log.read(tmp_path)[-1]["step"], errors
