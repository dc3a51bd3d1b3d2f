"""Pictures without a display or a GPU: of meshes, of grids, many on one sheet, turning."""

from shapediff.geometry.camera import BACKGROUND, COLOUR, PALETTE, Colour, Picture
from shapediff.geometry.raycast import render_mesh
from shapediff.geometry.raymarch import render_voxels
from shapediff.geometry.sheets import blank, contact_sheet, save_gif, save_png
from shapediff.geometry.turntable import turntable

__all__ = [
    "BACKGROUND",
    "COLOUR",
    "PALETTE",
    "Colour",
    "Picture",
    "blank",
    "contact_sheet",
    "render_mesh",
    "render_voxels",
    "save_gif",
    "save_png",
    "turntable",
]
