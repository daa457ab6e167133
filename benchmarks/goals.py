"""What the project promises, in one table: a benchmark named here fails below its goal.

A goal is a ratio, MONAI's cost divided by ours, both measured in the same run on 2 CPU threads in
float32 at the image extent named. Other extents, dtypes and rows are reported without a goal.
"""

from __future__ import annotations

from dataclasses import dataclass

IMAGE_EXTENT = 96


@dataclass(frozen=True)
class Goal:
    """`benchmark` must cost `against` at least `ratio` times what it costs us."""

    benchmark: str
    against: str
    ratio: float
    wording: str


GOALS = (
    Goal(
        "attention branch, stage 1 shifted, forward",
        "MONAI",
        15.0,
        "attention branch of the shifted stage-1 block at 96³ (48³ tokens, 3 heads, f48) forward ≥ 15× MONAI eager",
    ),
    Goal(
        "attention branch, stage 1 shifted, forward",
        "MONAI flash",
        8.0,
        "… and ≥ 8× its use_flash_attention",
    ),
    Goal(
        "attention branch, stage 1 shifted, forward + backward",
        "MONAI",
        8.0,
        "forward + backward ≥ 8× eager",
    ),
    Goal(
        "whole model, inference",
        "MONAI",
        1.6,
        "whole model at 96³ f48 inference ≥ 1.6× eager",
    ),
    Goal(
        "whole model, training step",
        "MONAI",
        1.4,
        "… and a training step ≥ 1.4× eager",
    ),
    Goal(
        "training step, peak memory",
        "MONAI",
        1 / 0.75,
        "peak memory of the training step ≤ 75 % of eager's",
    ),
    Goal(
        "predict, from file to file",
        "MONAI",
        1.5,
        "predict on a 512×512×61 CT ≥ 1.5× MONAI's SwinUNETR and transforms, same label map (≥ 99.99 % of the voxels)",
    ),
)


def goals_of(benchmark: str, image_extent: int, dtype: str) -> dict[str, Goal]:
    """The goals this measurement has to reach, by peer."""
    if image_extent != IMAGE_EXTENT or dtype != "float32":
        return {}
    return {goal.against: goal for goal in GOALS if goal.benchmark == benchmark}
