"""Named sizes of the networks: the one table that `model=NAME` on the command line, conf/model/ and plans read."""

from __future__ import annotations

from dataclasses import replace

from shapediff.models.dit3d import DiT3DConfig
from shapediff.models.octree_transformer import OctreeTransformerConfig
from shapediff.models.unet3d import UNet3DConfig
from shapediff.models.vae3d import VAE3DConfig
from shapediff.models.voxel_gan import VoxelGeneratorConfig

_DIT_SIZES = {
    "s": DiT3DConfig(hidden_size=384, depth=12, num_heads=6),
    "b": DiT3DConfig(hidden_size=768, depth=12, num_heads=12),
    "l": DiT3DConfig(hidden_size=1024, depth=24, num_heads=16),
    "xl": DiT3DConfig(hidden_size=1152, depth=28, num_heads=16),
}
"""Peebles and Xie 2023, table 1."""


def _dit(size: str, patch_size: int) -> DiT3DConfig:
    """A size with patches of 4 or 8 as published; patches of 2 make so many tokens that windows are needed at 64^3."""
    config = replace(_DIT_SIZES[size], patch_size=patch_size)
    return replace(config, positions="rope", window_size=8, global_every=4) if patch_size == 2 else config


PRESETS: dict[str, UNet3DConfig | DiT3DConfig | OctreeTransformerConfig | VAE3DConfig | VoxelGeneratorConfig] = {
    # For a CPU: 32^3 at the price of 16^3.
    "unet3d_small": UNet3DConfig(width=32, num_res_blocks=1),
    # For method=latent_diffusion with latents of 8^3 cells of 8 numbers.
    "unet3d_latent": UNet3DConfig(width=64, width_multipliers=(1, 2), attention_levels=(1,)),
    # For one GPU at 32^3 or 64^3.
    "unet3d_base": UNet3DConfig(),
    # As Dhariwal and Nichol 2021 built theirs: attention at two levels, resampling in blocks, dropout.
    "unet3d_large": UNet3DConfig(width=128, attention_levels=(1, 2), num_heads=8, dropout=0.1, resample_in_blocks=True),
    # For a CPU and for tests.
    "dit3d_small": DiT3DConfig(hidden_size=192, depth=6, num_heads=3),
    **{f"dit3d_{size}{patch_size}": _dit(size, patch_size) for size in _DIT_SIZES for patch_size in (2, 4, 8)},
    # For method=octree_autoregression.
    "octree_small": OctreeTransformerConfig(),
    "octree_base": OctreeTransformerConfig(hidden_size=512, depth=12, num_heads=8),
    # For method=shape_vae: 32^3 to 8^3 cells of 8 numbers.
    "vae3d_small": VAE3DConfig(),
    # 64^3 to 8^3 cells of 64.
    "vae3d_64": VAE3DConfig(patch_size=4, latent_channels=64, width=64),
    # For method=wgan_gp.
    "generator_small": VoxelGeneratorConfig(),
    "generator_base": VoxelGeneratorConfig(width=64),
}
