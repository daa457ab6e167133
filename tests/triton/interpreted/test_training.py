"""The model trains through the Triton kernels as on the reference: autocast, compile, checkpoint, data parallel."""

from __future__ import annotations

import gc
import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel

from swin_kernels import modules, use_backend
from swin_unetr import SwinUNETR


def model(**options) -> SwinUNETR:
    """A tiny 2D Swin UNETR: windows of 4², 32 of them at the first stage of a 32 × 64 image."""
    torch.manual_seed(0)
    return SwinUNETR(
        1, 2, feature_size=12, num_heads=(1, 1, 1, 1), depths=(2, 1, 1, 1), window_size=4, spatial_dims=2, **options
    )


def image() -> torch.Tensor:
    return torch.randn(1, 1, 32, 64, generator=torch.Generator().manual_seed(1))


def gradients(net: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Output of `net` and the gradients of its parameters after one backward."""
    net.zero_grad()
    out = net(x)
    out.float().square().mean().backward()
    return [out.detach().float(), *(p.grad.float() for p in net.parameters() if p.grad is not None)]


def on_reference(net: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    with use_backend("reference"):
        return gradients(net, x)


def test_steps_reduce_the_loss():
    net, x = model(), image()
    target = (x > 0).long()[:, 0]
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > losses[1]


def test_checkpointed_model():
    x = image()
    for value, expected in zip(gradients(model(use_checkpoint=True), x), on_reference(model(), x), strict=True):
        assert (value - expected).norm() <= 1e-3 * expected.norm()  # instance norms of few voxels amplify rounding


def block(**options) -> nn.Module:
    torch.manual_seed(0)
    return modules.SwinTransformerBlock(16, 2, (3, 2), (1, 1), qkv_bias=True, **options)


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randn(1, 4, 5, 16, generator=torch.Generator().manual_seed(2))


def test_autocast(tokens):
    """float16 kernels under autocast, gradients in the float32 of the parameters."""
    net = block()
    with torch.autocast("cpu", dtype=torch.float16):
        values = gradients(net, tokens)
    for value, expected in zip(values, on_reference(net, tokens), strict=True):
        assert (value - expected).norm() <= 1e-2 * expected.norm()


def test_compiled(tokens):
    net = block()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradients(compiled, tokens), on_reference(net, tokens), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_attention_with_dropout(tokens, reentrant):
    """The recomputed forward draws the same dropout mask."""
    net = block(attn_drop=0.5)

    def checkpointed(x):
        return torch.utils.checkpoint.checkpoint(net, x, use_reentrant=reentrant)

    results = []
    for run in (net, checkpointed):
        torch.manual_seed(3)
        net.zero_grad()
        x = tokens.clone().requires_grad_()
        run(x).square().sum().backward()
        results.append([x.grad, *(p.grad.clone() for p in net.parameters())])
    torch.testing.assert_close(*results)


def test_distributed_data_parallel(tmp_path):
    """Two processes, each half of the batch: their gradients are those of the whole batch in one."""
    root = Path(__file__).parents[3]
    # They meet through a file: a port that was free when we looked may be taken by the time they bind it.
    command = [sys.executable, "-m", __name__, str(tmp_path / "store")]
    logs = [tmp_path / f"rank{rank}.log" for rank in range(2)]
    processes = []
    for rank, log in enumerate(logs):
        with log.open("w") as file:
            processes.append(subprocess.Popen([*command, str(rank)], cwd=root, stdout=file, stderr=subprocess.STDOUT))
    try:
        codes = [process.wait(timeout=300) for process in processes]
    except subprocess.TimeoutExpired:
        codes = ["timed out"]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0, 0], "\n".join(log.read_text() for log in logs)


def _run_rank() -> None:
    importlib.import_module("tests.triton.interpreted.conftest")  # its settings of the interpreter
    store, rank = sys.argv[1:]
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=int(rank), world_size=2)
    batch = torch.randn(2, 4, 5, 16, generator=torch.Generator().manual_seed(2))
    net = block()
    whole = on_reference(net, batch)[1:]
    with use_backend("triton"):
        mine = gradients(DistributedDataParallel(net), batch[int(rank)][None])[1:]
    torch.testing.assert_close(mine, whole, rtol=1e-4, atol=1e-5)
    # Ending the group waits for its threads, which may need the interpreter's lock to release the last work.
    torch.distributed.barrier()
    gc.collect()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    _run_rank()
