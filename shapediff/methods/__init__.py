"""Methods: a loss and a sampling recipe around one or more networks. `METHODS` names their configs."""

from __future__ import annotations

from shapediff.methods.base import LossOutput, Method, MethodConfig, SampleConfig
from shapediff.methods.octree_autoregression import OctreeAutoregression, OctreeAutoregressionConfig
from shapediff.methods.voxel_diffusion import VoxelDiffusion, VoxelDiffusionConfig

METHODS: dict[str, type[MethodConfig]] = {
    "voxel_diffusion": VoxelDiffusionConfig,
    "octree_autoregression": OctreeAutoregressionConfig,
}

__all__ = [
    "METHODS",
    "LossOutput",
    "Method",
    "MethodConfig",
    "OctreeAutoregression",
    "OctreeAutoregressionConfig",
    "SampleConfig",
    "VoxelDiffusion",
    "VoxelDiffusionConfig",
]
