"""Swin UNETR with MONAI's interface, parameters and results, on `swin_kernels.modules`.

Source: Hatamizadeh et al., "Swin UNETR", https://arxiv.org/abs/2201.01266. Constructor arguments, state
dict keys, initial values under a seed and computed values are those of MONAI 1.6.1's
`monai.networks.nets.SwinUNETR`; the convolution blocks are MONAI's with another ``forward``.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn as nn
from monai.networks.blocks import PatchEmbed, UnetOutBlock, UnetrBasicBlock, UnetResBlock, UnetrUpBlock
from monai.networks.nets import swin_unetr as monai_swin_unetr
from monai.utils import ensure_tuple_rep, look_up_option

from swin_kernels import convolution_blocks, modules


class ResidualBlock(convolution_blocks.ResidualBlock, UnetResBlock):
    """MONAI's `UnetResBlock` with fused norms."""


class EncoderBlock(UnetrBasicBlock):
    """MONAI's `UnetrBasicBlock` around a `ResidualBlock`."""

    def __init__(self, spatial_dims: int, in_channels: int, out_channels: int, norm_name: tuple | str) -> None:
        super().__init__(spatial_dims, in_channels, out_channels, 3, 1, norm_name, res_block=True)
        self.layer.__class__ = ResidualBlock


class DecoderBlock(convolution_blocks.UpBlock, UnetrUpBlock):
    """MONAI's `UnetrUpBlock` around a `ResidualBlock`."""

    def __init__(self, spatial_dims: int, in_channels: int, out_channels: int, norm_name: tuple | str) -> None:
        super().__init__(spatial_dims, in_channels, out_channels, 3, 2, norm_name, res_block=True)
        self.conv_block.__class__ = ResidualBlock


class OutBlock(convolution_blocks.OutBlock, UnetOutBlock):
    """MONAI's `UnetOutBlock`."""


class SwinTransformer(modules.SwinTransformer):
    """The encoder of Swin UNETR: patch embedding and four stages, Hyena stages being MONAI's."""

    def __init__(
        self,
        in_chans: int,
        embed_dim: int,
        window_size: Sequence[int],
        patch_size: Sequence[int],
        depths: Sequence[int],
        num_heads: Sequence[int],
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer: type[nn.LayerNorm] = nn.LayerNorm,
        patch_norm: bool = False,
        use_checkpoint: bool = False,
        spatial_dims: int = 3,
        downsample: str | type[nn.Module] = "merging",
        use_v2: bool = False,
        use_hyena: bool = False,
        hyena_stages: Sequence[bool] | None = None,
        hyena_options: Mapping[str, object] | None = None,
    ) -> None:
        """
        Args:
            in_chans: channels of the image.
            embed_dim: channels of the first stage.
            window_size, patch_size: one extent per spatial axis.
            depths, num_heads: one per stage, of which there are four.
            hyena_options: the ``hyena_*`` arguments of MONAI's `BasicLayer`, by name.

            The others are `SwinUNETR`'s.

        Raises:
            ValueError: `downsample`, `depths` or `hyena_stages` not accepted.
            ImportError: a Hyena stage without MONAI ≥ 1.6 or without ``nvsubquadratic``.
        """
        if len(depths) != 4 or len(num_heads) != 4:
            raise ValueError(
                f"SwinTransformer: depths is {tuple(depths)}, num_heads {tuple(num_heads)}; accepted are 4 entries each"
            )
        is_hyena = [use_hyena] * 4 if hyena_stages is None else [bool(stage) for stage in hyena_stages]
        if len(is_hyena) != 4:
            raise ValueError(f"hyena_stages must have length 4 (one bool per Swin stage); got length {len(is_hyena)}.")
        dims = [embed_dim * 2**i for i in range(4)]
        divisor = 6 if spatial_dims == 3 else 4
        for i in range(4):
            if is_hyena[i] and dims[i] % divisor:
                raise ValueError(
                    f"For {spatial_dims}D Hyena, embed_dim * 2^layer must be divisible by {divisor}. "
                    f"At layer {i}, dim={dims[i]} is not."
                )
        merging = look_up_option(downsample, modules.MERGING_MODES) if isinstance(downsample, str) else downsample

        # Parts are built in upstream's order: a seed then gives upstream's parameters.
        norm = cast(type[nn.LayerNorm], norm_layer if patch_norm else None)  # MONAI's annotation leaves out None
        patch_embed = PatchEmbed(patch_size, in_chans, embed_dim, norm, spatial_dims)
        drop_path = torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist()
        stages, residual_blocks = [], []
        for i, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
            stage = partial(_hyena_stage, **hyena_options or {}) if is_hyena[i] else modules.BasicLayer
            stages.append(
                stage(
                    dim=dim,
                    depth=depth,
                    num_heads=num_heads[i],
                    window_size=window_size,
                    drop_path=drop_path[sum(depths[:i]) : sum(depths[: i + 1])],
                    mlp_ratio=mlp_ratio,
                    qkv_bias=qkv_bias,
                    drop=drop_rate,
                    attn_drop=attn_drop_rate,
                    norm_layer=norm_layer,
                    downsample=merging,
                    use_checkpoint=use_checkpoint,
                )
            )
            if use_v2:
                residual_blocks.append(EncoderBlock(spatial_dims, dim, dim, "instance"))
        super().__init__(patch_embed, stages, residual_blocks if use_v2 else None, drop_rate)
        self.embed_dim = embed_dim
        self.patch_size = patch_size
        self.window_size = window_size
        self.num_features = dims[-1]


