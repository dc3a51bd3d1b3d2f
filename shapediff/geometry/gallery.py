"""The pictures of a set of shapes: a contact sheet, a turntable, a page."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from shapediff.files import replaced_file
from shapediff.geometry.camera import PALETTE, Colour, Picture

if TYPE_CHECKING:
    import trimesh

SHEET_FILE, TURNTABLE_FILE, PAGE_FILE = "preview.png", "turntable.gif", "shapes.html"
SHEET_SIZE = 256
MAX_TURNING = 32
"""More shapes than this are too many for one GIF: it would take tens of megabytes."""
_TURNTABLE_SIZES = ((4, 256), (16, 192), (MAX_TURNING, 144))  # up to so many shapes, so many pixels each


@dataclass
class Gallery:
    """Collects shapes as they come, then writes the pictures that are wanted."""

    sheet: bool = False
    turntable: bool = False
    page: bool = False
    columns: int = 8
    _meshes: list[trimesh.Trimesh | None] = field(default_factory=list)
    _names: list[str] = field(default_factory=list)
    _groups: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        """Whether any picture is wanted."""
        return self.sheet or self.turntable or self.page

    def add(self, mesh: trimesh.Trimesh | None, name: str, group: str) -> None:
        """The next shape; None is an empty one, a blank on the sheet. Those of one group come one after the other."""
        self._meshes.append(mesh)
        self._names.append(name)
        self._groups.append(group)

    def save(self, folder: str | Path) -> list[Path]:
        """Write the pictures that are wanted into `folder`; returns their paths. Without a shape only the sheet has a picture."""
        folder, written = Path(folder), []
        is_any = any(mesh is not None for mesh in self._meshes)
        if self.sheet and self._meshes:
            written.append(self._save_sheet(folder / SHEET_FILE))
        if self.turntable and is_any:
            written.append(self._save_turntable(folder / TURNTABLE_FILE))
        if self.page and is_any:
            written.append(self._save_page(folder / PAGE_FILE))
        return written

    def _save_sheet(self, path: Path) -> Path:
        from shapediff.geometry.render import blank, contact_sheet, render_mesh, save_png

        pictures: list[Picture] = [
            blank(SHEET_SIZE) if mesh is None else render_mesh(mesh, size=SHEET_SIZE, colour=colour)
            for mesh, colour in zip(self._meshes, self._colours(), strict=True)
        ]
        rows = self._groups if len(set(self._groups)) > 1 else None
        save_png(contact_sheet(pictures, columns=self.columns, rows=rows), path)
        return path

    def _save_turntable(self, path: Path) -> Path:
        from shapediff.geometry.render import turntable

        shapes = [
            (mesh, colour) for mesh, colour in zip(self._meshes, self._colours(), strict=True) if mesh is not None
        ]
        shapes = [shapes[i] for i in spread(len(shapes))]
        size = next(size for most, size in _TURNTABLE_SIZES if len(shapes) <= most)
        meshes, colours = [mesh for mesh, _ in shapes], [colour for _, colour in shapes]
        turntable(meshes, path, size=size, colours=colours, columns=min(self.columns, 8))
        return path

    def _save_page(self, path: Path) -> Path:
        from shapediff.geometry.html import html_page

        kept = [i for i, mesh in enumerate(self._meshes) if mesh is not None]
        meshes = [mesh for mesh in self._meshes if mesh is not None]
        page = html_page(meshes, [self._names[i] for i in kept], groups=[self._groups[i] for i in kept])
        with replaced_file(path) as partial:
            partial.write_text(page, encoding="utf-8")
        return path

    def _colours(self) -> list[Colour]:
        known = list(dict.fromkeys(self._groups))
        return [PALETTE[known.index(group) % len(PALETTE)] for group in self._groups]


def spread(num: int) -> list[int]:
    """Which of `num` shapes a turntable shows: `MAX_TURNING` at most, spread over all, so that each class has its share."""
    num_shown = min(num, MAX_TURNING)
    return [i * num // num_shown for i in range(num_shown)]
