"""Meshes and grids: read and normalise, voxelize, extract surfaces, write, draw. open3d, trimesh and numba load on first use."""
