"""The weights alone, as safetensors: readable without running code, with everything else about the network as JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save

from ..loading import load_pretrained
from ..segmenter import Description, Segmenter
from .formats import Run


@dataclass(frozen=True)
class Safetensors:
    """A state dict of `SwinUNETR`; the header has architecture, labels, preprocessing and roi, JSON each."""

    output: str = "model.safetensors"
    packages: tuple[str, ...] = ()
    portable: bool = True

    def write(self, segmenter: Segmenter, folder: Path) -> None:
        header = {name: json.dumps(value) for name, value in segmenter.description.plain().items()}
        content = save(dict(segmenter.state), metadata={"format": "pt", **header})
        (folder / self.output).write_bytes(content)

    def load(self, folder: Path) -> Run:
        path = folder / self.output
        with safe_open(path, framework="pt") as file:
            description = {name: json.loads(text) for name, text in file.metadata().items() if name != "format"}
        network = Description.of(description).architecture.build()
        load_pretrained(network, path, verbose=False)
        return network.eval()
