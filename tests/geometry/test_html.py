"""The page with every shape: complete in itself, inert whatever the names say, and alive in a browser."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import zlib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import trimesh
from PIL import Image

from shapediff.errors import MeshError
from shapediff.geometry.html import html_page

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Download, Locator, Page

HOSTILE = (
    "</script><script>window.hacked=1</script>",
    '"><img src=x onerror="window.hacked=1">',
    "<!--<script>",
    "../../etc/passwd\x00\u202e",
    "' onmouseover=window.hacked=1 x='",
    "&lt;b&gt; \ud800",
)


def box() -> trimesh.Trimesh:
    """Sides of 1, 0.5 and 0.25 around (3, -2, 0.1)."""
    made = trimesh.creation.box((1, 0.5, 0.25))
    made.apply_translation((3, -2, 0.1))
    return made


class Parsed(HTMLParser):
    """What a page is made of: its elements and the text of each kind."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, list[str]] = {}
        self._open = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self._open = tag
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        self.text.setdefault(self._open, []).append(data)


def test_names_are_text_and_nothing_else() -> None:
    plain = Parsed(html_page([box()] * len(HOSTILE), ["a"] * len(HOSTILE), groups=["g"] * len(HOSTILE), title="t"))
    page = html_page([box()] * len(HOSTILE), HOSTILE, groups=[HOSTILE[0]] * len(HOSTILE), title=HOSTILE[0])
    page.encode("utf-8")  # lone surrogates are shown as escapes
    parsed = Parsed(page)
    assert [tag for tag, _ in parsed.elements] == [tag for tag, _ in plain.elements]
    assert [set(of) for _, of in parsed.elements] == [set(of) for _, of in plain.elements]
    assert HOSTILE[0] in parsed.text["title"] and HOSTILE[1] in parsed.text["span"]


def test_the_page_asks_for_nothing_and_runs_one_script() -> None:
    page = html_page([box()], ["a"])
    parsed = Parsed(page)
    assert not re.search(r"\b(https?:)?//[a-z0-9-]+\.", page)
    for _, attributes in parsed.elements:
        assert not {"src", "href", "srcset", "style", "action"} & set(attributes)
        assert not [name for name in attributes if name.startswith("on")]
    policy = next(of["content"] for tag, of in parsed.elements if of.get("http-equiv") == "Content-Security-Policy")
    assert (
        policy is not None and policy.startswith("default-src 'none'; script-src 'sha256-") and "unsafe" not in policy
    )
    script = page.rpartition("<script>")[2].partition("</script>")[0]
    assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in policy


def test_a_mesh_comes_back_within_half_a_step() -> None:
    """An independent reading of the packed bytes, entry by entry."""
    rng = np.random.default_rng(0)
    mesh = trimesh.creation.icosphere(subdivisions=2)
    mesh.vertices = mesh.vertices * [3, 1e-3, 40] + rng.normal(size=mesh.vertices.shape) * 1e-4
    text = Parsed(html_page([mesh], ["a"])).text["script"][0]
    (shape,) = json.loads(text)
    stream = io.BytesIO(zlib.decompress(base64.b64decode(shape["data"])))

    def column_steps(count: int, width: int) -> np.ndarray:
        planes = np.frombuffer(stream.read(3 * count * width), np.uint8).reshape(width, 3, count).astype(np.int64)
        return sum(planes[b] << (8 * b) for b in range(width)).T.cumsum(0) % (1 << (8 * width))  # type: ignore[union-attr]

    levels, faces = column_steps(shape["vertices"], 2), column_steps(shape["faces"], 4)
    assert stream.read() == b""
    assert (faces == mesh.faces).all()
    vertices = np.array(shape["low"]) + np.array(shape["step"]) * levels
    # Half a step, and the rounding of the sum.
    assert (np.abs(vertices - mesh.vertices) <= np.ptp(mesh.vertices, axis=0) / 65535 * 0.5001).all()


def test_what_is_no_shape_is_refused() -> None:
    with pytest.raises(MeshError, match="faces"):
        html_page([trimesh.Trimesh()], ["a"])
    with pytest.raises(MeshError, match="finite"):
        html_page([trimesh.Trimesh([[0, 0, 0], [1, 0, 0], [0, np.inf, 0]], [[0, 1, 2]], process=False)], ["a"])
    with pytest.raises(ValueError, match="1 meshes, 2 names"):
        html_page([box()], ["a", "b"])


# ---- in a browser


@pytest.fixture(scope="module")
def requests() -> list[str]:
    return []


@pytest.fixture(scope="module")
def page(browser: Browser, requests: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """A hundred shapes with hostile names, opened as a file."""
    path = tmp_path_factory.mktemp("page") / "shapes.html"
    meshes = [box(), trimesh.creation.icosphere(subdivisions=3), *[box() for _ in range(98)]]
    names = [*HOSTILE, *(f"shape {i}" for i in range(len(HOSTILE), 100))]
    path.write_text(html_page(meshes, names, groups=[HOSTILE[0]] * 50 + ["b"] * 50), encoding="utf-8")
    context = browser.new_context(viewport={"width": 900, "height": 700}, has_touch=True, color_scheme="light")
    opened = context.new_page()
    errors: list[str] = []
    opened.on("request", lambda request: requests.append(request.url))
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    opened.goto(path.as_uri())
    yield opened
    assert errors == []
    context.close()


def canvas(page: Page, number: int) -> Locator:
    """The canvas of a shape, drawn."""
    found = page.locator("canvas").nth(number)
    found.scroll_into_view_if_needed()
    page.wait_for_function("i => Number(document.querySelectorAll('canvas')[i].dataset.drawn) > 0", arg=number)
    return found


def picture(page: Page, number: int) -> np.ndarray:
    """(h, w, 4) the pixels of a shape's canvas once what was asked for is drawn."""
    canvas(page, number)
    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    url = page.evaluate("i => document.querySelectorAll('canvas')[i].toDataURL()", number)
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))).astype(int)


