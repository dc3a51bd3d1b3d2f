"""The loops of voxelization, compiled by numba. Coordinates are in voxels: voxel i has its centre at i + 0.5."""
