"""One HTML file with every shape to turn, zoom and download: it needs nothing else, no library and no network.

The page runs the script of `viewer/viewer.js` and no other: the policy in its head names that script and the style by their
hashes and forbids every address, so that even a name that slipped through as markup could neither run nor fetch anything.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import zlib
from collections.abc import Sequence
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import numpy as np

from shapediff.errors import MeshError
from shapediff.geometry.camera import PALETTE, to_linear

if TYPE_CHECKING:
    import trimesh

_MAX_TEXT = 160
_LEVELS = 65535
_ENLARGE = (
    '<svg width="13" height="13" viewBox="0 0 13 13" fill="none" stroke="currentColor" stroke-width="1.5" aria-hidden="true">'
    '<path d="M8 1h4v4M5 12H1V8M12 1L8 5M1 12l4-4"/></svg>'
)
_HELP = (
    "Drag to turn, pinch or choose a shape and use the wheel to zoom, double-click to reset. "
    "By keyboard: arrows, + and -, Home."
)


def html_page(
    meshes: Sequence[trimesh.Trimesh],
    names: Sequence[str],
    *,
    groups: Sequence[str] | None = None,
    title: str = "Generated shapes",
) -> str:
    """A page, complete in itself, that shows meshes (y up) in the order given.

    Args:
        names: what is written under each, also the name of its download.
        groups: a class for each mesh: a heading and a colour for every run of equal ones.

    Vertices are rounded to 1/65535 of the bounding box, also in the downloads; faces stay as they are, so closed meshes stay
    closed. Names may hold anything: they are shown as text. Raises MeshError for a mesh without faces or with coordinates
    that are not finite, ValueError where the counts differ.
    """
    groups = [""] * len(meshes) if groups is None else groups
    if not len(meshes) == len(names) == len(groups):
        raise ValueError(f"{len(meshes)} meshes, {len(names)} names and {len(groups)} groups must be as many")
    known = list(dict.fromkeys(groups))
    shapes = [
        _packed(mesh) | {"colour": to_linear(PALETTE[known.index(group) % len(PALETTE)]).round(4).tolist()}
        for mesh, group in zip(meshes, groups, strict=True)
    ]
    figures = [
        _figure(name, len(mesh.faces), number) for number, (mesh, name) in enumerate(zip(meshes, names, strict=True))
    ]
    sections = [
        _section(name, [figures[i] for i in range(len(figures)) if groups[i] == name], start=groups.index(name))
        for name in known
    ]
    script, style = (
        files("shapediff.geometry").joinpath(f"viewer/viewer.{kind}").read_text("utf-8") for kind in ("js", "css")
    )
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_policy(script, style)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n"
        f"<header><h1>{_text(title)}</h1><p>{_HELP}</p>"
        '<button type="button" data-action="turn" aria-pressed="false">Turn all</button>'
        '<button type="button" data-action="theme">Light or dark</button></header>\n'
        '<p id="warning" class="warn" role="status"></p><noscript><p class="warn">The shapes need JavaScript.</p></noscript>\n'
        f"<main>\n{''.join(sections)}</main>\n"
        # JSON in a script element ends at the first "</script" only, which no "<" can begin.
        f'<script type="application/json" id="shapes">{json.dumps(shapes).replace("<", chr(92) + "u003c")}</script>\n'
        f"<script>{script}</script>\n</body>\n</html>\n"
    )


def _policy(script: str, style: str) -> str:
    def hashed(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    return f"default-src 'none'; script-src {hashed(script)}; style-src {hashed(style)}; base-uri 'none'; form-action 'none'"


def _section(name: str, figures: Sequence[str], *, start: int) -> str:
    heading = f'<h2 id="group-{start}">{_text(name)}</h2>\n' if name else ""
    label = f' aria-labelledby="group-{start}"' if name else ""
    return f'<section{label}>\n{heading}<div class="grid">\n{"".join(figures)}</div>\n</section>\n'


def _figure(name: str, num_faces: int, number: int) -> str:
    shown = _text(name)
    buttons = "".join(
        f'<button type="button" data-action="{action}" aria-label="{label} {shown}"{more}>{word}</button>'
        for action, label, word, more in (
            ("large", "Enlarge", _ENLARGE, ' aria-pressed="false"'),
            ("obj", "Download as OBJ:", "obj", ""),
            ("stl", "Download as STL:", "stl", ""),
        )
    )
    return (
        f'<figure data-name="{shown}" data-number="{number}"><canvas tabindex="0" role="img" '
        f'aria-label="{shown}: arrows turn it, plus and minus zoom"></canvas>'
        f"<figcaption><span>{shown}<small>{num_faces:,} faces</small></span>{buttons}</figcaption></figure>\n"
    )


def _packed(mesh: trimesh.Trimesh) -> dict[str, Any]:
    """Vertices (v, 3) as 16 bits each way of the box, then faces (f, 3) as 32 bits: as `unpack` in viewer.js reads them.

    Neighbours in a mesh are alike, so differences along a column are small; with bytes of one significance together, deflate
    halves them.
    """
    vertices, faces = np.asarray(mesh.vertices, np.float64), np.asarray(mesh.faces)
    if not len(faces) or not np.isfinite(vertices).all():
        raise MeshError("a page needs meshes with faces and finite coordinates")
    low, high = vertices.min(0), vertices.max(0)
    step = (high - low) / _LEVELS
    levels = np.round((vertices - low) / np.where(step > 0, step, 1)).astype(np.uint16)
    planes = _planes(levels) + _planes(faces.astype(np.uint32))
    return {
        "vertices": len(vertices),
        "faces": len(faces),
        "low": low.tolist(),
        "step": step.tolist(),
        "data": base64.b64encode(zlib.compress(planes, 9)).decode("ascii"),
    }


def _planes(rows: np.ndarray) -> bytes:
    """Whole numbers (n, 3) as differences down each column, lowest bytes first: (bytes of a number, 3, n)."""
    steps = np.diff(rows, axis=0, prepend=rows.dtype.type(0)).astype(rows.dtype.newbyteorder("<"))
    return np.ascontiguousarray(steps.T).view(np.uint8).reshape(3, len(rows), -1).transpose(2, 0, 1).tobytes()


def _text(name: str) -> str:
    """A name as inert text: not too long, control and direction characters as escapes, markup escaped."""
    short = name if len(name) <= _MAX_TEXT else name[: _MAX_TEXT - 1] + "…"
    shown = "".join(char if char.isprintable() else char.encode("unicode_escape", "replace").decode() for char in short)
    return html.escape(shown)
