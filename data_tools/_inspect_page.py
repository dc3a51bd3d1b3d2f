"""The page of data_tools/inspect.py: one HTML file that needs no script, no network and no other file.

Every name in a data set may be hostile: what is not made here goes through `_text`. Should something slip through, the
policy in the head still forbids scripts, forms and every address but the embedded pictures.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np

from shapediff.data.dataset import ShapeDataset
from shapediff.data.inspection import (
    ClassSummary,
    Inspection,
    NearDuplicates,
    num_across_splits,
    picture_of,
)
from shapediff.data.manifest import SPLITS
from shapediff.data.report import printable
from shapediff.geometry.render import Picture

NUM_LISTED = 20
_NUM_MEMBERS = 6
_THUMBNAIL = 144
_MAX_TEXT = 160
_BAR, _HEIGHT = 9, 36  # pixels of a histogram

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2330; --soft: #5b6472; --paper: #ffffff; --card: #f6f7f9;
  --line: #dde1e7; --bar: #5b8cc4; --warn: #a8480a; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ee; --soft: #9aa4b2; --paper: #14171c; --card: #1c2027; --line: #323843; --bar: #7ba9dc;
    --warn: #f0a35e; } }
body { max-width: 75rem; margin: 2rem auto; padding: 0 1rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.5rem; }
.soft { color: var(--soft); } .warn { color: var(--warn); font-weight: 600; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; } th { color: var(--soft); font-weight: 500; }
th, td { padding: .3rem .8rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
td.name, th.name { text-align: left; white-space: normal; min-width: 8rem; }
svg { display: block; } rect { fill: var(--bar); } line { stroke: var(--line); }
.cards { display: flex; flex-wrap: wrap; gap: 1rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .7rem; }
.row { display: flex; flex-wrap: wrap; gap: .6rem; }
figure { margin: 0; width: 144px; } figcaption { font-size: 12px; line-height: 1.35; }
img { display: block; max-width: 100%; height: auto; border-radius: 6px; }
"""


def page(dataset: ShapeDataset, inspection: Inspection, *, sheets: Mapping[int, Picture]) -> str:
    """The whole page; `sheets` are the pictures of the classes by label. Without any, the page has no pictures."""
    shapes = _Shapes(dataset, draw=bool(sheets))
    name = _text(dataset.path.resolve().name)
    sections = [
        _facts(dataset),
        _class_table(inspection),
        _copies(dataset, inspection.copies, shapes),
        _near(dataset, inspection.near, shapes) if inspection.near is not None else "",
        _sheets(dataset, sheets),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{name}: data set</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{name}</h1>\n"
        + "\n".join(section for section in sections if section)
        + "\n</body>\n</html>\n"
    )


class _Shapes:
    """Shapes as figures: picture, id and split. One that occurs twice is drawn once."""

    def __init__(self, dataset: ShapeDataset, *, draw: bool) -> None:
        self._dataset, self._draw = dataset, draw
        self._image = cache(self._drawn)

    def row(self, places: Sequence[int]) -> str:
        more = f'<p class="soft">and {len(places) - _NUM_MEMBERS} more</p>' if len(places) > _NUM_MEMBERS else ""
        figures = "".join(self._figure(place) for place in places[:_NUM_MEMBERS])
        return f'<div class="row">{figures}{more}</div>'

    def _figure(self, place: int) -> str:
        shape = self._dataset.shapes[place]
        image = self._image(place) if self._draw else ""
        return f'<figure>{image}<figcaption>{_text(shape.id)} <span class="soft">{shape.split}</span></figcaption></figure>'

    def _drawn(self, place: int) -> str:
        return _img(picture_of(self._dataset, place, size=_THUMBNAIL), alt="")


def _facts(dataset: ShapeDataset) -> str:
    splits: list[str] = [shape.split for shape in dataset.shapes]
    band = f", truncated at {dataset.truncation_voxels:g} voxels" if dataset.field == "tsdf" else ""
    parts = ", ".join(f"{split} {splits.count(split)}" for split in SPLITS)
    return (
        f"<p>{len(dataset)} shapes in {len(dataset.classes)} classes ({parts}), {dataset.resolution}^3 {dataset.field}"
        f'{band}<br><span class="soft">{_text(str(dataset.path))}</span></p>'
    )


def _class_table(inspection: Inspection) -> str:
    heads = ["label", "class", *SPLITS, "fill min", "median", "max", "fill, min to max"]
    cells = "".join(f'<th scope="col"{_name_column(i)}>{head}</th>' for i, head in enumerate(heads))
    rows = [_class_row(label, summary) for label, summary in enumerate(inspection.classes)]
    return (
        '<h2>Classes</h2>\n<p class="soft">The fill of a shape is the part of its voxels that is inside.</p>\n'
        f'<div class="wide"><table>\n<tr>{cells}</tr>\n' + "\n".join(rows) + "\n</table></div>"
    )