def differ(one: np.ndarray, other: np.ndarray) -> float:
    """The part of the pixels that are not alike."""
    assert one.shape == other.shape
    return float((np.abs(one - other).max(-1) > 8).mean())


@pytest.mark.browser
def test_shapes_are_seen(page: Page) -> None:
    """A box and a ball: as much of the canvas as geometry says, and lit from the upper left."""
    for number in (0, 1):
        seen = picture(page, number)
        solid = seen[..., 3] == 255
        assert 0.1 < solid.mean() < 0.9
    rows, columns = np.nonzero(solid)
    # The page frames the sphere around a shape at 1.06 radii and the distance of 5 shrinks its outline little.
    assert solid.mean() == pytest.approx(np.pi / 4 / 1.06**2 * 25 / 24, rel=0.04)
    light, middle = seen[..., :3].sum(-1), np.array([rows.mean(), columns.mean()]).astype(int)
    reach = np.ptp(rows) // 4
    assert light[middle[0] - reach, middle[1] - reach] > light[middle[0] + reach, middle[1] + reach] + 60
    assert (seen[~solid][:, 3] > 0).any(), "there is no shadow on the ground"


@pytest.mark.browser
def test_mouse_wheel_keys_and_touch_turn_and_zoom(page: Page) -> None:
    first = picture(page, 0)
    spot = canvas(page, 0).bounding_box()
    assert spot is not None
    x, y = spot["x"] + spot["width"] / 2, spot["y"] + spot["height"] / 2

    def reset() -> None:
        canvas(page, 0).press("Home")
        assert differ(picture(page, 0), first) == 0

    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 60, y + 20, steps=3)
    page.mouse.up()
    assert differ(picture(page, 0), first) > 0.02
    reset()
    page.mouse.wheel(0, -400)  # it has the focus now
    assert (picture(page, 0)[..., 3] == 255).sum() > 1.3 * (first[..., 3] == 255).sum()
    reset()
    for key in ("ArrowLeft", "ArrowUp", "+", "-"):
        canvas(page, 0).press(key)
        assert differ(picture(page, 0), first) > 0.02
        reset()
    touch = page.context.new_cdp_session(page)
    for kind, at in (("touchStart", [x]), ("touchMove", [x + 20]), ("touchMove", [x + 80]), ("touchEnd", [])):
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": [{"x": to, "y": y} for to in at]})
    assert differ(picture(page, 0), first) > 0.02
    reset()


@pytest.mark.browser
def test_a_hundred_shapes_are_drawn_as_they_come_into_view(page: Page) -> None:
    assert page.locator("figure").count() == 100
    for number in (40, 99):
        assert (picture(page, number)[..., 3] == 255).mean() > 0.1
    # What is far away costs nothing: its canvas was given back.
    assert page.locator("canvas").first.evaluate("canvas => canvas.width") == 1
    assert (picture(page, 0)[..., 3] == 255).mean() > 0.1


@pytest.mark.browser
@pytest.mark.parametrize("suffix", ["obj", "stl"])
def test_downloads_are_the_meshes(page: Page, tmp_path: Path, suffix: str) -> None:
    for number, mesh in ((0, box()), (1, trimesh.creation.icosphere(subdivisions=3))):
        with page.expect_download() as waiting:
            page.locator("figure").nth(number).locator(f"[data-action={suffix}]").click()
        file: Download = waiting.value
        assert re.fullmatch(rf"[\w.-]+\.{suffix}", file.suggested_filename)
        path = tmp_path / f"{number}.{suffix}"
        file.save_as(path)
        found = trimesh.load_mesh(path)
        assert found.is_watertight and found.is_winding_consistent and len(found.faces) == len(mesh.faces)
        # Half a step of 1/65535 of the box a coordinate, and float32 in an .stl.
        assert np.abs(found.bounds - mesh.bounds).max() < 2e-5
        assert found.volume == pytest.approx(mesh.volume, rel=1e-4)


@pytest.mark.browser
def test_light_dark_and_large(page: Page) -> None:
    paper = "() => getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(paper)
    page.click("[data-action=theme]")
    assert page.evaluate(paper) != light
    page.click("[data-action=theme]")
    width = canvas(page, 0).evaluate("canvas => canvas.width")
    page.locator("[data-action=large]").first.click()
    page.wait_for_function("width => document.querySelector('canvas').width > 2 * width", arg=width)
    assert (picture(page, 0)[..., 3] == 255).mean() > 0.1
    page.locator("[data-action=large]").first.click()


@pytest.mark.browser
def test_no_request_is_made_and_no_name_runs(page: Page, requests: list[str]) -> None:
    assert page.evaluate("() => window.hacked") is None
    assert {url.partition(":")[0] for url in requests} <= {"file", "blob"}
    assert sum(url.startswith("file") for url in requests) == 1
