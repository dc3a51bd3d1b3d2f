"""Methods: a loss and a sampling recipe around one or more networks. `METHODS` names their configs."""

from __future__ import annotations

from shapediff.methods.base import LossOutput, Method, MethodConfig, SampleConfig, Turn
from shapediff.methods.latent_diffusion import LatentDiffusion, LatentDiffusionConfig
from shapediff.methods.octree_autoregression import OctreeAutoregression, OctreeAutoregressionConfig
from shapediff.methods.shape_vae import ShapeVAE, ShapeVAEConfig
from shapediff.methods.voxel_diffusion import VoxelDiffusion, VoxelDiffusionConfig
from shapediff.methods.wgan_gp import WganGp, WganGpConfig

METHODS: dict[str, type[MethodConfig]] = {
    "voxel_diffusion": VoxelDiffusionConfig,
    "octree_autoregression": OctreeAutoregressionConfig,
    "shape_vae": ShapeVAEConfig,
    "latent_diffusion": LatentDiffusionConfig,
    "wgan_gp": WganGpConfig,
}

__all__ = [
    "METHODS",
    "LatentDiffusion",
    "LatentDiffusionConfig",
    "LossOutput",
    "Method",
    "MethodConfig",
    "OctreeAutoregression",
    "OctreeAutoregressionConfig",
    "SampleConfig",
    "ShapeVAE",
    "ShapeVAEConfig",
    "Turn",
    "VoxelDiffusion",
    "VoxelDiffusionConfig",
    "WganGp",
    "WganGpConfig",
]
