"""Formats that hold the network as a graph of operators: torch.export, ONNX, TorchScript."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from ..files import replacing
from ..segmenter import Segmenter
from .formats import Inputs, Run
from .plain import plain_network


@dataclass(frozen=True)
class Program:
    """A program of `torch.export`: of fused operators, which ``import swin_kernels`` registers, or portable."""

    inputs: Inputs
    portable: bool
    output: str = "model.pt2"
    packages: tuple[str, ...] = ()

    def write(self, segmenter: Segmenter, folder: Path) -> None:
        example = self.inputs.example()
        with torch.no_grad(), _quiet():
            if self.portable:
                with plain_network(segmenter, example) as network:
                    program = torch.export.export(network, (example,), dynamic_shapes=_dynamic(self.inputs))
            else:
                # Not strict, the tracer puts classes of its own in place of the modules', and blocks that look at the
                # class of a norm before they fuse it do not.
                program = torch.export.export(
                    segmenter.network, (example,), dynamic_shapes=_dynamic(self.inputs), strict=True
                )
            content = io.BytesIO()
            torch.export.save(program, content)
        _write(content, folder / self.output)

    def load(self, folder: Path) -> Run:
        with _quiet():
            return torch.export.load(folder / self.output).module()


@dataclass(frozen=True)
class Onnx:
    """An ONNX model with the input ``image`` and the output ``logits``, run here by ONNX Runtime."""

    inputs: Inputs
    opset: int
    output: str = "model.onnx"
    packages: tuple[str, ...] = ("onnx", "onnxscript", "onnxruntime")
    portable: bool = True

    def write(self, segmenter: Segmenter, folder: Path) -> None:
        example = self.inputs.example()
        with plain_network(segmenter, example) as network, _quiet():
            torch.onnx.export(
                network,
                (example,),
                folder / self.output,
                dynamo=True,
                dynamic_shapes=_dynamic(self.inputs),
                input_names=["image"],
                output_names=["logits"],
                opset_version=self.opset,
                external_data=False,
                verbose=False,
            )

    def load(self, folder: Path) -> Run:
        import onnxruntime

        session = onnxruntime.InferenceSession(folder / self.output, providers=["CPUExecutionProvider"])
        return lambda image: torch.from_numpy(session.run(["logits"], {"image": image.numpy()})[0])


@dataclass(frozen=True)
class TorchScript:
    """A trace of `torch.jit`, for LibTorch and what reads MONAI's ``model.ts``."""

    inputs: Inputs
    output: str = "model.ts"
    packages: tuple[str, ...] = ()
    portable: bool = True

    def write(self, segmenter: Segmenter, folder: Path) -> None:
        example = self.inputs.example()
        with plain_network(segmenter, example) as network, _quiet():
            content = io.BytesIO()
            torch.jit.save(torch.jit.trace(network, example, check_trace=False), content)
        _write(content, folder / self.output)

    def load(self, folder: Path) -> Run:
        with _quiet():
            return torch.jit.load(folder / self.output)


def _dynamic(inputs: Inputs) -> tuple[dict[int, torch.export.Dim]] | None:
    """Which part of the image's shape is free, for `torch.export`."""
    return ({0: torch.export.Dim("batch", min=1)},) if inputs.batch is None else None


def _write(content: io.BytesIO, path: Path) -> None:
    """Write what PyTorch made in memory: given a path, its writer aborts the process if the disk is full."""
    with replacing(path) as file:
        file.write(content.getbuffer())


@contextmanager
def _quiet() -> Iterator[None]:
    """Exporters warn about their internals. What users need to know is whether the file is right, and that is
    checked."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
