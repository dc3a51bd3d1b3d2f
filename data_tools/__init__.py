"""The command-line tools that turn meshes and grids into data sets, and check them."""
