"""`graphed`: a network whose inference is one launch of a CUDA graph.

A Swin UNETR launches hundreds of kernels per volume, and the processor may take longer to launch them than a GPU to run
them. A CUDA graph records them once and launches them all together.
"""

from __future__ import annotations

import logging
import warnings
from collections import OrderedDict
from collections.abc import Callable

import torch
import torch.nn as nn
from torch.utils._pytree import tree_map_only

log = logging.getLogger("swin_kernels")

WARM_UPS = 2
"""Calls before the capture, in which libraries choose their algorithms and kernels are compiled."""


class Graphed:
    """What `graphed` returns; call it as the network.

    Attributes:
        model: the network.
        most_graphs: graphs that are kept, one for each kind of input; the least recently used one is dropped.
    """

    def __init__(self, model: nn.Module, most_graphs: int = 4) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"graphed: model is a {type(model).__name__}; accepted is a torch.nn.Module")
        if not isinstance(most_graphs, int) or isinstance(most_graphs, bool) or most_graphs < 1:
            raise ValueError(f"graphed: most_graphs is {most_graphs!r}; accepted is an int of at least 1")
        self.model, self.most_graphs = model, most_graphs
        self._replays: OrderedDict[tuple, Callable[[torch.Tensor], object]] = OrderedDict()
        self._weights: list[int] = []
        self._said: set[str] = set()

    def __call__(self, x: torch.Tensor) -> object:
        """``model(x)``; later calls do not overwrite the results."""
        if reason := self._why_not(x):
            if reason not in self._said:
                self._said.add(reason)
                warnings.warn(f"graphed: this call runs without a CUDA graph: {reason}", stacklevel=2)
            return self.model(x)
        self._forget_moved_weights()
        key = self._key(x)
        if key not in self._replays:
            log.info("graphed: capturing a CUDA graph for %s %s", tuple(x.shape), x.dtype)
            self._replays[key] = capture(self.model, x)
            if len(self._replays) > self.most_graphs:
                self._replays.popitem(last=False)
        self._replays.move_to_end(key)
        return self._replays[key](x)

    def _why_not(self, x: torch.Tensor) -> str | None:
        """Why a call cannot run as a graph, or None."""
        if not isinstance(x, torch.Tensor) or x.device.type != "cuda":
            return f"x is on {getattr(x, 'device', type(x).__name__)}, graphs run on cuda"
        if torch.is_grad_enabled():
            return "gradients may be recorded; use torch.no_grad() or torch.inference_mode()"
        if self.model.training:
            return "model is in training mode; use model.eval()"
        if torch.cuda.is_current_stream_capturing():
            return "another graph is being captured"
        return None

    def _key(self, x: torch.Tensor) -> tuple:
        """What a graph depends on, besides the weights."""
        return (
            *(x.shape, x.stride(), x.dtype, x.device),
            *(torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")),
            *(torch.is_inference_mode_enabled(), torch.backends.cudnn.benchmark),
        )

    def _forget_moved_weights(self) -> None:
        """Drop all graphs if weights have moved: a graph sees new values, but reads them where the weights were."""
        weights = [t.data_ptr() for t in (*self.model.parameters(), *self.model.buffers())]
        if weights != self._weights:
            self._replays.clear()
            self._weights = weights


def capture(model: nn.Module, x: torch.Tensor) -> Callable[[torch.Tensor], object]:
    """A function that copies its argument to where the captured `model` reads its input, and replays the graph."""
    with torch.inference_mode(False):
        held = x.clone()
    cached = torch.is_autocast_cache_enabled()
    # Weights that autocast casts and caches would lie in the graph's memory, or be gone when it runs.
    torch.set_autocast_cache_enabled(False)
    torch.clear_autocast_cache()
    try:
        with torch.cuda.device(x.device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(WARM_UPS):
                    model(held)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = model(held)
    finally:
        torch.set_autocast_cache_enabled(cached)

    def replay(x: torch.Tensor) -> object:
        with torch.cuda.device(held.device):
            held.copy_(x)
            graph.replay()
            return tree_map_only(torch.Tensor, torch.clone, captured)

    return replay


def graphed(model: nn.Module, *, most_graphs: int = 4) -> Graphed:
    """`model` for inference on a GPU, as CUDA graphs: one launch per call instead of hundreds.

    The first call with a shape, dtype, memory format or autocast setting captures a graph, which takes as long as a
    few calls; later calls replay it. Values that are written to the weights in place (``load_state_dict``) are seen;
    weights that move (``to``) make it capture new graphs. What a call does on the processor, in hooks for instance,
    happens only during the capture. A call that cannot run as a graph (on the CPU, in training mode, with gradients)
    runs `model` itself and says so once, in a warning.

    Args:
        model: takes one tensor and returns a tensor, or tuples, lists and dicts of tensors.
        most_graphs: graphs that are kept, each with the memory that a call needs.

    Returns:
        A callable, to be used where networks are called, as in `monai.inferers.sliding_window_inference`. It is not a
        module: train, save and load `model`.

    Raises:
        TypeError: `model` is not a module.
        ValueError: `most_graphs` is not an int of at least 1.
    """
    return Graphed(model, most_graphs)
