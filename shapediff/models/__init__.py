"""Denoisers, networks `net(x_t, t, label) -> like x_t` that know nothing of diffusion; a transformer; an autoencoder; a GAN.

`MODELS` names their configs, `PRESETS` sizes of them; `describe` says what one costs.
"""

from __future__ import annotations

from shapediff.models.description import Description, describe
from shapediff.models.dit3d import DiT3D, DiT3DConfig
from shapediff.models.octree_transformer import OctreeTransformer, OctreeTransformerConfig
from shapediff.models.presets import PRESETS
from shapediff.models.unet3d import UNet3D, UNet3DConfig
from shapediff.models.vae3d import VAE3D, VAE3DConfig
from shapediff.models.voxel_gan import VoxelCritic, VoxelCriticConfig, VoxelGenerator, VoxelGeneratorConfig

DenoiserConfig = UNet3DConfig | DiT3DConfig
ModelConfig = DenoiserConfig | OctreeTransformerConfig | VAE3DConfig | VoxelGeneratorConfig

MODELS: dict[str, type[ModelConfig]] = {
    "unet3d": UNet3DConfig,
    "dit3d": DiT3DConfig,
    "octree_transformer": OctreeTransformerConfig,
    "vae3d": VAE3DConfig,
    "voxel_generator": VoxelGeneratorConfig,
}

__all__ = [
    "MODELS",
    "PRESETS",
    "VAE3D",
    "DenoiserConfig",
    "Description",
    "DiT3D",
    "DiT3DConfig",
    "ModelConfig",
    "OctreeTransformer",
    "OctreeTransformerConfig",
    "UNet3D",
    "UNet3DConfig",
    "VAE3DConfig",
    "VoxelCritic",
    "VoxelCriticConfig",
    "VoxelGenerator",
    "VoxelGeneratorConfig",
    "describe",
]