def _hyena_stage(**options: Any) -> nn.Module:
    """A stage of MONAI's HyenaTransformerBlocks."""
    try:
        from monai.networks.blocks import hyena  # noqa: F401
    except ImportError as error:
        raise ImportError("SwinUNETR: Hyena stages need MONAI 1.6 or newer") from error
    return monai_swin_unetr.BasicLayer(use_hyena=True, **options)


class SwinUNETR(nn.Module):
    """A Swin Transformer encoder, convolution blocks on its features and on the image, and a U-shaped decoder."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        patch_size: int = 2,
        depths: Sequence[int] = (2, 2, 2, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: Sequence[int] | int = 7,
        qkv_bias: bool = True,
        mlp_ratio: float = 4.0,
        feature_size: int = 24,
        norm_name: tuple | str = "instance",
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        dropout_path_rate: float = 0.0,
        normalize: bool = True,
        norm_layer: type[nn.LayerNorm] = nn.LayerNorm,
        patch_norm: bool = False,
        use_checkpoint: bool = False,
        spatial_dims: int = 3,
        downsample: str | type[nn.Module] = "merging",
        use_v2: bool = False,
        use_hyena: bool = False,
        hyena_stages: Sequence[bool] | None = None,
        hyena_kernel_size: int = 3,
        hyena_kernel_mlp_dim: int = 32,
        hyena_kernel_layers: int = 3,
        hyena_mask_max_attenuation: float = 0.95,
        hyena_fft_padding: str = "circular",
        hyena_grid_type: str = "single",
        hyena_use_chunked_fft: bool = False,
        hyena_use_fft_short_conv: bool = False,
        hyena_omega_0: float = 10.0,
        hyena_l_cache: int = 32,
        hyena_short_conv_fft_chunks: int = 0,
        use_flash_attention: bool = False,
    ) -> None:
        """
        Args:
            in_channels: channels of the image.
            out_channels: channels of the prediction.
            patch_size: extent of a patch; with the four mergings, image extents must divide by
                ``patch_size ** 5``.
            depths: blocks per stage, four entries.
            num_heads: attention heads per stage, four entries.
            window_size: nominal window in tokens, an int or one per axis.
            qkv_bias: whether the projection to queries, keys and values has a bias.
            mlp_ratio: hidden channels of the MLPs over their input's.
            feature_size: channels of the first stage, a multiple of 12.
            norm_name: norm of the convolution blocks, as MONAI names it.
            drop_rate: dropout of embedding, projections and MLPs.
            attn_drop_rate: dropout of attention weights.
            dropout_path_rate: stochastic depth of the last block; earlier ones have less, linearly from 0.
            normalize: norm each feature map over its channels before the decoder.
            norm_layer: norm of the transformer, called with a number of channels.
            patch_norm: norm after the patch embedding.
            use_checkpoint: recompute blocks in the backward pass: less memory, more time.
            spatial_dims: 2 or 3.
            downsample: ``"merging"`` (MONAI ≥ 1.5), ``"mergingv2"``, ``"merging_legacy"`` (MONAI's
                ``"merging"`` of 0.9 to 1.4: the order the published weights were trained with), or a
                module class called with ``dim=, norm_layer=, spatial_dims=``.
            use_v2: a residual convolution block before each stage (SwinUNETR-V2).
            use_hyena, hyena_stages: use MONAI's HyenaTransformerBlock in every stage, or in those marked
                True; needs MONAI ≥ 1.6 and the package ``nvsubquadratic``.
            hyena_kernel_size, hyena_kernel_mlp_dim, hyena_kernel_layers, hyena_mask_max_attenuation,
                hyena_fft_padding, hyena_grid_type, hyena_use_chunked_fft, hyena_use_fft_short_conv,
                hyena_omega_0, hyena_l_cache, hyena_short_conv_fft_chunks: handed to that block.
            use_flash_attention: accepted for MONAI's sake, without effect: attention is always fused,
                in training too.

        Raises:
            ValueError: an argument outside of what is accepted.
            ImportError: Hyena stages without the packages they need.
        """
        super().__init__()
        if spatial_dims not in (2, 3):
            raise ValueError("spatial dimension should be 2 or 3.")
        if not 0 <= drop_rate <= 1:
            raise ValueError("dropout rate should be between 0 and 1.")
        if not 0 <= attn_drop_rate <= 1:
            raise ValueError("attention dropout rate should be between 0 and 1.")
        if not 0 <= dropout_path_rate <= 1:
            raise ValueError("drop path rate should be between 0 and 1.")
        if feature_size % 12:
            raise ValueError("feature_size should be divisible by 12.")

        self.patch_size = patch_size
        self.normalize = normalize
        self.swinViT = SwinTransformer(
            in_chans=in_channels,
            embed_dim=feature_size,
            window_size=ensure_tuple_rep(window_size, spatial_dims),
            patch_size=ensure_tuple_rep(patch_size, spatial_dims),
            depths=depths,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            qkv_bias=qkv_bias,
            drop_rate=drop_rate,
            attn_drop_rate=attn_drop_rate,
            drop_path_rate=dropout_path_rate,
            norm_layer=norm_layer,
            patch_norm=patch_norm,
            use_checkpoint=use_checkpoint,
            spatial_dims=spatial_dims,
            downsample=downsample,
            use_v2=use_v2,
            use_hyena=use_hyena,
            hyena_stages=hyena_stages,
            hyena_options={
                "hyena_kernel_size": hyena_kernel_size,
                "hyena_kernel_mlp_dim": hyena_kernel_mlp_dim,
                "hyena_kernel_layers": hyena_kernel_layers,
                "hyena_mask_max_attenuation": hyena_mask_max_attenuation,
                "hyena_fft_padding": hyena_fft_padding,
                "hyena_grid_type": hyena_grid_type,
                "hyena_use_chunked_fft": hyena_use_chunked_fft,
                "hyena_use_fft_short_conv": hyena_use_fft_short_conv,
                "hyena_omega_0": hyena_omega_0,
                "hyena_l_cache": hyena_l_cache,
                "hyena_short_conv_fft_chunks": hyena_short_conv_fft_chunks,
            },
        )

        encoder = partial(EncoderBlock, spatial_dims, norm_name=norm_name)
        decoder = partial(DecoderBlock, spatial_dims, norm_name=norm_name)
        f = feature_size
        self.encoder1 = encoder(in_channels, f)
        self.encoder2 = encoder(f, f)
        self.encoder3 = encoder(2 * f, 2 * f)
        self.encoder4 = encoder(4 * f, 4 * f)
        self.encoder10 = encoder(16 * f, 16 * f)
        self.decoder5 = decoder(16 * f, 8 * f)
        self.decoder4 = decoder(8 * f, 4 * f)
        self.decoder3 = decoder(4 * f, 2 * f)
        self.decoder2 = decoder(2 * f, f)
        self.decoder1 = decoder(f, f)
        self.out = OutBlock(spatial_dims, f, out_channels)

    def load_from(self, weights: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        """Copy encoder weights in the layout of the published ``model_swinvit.pt``, as MONAI's method does.

        `load_pretrained` reads more layouts, checks them and reports. Hyena stages keep their blocks, with
        a warning.

        Args:
            weights: ``{"state_dict": {"module.…": tensor}}``.
        """
        source = weights["state_dict"]

        def copy(target: nn.Module, root: str) -> None:
            for name, value in target.state_dict(keep_vars=True).items():
                value.copy_(source[f"{root}.{name}"])

        with torch.no_grad():
            copy(self.swinViT.get_submodule("patch_embed.proj"), "module.patch_embed.proj")
            for layer in ("layers1", "layers2", "layers3", "layers4"):
                stage = getattr(self.swinViT, layer)[0]
                if isinstance(stage, modules.BasicLayer):
                    for name, block in stage.blocks.named_children():
                        cast(modules.SwinTransformerBlock, block).load_from(weights, n_block=name, layer=layer)
                else:
                    warnings.warn(
                        f"load_from: {layer} has Hyena blocks, for which there are no weights; "
                        "they keep their initial values",
                        stacklevel=2,
                    )
                if stage.downsample is not None:
                    copy(stage.downsample, f"module.{layer}.0.downsample")

    def _check_input_size(self, spatial_shape: Sequence[int]) -> None:
        """Raise `ValueError` unless every extent divides by ``patch_size ** 5``."""
        divisors = [size**5 for size in ensure_tuple_rep(self.patch_size, len(spatial_shape))]
        wrong = [i + 2 for i, (extent, d) in enumerate(zip(spatial_shape, divisors, strict=True)) if extent % d]
        if wrong:
            raise ValueError(
                f"spatial dimensions {wrong} of input image (spatial shape: {tuple(spatial_shape)})"
                f" must be divisible by {self.patch_size}**5."
            )

    def forward(self, x_in: torch.Tensor) -> torch.Tensor:
        """Logits ``(B, out_channels, *extents)`` of an image ``(B, in_channels, *extents)``.

        Raises:
            ValueError: an extent does not divide by ``patch_size ** 5``.
        """
        self._check_input_size(x_in.shape[2:])
        features = self.swinViT(x_in, self.normalize)  # 5 × (B, 2^i · C, *extents / 2^(i + 1))
        dec = self.decoder5(self.encoder10(features[4]), features[3])
        dec = self.decoder4(dec, self.encoder4(features[2]))
        dec = self.decoder3(dec, self.encoder3(features[1]))
        dec = self.decoder2(dec, self.encoder2(features[0]))
        dec = self.decoder1(dec, self.encoder1(x_in))
        return self.out(dec)