def _class_row(label: int, summary: ClassSummary) -> str:
    spread = [f"{value:.4f}" for value in summary.fill_spread] if summary.fill_spread else ["-"] * 3
    counts = [str(summary.num_per_split[split]) for split in SPLITS]
    cells = [str(label), _text(summary.name), *counts, *spread, _histogram(summary)]
    return "<tr>" + "".join(f"<td{_name_column(i)}>{cell}</td>" for i, cell in enumerate(cells)) + "</tr>"


def _name_column(column: int) -> str:
    return ' class="name"' if column == 1 else ""


def _histogram(summary: ClassSummary) -> str:
    """Bars of equal width, the highest as high as the picture; each says its range and count."""
    if summary.fill_spread is None:
        return ""
    counts, (low, _, high) = summary.histogram.tolist(), summary.fill_spread
    most, edges = max(counts), np.linspace(low, high, len(counts) + 1).tolist()
    bars = "".join(
        f'<rect x="{_BAR * i}" y="{_HEIGHT * (1 - count / most):.1f}" width="{_BAR - 1}" '
        f'height="{_HEIGHT * count / most:.1f}">'
        f"<title>{edges[i]:.3g} to {edges[i + 1]:.3g}: {count}</title></rect>"
        for i, count in enumerate(counts)
        if count
    )
    width = _BAR * len(counts)
    return (
        f'<svg role="img" aria-label="histogram of the fill" width="{width}" height="{_HEIGHT + 1}" '
        f'viewBox="0 0 {width} {_HEIGHT + 1}">{bars}<line x1="0" x2="{width}" y1="{_HEIGHT + 0.5}" '
        f'y2="{_HEIGHT + 0.5}"/></svg>'
    )


def _copies(dataset: ShapeDataset, groups: Sequence[Sequence[int]], shapes: _Shapes) -> str:
    if not groups:
        return "<h2>Copies</h2>\n<p>No two shapes have the same grid.</p>"
    num_extra = sum(len(group) - 1 for group in groups)
    cards = [
        _card(f"{len(group)} times", shapes.row(group), is_across=num_across_splits(dataset, [group]) > 0)
        for group in groups[:NUM_LISTED]
    ]
    return (
        f"<h2>Copies</h2>\n<p>{num_extra} shapes repeat another's grid. "
        f"{_leak(num_across_splits(dataset, groups), len(groups), 'groups')}{_listed(len(groups))}</p>\n{_cards(cards)}"
    )


def _near(dataset: ShapeDataset, near: NearDuplicates, shapes: _Shapes) -> str:
    title = f"<h2>Near-duplicates</h2>\n<p>Pairs of one class with an IoU of at least {near.threshold:g}: "
    if not len(near.pairs):
        return f"{title}none.</p>"
    cards = [
        _card(f"IoU {near.iou[i]:.4f}", shapes.row(near.pairs[i].tolist()), is_across=bool(near.is_across[i]))
        for i in range(min(NUM_LISTED, len(near.pairs)))
    ]
    return (
        f"{title}{len(near.pairs)}, in {len(near.groups)} groups. "
        f"{_leak(int(near.is_across.sum()), len(near.pairs), 'pairs')} "
        f"{_leak(num_across_splits(dataset, near.groups), len(near.groups), 'groups')}"
        f"{_listed(len(near.pairs))}</p>\n{_cards(cards)}"
    )


def _sheets(dataset: ShapeDataset, sheets: Mapping[int, Picture]) -> str:
    parts = [
        f"<h3>{_text(dataset.classes[label])}</h3>\n{_img(sheet, alt='shapes of the class, spread over it')}"
        for label, sheet in sheets.items()
    ]
    return "<h2>Pictures</h2>\n" + "\n".join(parts) if parts else ""


def _leak(num_across: int, num: int, noun: str) -> str:
    """How many lie across splits, marked where any does."""
    text = f"{num_across} of {num} {noun} lie across splits."
    return f'<span class="warn">{text}</span>' if num_across else text


def _listed(num: int) -> str:
    return f" The first {NUM_LISTED}:" if num > NUM_LISTED else ""


def _card(title: str, body: str, *, is_across: bool) -> str:
    mark = ' <span class="warn">across splits</span>' if is_across else ""
    return f'<div class="card">{title}{mark}{body}</div>'


def _cards(cards: Sequence[str]) -> str:
    return '<div class="cards">\n' + "\n".join(cards) + "\n</div>"


def _img(picture: Picture, *, alt: str) -> str:
    """An embedded PNG of 128 colours: less than half the bytes, and the shapes have few."""
    from PIL import Image

    content = io.BytesIO()
    Image.fromarray(picture).quantize(128, dither=Image.Dither.NONE).save(content, format="PNG", optimize=True)
    data = base64.b64encode(content.getvalue()).decode("ascii")
    height, width = picture.shape[:2]
    return f'<img alt="{alt}" width="{width}" height="{height}" src="data:image/png;base64,{data}">'


def _text(name: str) -> str:
    """A name as inert text: not too long, control and direction characters as escapes, markup escaped."""
    short = name if len(name) <= _MAX_TEXT else name[: _MAX_TEXT - 1] + "…"
    return html.escape(printable(short))
