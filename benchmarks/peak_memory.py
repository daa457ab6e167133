"""Run training steps of one variant in this process and print its memory as JSON.

``python benchmarks/peak_memory.py {MONAI,ours} --extent 96``. `test_memory.py` starts one process per
variant, since a process only ever reports its highest peak. Linux only (``/proc/self/status``).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from monai.networks.nets import SwinUNETR
from peers import CLASSES, FEATURE_SIZE, training_batch, training_step

import swin_kernels

STEPS = 2  # the first allocates the optimizer's state


def status(field: str) -> int:
    """A field of ``/proc/self/status`` in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{field}:")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("variant", choices=("MONAI", "ours"))
    parser.add_argument("--extent", type=int, default=96)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    torch.manual_seed(0)
    model: torch.nn.Module = SwinUNETR(in_channels=1, out_channels=CLASSES, feature_size=FEATURE_SIZE)
    if arguments.variant == "ours":
        model = swin_kernels.accelerate(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    image, label = training_batch(arguments.extent)
    base = status("VmRSS")
    losses = [training_step(model, optimizer, image, label) for _ in range(STEPS)]
    print(json.dumps({"base": base, "peak": status("VmHWM"), "losses": losses}))


if __name__ == "__main__":
    main()
