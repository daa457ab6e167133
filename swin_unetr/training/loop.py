"""The training loop: steps, validation, checkpoints, and resuming exactly where a run stopped."""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn as nn
from rich.console import Console
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from .. import checkpoints, distributed
from ..interruption import Interrupted, Interruption
from ..names import say
from . import precision, state
from .learning_rate import warm_up_and_cosine
from .log import Log
from .options import Optimization, Schedule
from .progress import ProgressLine, peak_memory_gib
from .resume import CHECKPOINTS
from .task import Batches, Task

BEST = "best.pt"
"""File in a run's folder: the best weights so far, for prediction."""


class Loop:
    """Trains a `Task` on `Batches`, on this rank of the job; every rank creates one and calls the same methods."""

    def __init__(
        self,
        task: Task,
        batches: Batches,
        optimization: Optimization,
        schedule: Schedule,
        *,
        out: Path,
        device: torch.device,
        seed: int = 0,
        facts: Mapping[str, Any] | None = None,
        console: Console | None = None,
    ) -> None:
        """
        Args:
            task: what to train; its network has the same weights on every rank.
            out: folder for checkpoints, weights and logs.
            seed: for what `task` draws, and for dropout.
            facts: what checkpoints hold beyond the state of loop and task: config and provenance.
            console: where rank 0 reports.
        """
        self.task, self.batches, self.optimization, self.schedule = task, batches, optimization, schedule
        self.out, self.device, self.seed, self.facts = out, device, seed, dict(facts or {})
        self.console = console or Console(quiet=not distributed.is_first())
        self.steps = schedule.total(batches.batches_per_epoch, optimization.accumulation)
        self.position = state.Position()

        network, core = task.network.to(device), task.core
        self.ema = None
        if optimization.ema is not None:
            self.ema = AveragedModel(core, multi_avg_fn=get_ema_multi_avg_fn(optimization.ema))
        self.sharded = optimization.parallel == "fsdp" and distributed.ranks() > 1
        self.whole = copy.deepcopy(core) if self.sharded else None  # for validation, during which ranks are not in step
        self.network = distributed.parallel(network, optimization.parallel, device, core.children())
        if self.sharded and self.ema is not None:
            distributed.parallel(self.ema.module, optimization.parallel, device)

        self.optimizer = torch.optim.AdamW(
            network.parameters(),
            lr=optimization.learning_rate,
            weight_decay=optimization.weight_decay,
            fused=device.type in ("cpu", "cuda"),  # one pass over weights, gradients and moments instead of ten
        )
        self.scheduler = warm_up_and_cosine(self.optimizer, self.steps, schedule.warm_up)
        self.precision = precision.chosen(optimization.precision, device)
        if optimization.precision == "auto":
            say(self.console, f"precision: {self.precision} ({precision.reason(device)})")
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == "fp16")
        state.seed(seed, distributed.rank())

    @property
    def finished(self) -> bool:
        """Whether all steps are done, or validations have not improved for too long."""
        patience = self.schedule.patience
        return self.position.step >= self.steps or (patience is not None and self.position.stale >= patience)

    @property
    def epoch(self) -> int:
        return self.position.step * self.optimization.accumulation // self.batches.batches_per_epoch

    def run(self, interruption: Interruption | None = None) -> bool:
        """Train to the end; returns False if a signal asked to stop before, after saving everything.

        Args:
            interruption: receives such signals, for a context that is to outlast the training.

        Raises:
            FloatingPointError: the loss or its gradient is not finite.
            NotSaved: a checkpoint could not be written; the last one is whole.
            OSError: the log could not be written.
        """
        saved = self.position.step
        with ExitStack() as stack:
            interruption = interruption or stack.enter_context(Interruption())
            log = None
            if distributed.is_first():
                log = stack.enter_context(closing(Log(self.out, self.position.step, self._validates)))
                if self.position.step == 0:
                    log.say("start", 0, {"precision": self.precision})
            line = stack.enter_context(ProgressLine(self.console, self.position.step, self.steps))
            stream = stack.enter_context(closing(self._stream()))
            self.network.train()
            batches = self._settle(stream) if isinstance(self.network, DistributedDataParallel) else stream
            asked = False
            while not asked:
                if self._validates:
                    if not self._validate(interruption, log, line):
                        break
                    saved = -1  # what a checkpoint of this step says about the best has changed
                if saved < self.position.step and self._is_due(self.schedule.checkpoint_every):
                    self.save()
                    saved = self.position.step
                if self.finished:
                    return True
                asked = self._step(batches, interruption, log, line)
            # A validation that is due is left to the run that resumes, which begins with it.
            if saved < self.position.step:
                self.save()
            line.say(f"interrupted; step {self.position.step} is saved", style="yellow")
            return False

    @property
    def _validates(self) -> bool:
        """Whether a validation comes before the next step."""
        return self.position.validated < self.position.step and self._is_due(self.schedule.validate_every)

    def _is_due(self, every: int) -> bool:
        return self.position.step % every == 0 or self.finished

    # --- a step ---

    def _stream(self) -> Generator[dict[str, torch.Tensor]]:
        yield from self.batches.stream(self.position.step * self.optimization.accumulation)

    def _next(self, stream: Iterator) -> dict[str, torch.Tensor]:
        """The next batch, on this rank's device."""
        with state.apart(torch.device("cpu")):
            batch = next(stream)
        return {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}

    def _settle(self, stream: Iterator) -> Iterator:
        """Run forward and backward twice and discard the result; returns the stream, rewound.

        With a static graph, DDP learns in its first backward which gradients there are and in its second in which order
        they come, and lays them out accordingly from then on. The layout decides how sums over ranks are rounded, so it
        must not differ between the first step after an interruption and the same step of an uninterrupted run. Nor may
        the first backward be one under `no_sync`.
        """
        batch = self._next(stream)
        with state.apart(self.device):
            for _ in range(2):
                self._losses(batch, 0)["loss"].backward()
        return itertools.chain([batch], stream)

    def _losses(self, batch: Mapping[str, torch.Tensor], micro: int) -> dict[str, torch.Tensor]:
        random = np.random.default_rng([self.seed, self.position.step, micro, distributed.rank()])
        with self._autocast():
            return self.task.losses(self.network, batch, random)

    def _step(self, stream: Iterator, interruption: Interruption, log: Log | None, line: ProgressLine) -> bool:
        """One step of the optimizer; returns whether a rank was asked to stop.

        If asked to stop, a step that takes long is abandoned as if it had not begun. With several ranks it is not,
        since the others would wait for this one.
        """
        started = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        if distributed.ranks() > 1:
            parts, waited, voxels = self._gradients(stream)
        else:
            before = state.random_state(self.device)
            try:
                with interruption.breaking(at_once=False):
                    parts, waited, voxels = self._gradients(stream)
            except Interrupted:
                interruption.hold()
                state.set_random_state(before, self.device)
                return True
        self.scaler.unscale_(self.optimizer)
        norm = self._clip()

        finite = math.isfinite(parts["loss"]) and (math.isfinite(norm) or self.scaler.is_enabled())
        *sums, bad, asked = distributed.sums([*parts.values(), not finite, interruption.asked is not None], self.device)
        if bad:
            self._raise_not_finite(parts, norm, finite)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        learning_rate = float(self.scheduler.get_last_lr()[0])
        skipped = not math.isfinite(norm)
        if not skipped:
            self.scheduler.step()
        if self.ema is not None:
            self.ema.update_parameters(self.task.core)
        self.position.step += 1
        self.position.skipped += skipped

        seconds = time.perf_counter() - started
        values = {name: value / distributed.ranks() for name, value in zip(parts, sums, strict=True)}
        speed, memory = voxels * distributed.ranks() / seconds, peak_memory_gib(self.device)
        line.step(self.position.step, values["loss"], speed, memory)
        if log is not None:
            values |= {"epoch": self.epoch, "learning_rate": learning_rate, "gradient_norm": norm, "seconds": seconds}
            values |= {"data_fraction": waited / seconds, "voxels_per_second": speed, "memory_gib": memory}
            log.write("train", self.position.step, values)
        return bool(asked)

    def _gradients(self, stream: Iterator) -> tuple[dict[str, float], float, int]:
        """Compute the gradients of a step; returns its losses by name, the seconds spent waiting for data, and its
        voxels."""
        waited, voxels = 0.0, 0
        parts: dict[str, float] = {}
        for micro in range(self.optimization.accumulation):
            asked_for = time.perf_counter()
            batch = self._next(stream)
            waited += time.perf_counter() - asked_for
            voxels += batch["image"].numel() // batch["image"].shape[1]
            with self._synchronized(micro + 1 == self.optimization.accumulation):
                losses = self._losses(batch, micro)
                self.scaler.scale(losses["loss"] / self.optimization.accumulation).backward()
            for name, value in losses.items():
                parts[name] = parts.get(name, 0.0) + value.item() / self.optimization.accumulation
        return parts, waited, voxels

    @contextmanager
    def _synchronized(self, last: bool) -> Iterator[None]:
        """Average gradients over ranks only in the backward of a step's `last` batch."""
        if self.sharded:
            cast(FSDPModule, self.network).set_requires_gradient_sync(last)
            yield
        elif isinstance(self.network, DistributedDataParallel) and not last:
            with self.network.no_sync():
                yield
        else:
            yield

    def _autocast(self) -> AbstractContextManager:
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, {"bf16": torch.bfloat16, "fp16": torch.float16}[self.precision])

    def _clip(self) -> float:
        """Clip the gradients; returns their norm before, the same on every rank."""
        clip = math.inf if self.optimization.clip is None else self.optimization.clip
        norm = nn.utils.clip_grad_norm_(self.task.network.parameters(), clip)
        return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()

    def _raise_not_finite(self, parts: Mapping[str, float], norm: float, finite_here: bool) -> None:
        says = ", ".join(f"{name} {value:g}" for name, value in parts.items())
        where = f"on rank {distributed.rank()}" + (" (another rank's is not finite)" if finite_here else "")
        raise FloatingPointError(
            f"step {self.position.step + 1}: {says}, norm of the gradient {norm:g} {where}; the weights were not "
            "changed by it. Intensities far beyond 0..1, a high learning rate or fp16 are the usual reasons"
        )

    # --- validation ---

    def _validate(self, interruption: Interruption, log: Log | None, line: ProgressLine) -> bool:
        """Validate, and save the weights if they are the best so far; returns False if a rank interrupted it."""
        started = time.perf_counter()
        network = self._judged()
        network.eval()
        scores = None
        with torch.no_grad(), self._autocast(), state.apart(self.device):
            try:
                with interruption.breaking(at_once=True):
                    scores = self.task.scores(network)
                whole = True
            except Interrupted:
                interruption.hold()
                whole = False
        self.network.train()
        everywhere = distributed.gather((whole, scores))
        if not all(whole for whole, _ in everywhere):
            return False
        figures = self.task.figures([scores for _, scores in everywhere])
        self.position.validated = self.position.step
        if not figures:
            if self.finished:
                self._save_best()
            return True
        value = figures[self.task.figure]
        best = self._best()
        if better := self._is_better(value, best):
            self.position.best, self.position.stale = {"step": self.position.step, self.task.figure: value}, 0
            self._save_best()
        else:
            self.position.stale += 1
        seconds = time.perf_counter() - started
        line.say(
            f"step {self.position.step}  {self.task.figure} {value:.4f}"
            + ("  best so far" if better else f"  best {best:.4f}")
            + f"  validated in {seconds:.1f} s"
        )
        if log is not None:
            log.write("validation", self.position.step, figures | {"seconds": seconds})
        return True

    def _judged(self) -> nn.Module:
        """The weights that prediction will use, in a network that a rank can call by itself."""
        network = self.task.core if self.ema is None else self.ema.module
        if self.whole is None:
            return network
        state.copy_weights(network, self.whole)
        return self.whole

    def _best(self) -> float:
        """The figure of the best validation; NaN before the first."""
        return math.nan if self.position.best is None else self.position.best[self.task.figure]

    def _is_better(self, value: float, best: float) -> bool:
        if self.position.best is None:
            return True
        if math.isnan(best):
            return not math.isnan(value)
        return value > best if self.task.higher_is_better else value < best

    # --- checkpoints ---

    def save(self) -> None:
        """Write a checkpoint of this step; called on all ranks.

        Raises:
            NotSaved: on every rank, if rank 0 could not write.
        """
        core, heads = state.core_and_heads(self.task.network, self.task.core)
        content = self._content(core) | {
            "training": {
                "heads": heads,
                "optimizer": state.optimizer_state(self.task.network, self.optimizer),
                "precision": self.precision,
                "scaler": self.scaler.state_dict(),
                "averaged": None if self.ema is None else int(self.ema.n_averaged),
                "random": distributed.gather(state.random_state(self.device)),
            }
        }
        folder = self.out / CHECKPOINTS

        def write() -> None:
            checkpoints.write(folder / checkpoints.name(self.position.step), content)
            checkpoints.prune(folder, self.schedule.keep)

        distributed.first(write)

    def restore(self, content: Mapping[str, Any]) -> None:
        """Continue from a checkpoint's `content`, which every rank has.

        Raises:
            ValueError: the checkpoint was trained in another precision.
        """
        training = content["training"]
        precision_then = training.get("precision", self.precision)  # checkpoints of earlier versions lack it
        if precision_then != self.precision:
            raise ValueError(
                f"optimization.precision was {precision_then} and is {self.precision} here (asked for: "
                f"{self.optimization.precision}); accepted is {precision_then}, or another out"
            )
        state.set_optimizer_state(self.task.network, self.optimizer, training["optimizer"])
        state.set_core_and_heads(self.task.network, self.task.core, content["model"], training["heads"])
        self.scaler.load_state_dict(training["scaler"])
        if self.ema is not None:
            state.set_weights(self.ema.module, content["ema"])
            self.ema.n_averaged.fill_(training["averaged"])
        progress = {name: value for name, value in content["progress"].items() if name != "epoch"}
        self.position = state.Position(**progress)
        for group in self.optimizer.param_groups:
            group["lr"] = self.optimization.learning_rate
        done = self.position.step - self.position.skipped
        self.scheduler = warm_up_and_cosine(self.optimizer, self.steps, self.schedule.warm_up, done)
        self.facts["provenance"] = content["provenance"]
        if len(training["random"]) == distributed.ranks():
            state.set_random_state(training["random"][distributed.rank()], self.device)
        else:
            state.seed(self.seed, distributed.rank(), self.position.step)
            say(
                self.console,
                f"the checkpoint is of {len(training['random'])} ranks, this job has {distributed.ranks()}: it "
                "continues with other random numbers and other batches",
                "yellow",
            )

    def forget_best(self) -> None:
        """Treat the next validation as the first; if none is left, validate at the last step again."""
        self.position.best, self.position.stale, self.position.validated = None, 0, 0

    def _save_best(self) -> None:
        content = self._content(state.weights(self.task.core))
        distributed.first(lambda: checkpoints.write(self.out / BEST, content))

    def _content(self, core: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """The content of a file of weights for prediction; called on all ranks."""
        return {
            "kind": self.task.kind,
            "provenance": {},
            **self.facts,
            **self.task.content(),
            "model": core,
            "ema": None if self.ema is None else state.weights(self.ema.module),
            "progress": asdict(self.position) | {"epoch": self.epoch},
        }
