"""A set of shapes as pictures: what is wanted is written, empty shapes leave a gap or are left out, classes have colours."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import trimesh
from PIL import Image

from shapediff.geometry.gallery import MAX_TURNING, SHEET_SIZE, Gallery, spread
from shapediff.geometry.render import BACKGROUND, turntable


def filled(gallery: Gallery) -> Gallery:
    ball = trimesh.creation.icosphere(subdivisions=1)
    gallery.add(ball, "a0", "a")
    gallery.add(None, "a1", "a")
    gallery.add(ball, "b0", "b")
    return gallery


@pytest.fixture(autouse=True)
def _few_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(turntable.__kwdefaults__, "num_frames", 3)


def test_only_what_is_wanted_is_written(tmp_path: Path) -> None:
    assert not Gallery()
    assert filled(Gallery()).save(tmp_path) == [] == list(tmp_path.iterdir())
    written = filled(Gallery(sheet=True, turntable=True, page=True)).save(tmp_path / "new")
    assert sorted(written) == sorted((tmp_path / "new").iterdir()) and len(written) == 3


def test_an_empty_shape_is_a_blank_on_the_sheet_and_nowhere_else(tmp_path: Path) -> None:
    filled(Gallery(sheet=True, turntable=True, page=True, columns=2)).save(tmp_path)
    sheet = np.asarray(Image.open(tmp_path / "preview.png")).astype(float)
    strip = (len(sheet) - 2 * SHEET_SIZE) // 2
    tiles = [sheet[strip : strip + SHEET_SIZE, :SHEET_SIZE], sheet[strip : strip + SHEET_SIZE, SHEET_SIZE:]]
    assert np.abs(tiles[1] - np.round(BACKGROUND * 255)).max() == 0 < np.ptp(tiles[0])
    below = sheet[-SHEET_SIZE:, :SHEET_SIZE]
    middle = SHEET_SIZE // 2
    assert np.abs(below[middle, middle] - tiles[0][middle, middle]).max() > 50, "two classes have one colour"
    assert Image.open(tmp_path / "turntable.gif").size == (512, 256)
    page = (tmp_path / "shapes.html").read_text(encoding="utf-8")
    assert page.count("<figure ") == 2 and "a1" not in page.partition("<main>")[2].partition("</main>")[0]


def test_nothing_but_empty_shapes_leaves_a_blank_sheet(tmp_path: Path) -> None:
    gallery = Gallery(sheet=True, turntable=True, page=True)
    gallery.add(None, "a", "a")
    assert gallery.save(tmp_path) == [tmp_path / "preview.png"]


@pytest.mark.parametrize("num", [1, 31, 32, 33, 40, 1000])
def test_a_turntable_shows_all_or_some_spread_over_all(num: int) -> None:
    chosen = spread(num)
    assert len(chosen) == len(set(chosen)) == min(num, MAX_TURNING) and chosen[0] == 0
    steps = np.diff([*chosen, num])
    assert steps.max() - steps.min() <= 1
