"""Methods: a loss and a sampling recipe around one or more networks. `METHODS` names their configs."""

from __future__ import annotations

from shapediff.methods.base import LossOutput, Method, MethodConfig, SampleConfig, Turn
from shapediff.methods.octree_autoregression import OctreeAutoregression, OctreeAutoregressionConfig
from shapediff.methods.voxel_diffusion import VoxelDiffusion, VoxelDiffusionConfig
from shapediff.methods.wgan_gp import WganGp, WganGpConfig

METHODS: dict[str, type[MethodConfig]] = {
    "voxel_diffusion": VoxelDiffusionConfig,
    "octree_autoregression": OctreeAutoregressionConfig,
    "wgan_gp": WganGpConfig,
}

__all__ = [
    "METHODS",
    "LossOutput",
    "Method",
    "MethodConfig",
    "OctreeAutoregression",
    "OctreeAutoregressionConfig",
    "SampleConfig",
    "Turn",
    "VoxelDiffusion",
    "VoxelDiffusionConfig",
    "WganGp",
    "WganGpConfig",
]
