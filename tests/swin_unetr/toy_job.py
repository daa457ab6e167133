"""A whole training command on toy data, for torchrun to start: ``python -m tests.swin_unetr.toy_job OUT [BATCH]``.

On the job's first attempt, rank 1 dies by SIGKILL when it asks for batch number BATCH. If BATCH is "endless", the job
never ends; if it is "different", ranks have different options and data.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from swin_unetr import distributed
from swin_unetr.training import session
from swin_unetr.training.options import Optimization, Schedule

from .toy import Toy, ToyBatches

ENDLESS = "endless"
DIFFERENT = "different"


@dataclass
class ToyOptions:
    """What `session.run` needs from a command's options."""

    out: Path
    optimization: Optimization = Optimization(  # noqa: RUF009 - nobody changes it
        learning_rate=1e-2, weight_decay=0.1, accumulation=2, ema=0.9, precision="fp32"
    )
    schedule: Schedule = Schedule(steps=8, warm_up=0.25, validate_every=4, checkpoint_every=3)  # noqa: RUF009
    initial: Path | None = None
    resume: str = "auto"
    seed: int = 5
    device: str | None = "cpu"


class JobBatches(ToyBatches):
    def close(self) -> None:
        pass


def run(options: ToyOptions, before=lambda number: None, size: int = 6, identify=lambda say: {}) -> int:
    return session.run(
        "train",
        options,
        lambda console: JobBatches(size, before=before),
        lambda dataset: Toy(),
        identify=identify,
    )


def main(out: str, batch: str = "-1") -> int:
    def before(number):
        if batch == ENDLESS:
            time.sleep(0.05)
        elif number == int(batch) and distributed.rank() == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)

    if batch == ENDLESS:
        return run(ToyOptions(Path(out), schedule=Schedule(steps=10_000)), before)
    if batch == DIFFERENT:
        rank = int(os.environ["RANK"])
        options = ToyOptions(Path(out), schedule=Schedule(steps=8 + rank))
        return run(options, before, identify=lambda say: {"training": {f"case {rank}": "same", "case": f"{rank}"}})
    return run(ToyOptions(Path(out)), before)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
