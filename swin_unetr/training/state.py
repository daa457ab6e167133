"""The state of a training run as plain values, complete on rank 0 however the job shards it."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
import torch.nn as nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)


@dataclass
class Position:
    """The position of a run.

    Attributes:
        step: optimizer steps done.
        validated: step of the last validation.
        best: step and figure of the best validation; None before the first.
        stale: validations since the best one.
        skipped: steps that fp16 skipped because gradients overflowed.
    """

    step: int = 0
    validated: int = 0
    best: dict[str, Any] | None = None
    stale: int = 0
    skipped: int = 0


_ON_FIRST_RANK = StateDictOptions(full_state_dict=True, cpu_offload=True)
_WHOLE = StateDictOptions(full_state_dict=True)


def weights(network: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict on rank 0, on the CPU; call it on all ranks. Names are as without FSDP."""
    found = get_model_state_dict(network, options=_ON_FIRST_RANK)
    return dict(cast(dict[str, torch.Tensor], found))  # nested only if PyTorch is asked for it


def set_weights(network: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Load what `weights` returned, which every rank has in full."""
    set_model_state_dict(network, dict(state), options=_WHOLE)


def core_and_heads(network: nn.Module, core: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The `weights` of `core`, a module in `network` or `network` itself, by its own names; and the rest of the
    weights."""
    prefix = _prefix(network, core)
    parts: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]] = {}, {}
    for name, value in weights(network).items():
        parts[not name.startswith(prefix)][name.removeprefix(prefix)] = value
    return parts


def set_core_and_heads(
    network: nn.Module, core: nn.Module, of_core: Mapping[str, torch.Tensor], of_heads: Mapping[str, torch.Tensor]
) -> None:
    """Load what `core_and_heads` returned, which every rank has in full."""
    prefix = _prefix(network, core)
    set_weights(network, {f"{prefix}{name}": value for name, value in of_core.items()} | dict(of_heads))


def _prefix(network: nn.Module, core: nn.Module) -> str:
    """The prefix of the core's parameters in the network."""
    name = next(name for name, module in network.named_modules() if module is core)
    return f"{name}." if name else ""


def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Load the weights of `source`, sharded or not, into `target`, a complete network on every rank."""
    target.load_state_dict(get_model_state_dict(source, options=_WHOLE))


def optimizer_state(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state of the optimizer of `network` by parameter name, on rank 0; call it on all ranks."""
    return dict(get_optimizer_state_dict(network, optimizer, options=_ON_FIRST_RANK))


def set_optimizer_state(network: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load what `optimizer_state` returned, which every rank has in full."""
    set_optimizer_state_dict(network, optimizer, dict(state), options=_WHOLE)


def random_state(device: torch.device) -> dict[str, Any]:
    """The state of Python's, NumPy's and PyTorch's generators of this process."""
    version, words, gauss = random.getstate()
    numpy = np.random.get_state(legacy=False)
    return {
        "python": [version, torch.tensor(words), gauss],
        "numpy": [
            torch.from_numpy(numpy["state"]["key"].astype(np.int64)),
            int(numpy["state"]["pos"]),
            int(numpy["has_gauss"]),
            float(numpy["gauss"]),
        ],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Continue with the random numbers of the process that called `random_state`."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    key, *others = state["numpy"]
    np.random.set_state(("MT19937", key.numpy().astype(np.uint32), *others))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)


def seed(*entropy: int) -> None:
    """Seed Python's, NumPy's and PyTorch's generators, on every device."""
    value = int(np.random.SeedSequence(entropy).generate_state(1)[0])
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


@contextmanager
def apart(device: torch.device) -> Iterator[None]:
    """Random numbers drawn in this context have no effect outside: data and validation do not change the network's
    dropout."""
    before = random_state(device)
    try:
        yield
    finally:
        set_random_state(before, device)
