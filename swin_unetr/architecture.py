"""The network that a command trains or loads, as options that travel with its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from . import lazily

if lazily.MYPY:
    import torch

    from . import model
else:
    torch = lazily.Module("torch")
    model = lazily.Module("swin_unetr.model")

LARGEST_FEATURE_SIZE = 1536
LARGEST = {"in_channels": 1024, "out_channels": 1024, "window_size": 64}
"""Larger networks fit into no machine's memory."""
MOST_BLOCKS = 64
"""Most blocks of a stage."""


@dataclass(frozen=True)
class Architecture:
    """Swin UNETR's size and kind; fields are `SwinUNETR`'s arguments of the same name.

    Args:
        in_channels: channels of the image.
        out_channels: channels of the output.
        feature_size: channels of the first stage.
        depths: blocks of each stage.
        num_heads: attention heads of each stage.
        window_size: tokens of a window on each axis.
        spatial_dims: 2 or 3.
        use_v2: a residual convolution block before each stage (SwinUNETR-V2).
        downsample: order of the patch merging; merging_legacy is what weights trained with MONAI < 1.5 need.
        use_checkpoint: recompute activations in the backward pass, to save memory.
        drop_rate: dropout of tokens.
        attn_drop_rate: dropout of attention weights.
        dropout_path_rate: stochastic depth.
    """

    in_channels: int = 1
    out_channels: int = 2
    feature_size: int = 48
    depths: tuple[int, int, int, int] = (2, 2, 2, 2)
    num_heads: tuple[int, int, int, int] = (3, 6, 12, 24)
    window_size: int = 7
    spatial_dims: Literal[2, 3] = 3
    use_v2: bool = False
    downsample: Literal["merging", "mergingv2", "merging_legacy"] = "merging"
    use_checkpoint: bool = False
    drop_rate: float = 0.0
    attn_drop_rate: float = 0.0
    dropout_path_rate: float = 0.0

    def __post_init__(self) -> None:
        for name, largest in LARGEST.items():
            if not 1 <= getattr(self, name) <= largest:
                raise ValueError(f"{name} is {getattr(self, name)}; accepted are 1 to {largest}")
        if not 12 <= self.feature_size <= LARGEST_FEATURE_SIZE or self.feature_size % 12:
            raise ValueError(
                f"feature_size is {self.feature_size}; accepted are multiples of 12 up to {LARGEST_FEATURE_SIZE}"
            )
        if len(self.depths) != 4 or not all(1 <= blocks <= MOST_BLOCKS for blocks in self.depths):
            raise ValueError(
                f"depths is {tuple(self.depths)}; accepted are 4 numbers of blocks from 1 to {MOST_BLOCKS}, one a stage"
            )
        channels = [self.feature_size * 2**stage for stage in range(4)]
        if len(self.num_heads) != 4 or any(
            heads < 1 or dim % heads for dim, heads in zip(channels, self.num_heads, strict=True)
        ):
            raise ValueError(
                f"num_heads is {tuple(self.num_heads)}; accepted are 4 numbers ≥ 1, one a stage, that divide the "
                f"stages' channels {tuple(channels)}"
            )
        if self.spatial_dims not in (2, 3):
            raise ValueError(f"spatial_dims is {self.spatial_dims}; accepted are 2 and 3")
        if self.downsample not in ("merging", "mergingv2", "merging_legacy"):
            raise ValueError(
                f"downsample is {self.downsample!r}; accepted are 'merging', 'mergingv2' and 'merging_legacy'"
            )
        for name in ("drop_rate", "attn_drop_rate", "dropout_path_rate"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; accepted is a probability from 0, below 1")

    def build(self, state: Mapping[str, torch.Tensor] | None = None) -> model.SwinUNETR:
        """A network with the weights of `state`, or fresh ones, drawn from PyTorch's generator.

        Its weights are float32, in channels-last order, in which convolutions of few channels run faster. Those that
        are so in `state` are not copied.

        Raises:
            RuntimeError: `state` is not a state dict of this network.
        """
        if state is None:
            network = model.SwinUNETR(**self.__dict__)
        else:
            with torch.device("meta"):  # no weights are drawn or copied
                network = model.SwinUNETR(**self.__dict__)
            kinds = {name: value.dtype for name, value in network.state_dict().items()}
            given = {n: v.to(kinds.get(n)) if v.is_floating_point() else v for n, v in state.items()}
            network.load_state_dict(given, assign=True)
        order = {2: torch.channels_last, 3: torch.channels_last_3d}[self.spatial_dims]
        return network.to(memory_format=order)  # type: ignore[call-overload]  # PyTorch's stubs lack memory_format
