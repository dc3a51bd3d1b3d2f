"""The page in headless Chromium, and its server asked by someone who means no good. One server for all."""

from __future__ import annotations

import http.client
import io
import json
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trimesh
import uvicorn
from PIL import Image

from shapediff.app.checkpoints import Checkpoints
from shapediff.app.gate import MAX_MESSAGE
from shapediff.app.server import QUEUE_LENGTH, build_app
from shapediff.app.studio import Studio
from shapediff.app.uploads import MAX_MEGABYTES
from tests.test_checkpoint import export

pytestmark = pytest.mark.browser


class Running:
    """The server in a thread, and every address outside this machine that its process asked for."""

    def __init__(self, folder: Path) -> None:
        export(folder / "runs" / "tiny" / "export")
        (folder / "secret.obj").write_text("v 0 0 0\n")
        self.folder = folder
        self.studio = Studio(Checkpoints(folder / "runs", device="cpu"), folder / "work")
        config = uvicorn.Config(build_app(self.studio), port=0, log_level="error", ws="none")
        config.timeout_graceful_shutdown = 1
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive()
            time.sleep(0.02)
        self.port = self._server.servers[0].sockets[0].getsockname()[1]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
        """A request whose path is sent as it is, .. and all."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def post(self, path: str, message: Any) -> tuple[int, bytes]:
        return self.ask("POST", path, json.dumps(message).encode(), content_type="application/json")

    def join(self, visitor: str, changes: dict[str, Any]) -> tuple[int, bytes]:
        """Open the page as `visitor`, then post "Generate" with the fields of these labels changed."""
        config = json.loads(self.ask("GET", "/config")[1])
        components = {component["id"]: component["props"] for component in config["components"]}
        events = {event["api_name"]: event for event in config["dependencies"]}
        opened = {"data": [], "fn_index": events["look"]["id"], "session_hash": visitor}
        assert self.post("/gradio_api/run/predict", opened)[0] == 200
        values = []
        for i in events["compute"]["inputs"]:
            label = components[i].get("label")
            values.append(changes.pop(label) if label in changes else components[i].get("value"))
        assert not changes
        message = {"data": values, "fn_index": events["compute"]["id"], "session_hash": visitor}
        return self.post("/gradio_api/queue/join", message)

    def call(self, changes: dict[str, Any]) -> str:
        """The server's last word to a visitor who posts this."""
        visitor = f"visitor{time.monotonic_ns()}"
        status, answer = self.join(visitor, changes)
        if status != 200:
            return f"{status} {answer.decode()}"
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        connection.request("GET", f"/gradio_api/queue/data?session_hash={visitor}")
        lines = iter(connection.getresponse().readline, b"")
        found = next(line for line in lines if b"process_completed" in line or b"unexpected_error" in line)
        connection.close()
        return found.decode()

    def results(self) -> set[Path]:
        """The folders of results that are kept."""
        return {path.parent for path in self.studio.files.glob("*/voxels.npz")}

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(10)
        self.studio.close()


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    before = {name: os.environ.get(name) for name in ("GRADIO_ANALYTICS_ENABLED", "GRADIO_TEMP_DIR")}
    server = Running(tmp_path_factory.mktemp("app"))
    yield server
    server.stop()
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


@pytest.fixture(scope="module")
def asked(running: Running) -> Iterator[set[str]]:
    """Hosts that the server's process looks up or connects to while the tests run."""
    hosts: set[str] = set()
    connect, look_up = socket.socket.connect, socket.getaddrinfo

    def connect_noted(self: socket.socket, address: Any) -> None:
        hosts.add(address[0] if isinstance(address, tuple) else "")
        connect(self, address)

    def look_up_noted(host: Any, *arguments: Any, **options: Any) -> Any:
        hosts.add(str(host))
        return look_up(host, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", connect_noted)
        patch.setattr(socket, "getaddrinfo", look_up_noted)
        yield hosts


@pytest.fixture(scope="module")
def page(running: Running, asked: set[str], browser: Any) -> Iterator[Any]:
    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    page.requested = []
    page.on("request", lambda request: page.requested.append(request.url))
    page.set_default_timeout(30_000)
    page.goto(running.url)
    page.wait_for_function("document.querySelector('#checkpoint input')?.value == 'tiny'")
    yield page
    page.close()


def test_generate_turn_and_take_with_you(page: Any, running: Running, asked: set[str], tmp_path: Path) -> None:
    page.get_by_label("quick").check()
    page.click("#generate")
    canvas = page.frame_locator(".viewer iframe").locator("canvas").first
    canvas.wait_for()
    page.wait_for_timeout(300)
    before = _pixels(canvas)
    assert len(np.unique(before.reshape(-1, 3), axis=0)) > 50  # a shape with light and shade, not one colour
    box = canvas.bounding_box()
    page.mouse.move(box["x"] + 60, box["y"] + 80)
    page.mouse.down()
    page.mouse.move(box["x"] + 140, box["y"] + 90, steps=4)
    page.mouse.up()
    page.wait_for_timeout(200)
    assert np.abs(_pixels(canvas).astype(int) - before).mean() > 1  # it turned

    for format in ("glb", "obj"):
        if format != "glb":
            page.locator("#format").get_by_label(format).check()
        link = page.locator(f"#files a[href$='.{format}']").first
        link.wait_for()
        with page.expect_download() as download:
            link.click()
        download.value.save_as(tmp_path / f"shape.{format}")
        mesh = trimesh.load(tmp_path / f"shape.{format}", force="mesh")
        mesh.merge_vertices()
        assert mesh.is_watertight
        assert mesh.volume > 0
    foreign = [url for url in page.requested if not url.startswith((running.url, "data:", "blob:", "about:"))]
    assert foreign == []
    assert asked <= {"127.0.0.1", "localhost", ""}


def _pixels(canvas: Any) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(canvas.screenshot())).convert("RGB"))


def test_stop_stops(page: Any, running: Running) -> None:
    page.get_by_label("best").check()
    page.locator("#num input[type=number]").fill("16")
    page.locator("#num input[type=number]").press("Tab")
    page.wait_for_timeout(500)  # until the server has said how many steps that is
    page.click("#generate")
    page.get_by_text(re.compile(r"/2\.4k steps")).first.wait_for()
    page.click("#stop")
    page.get_by_text("Stopped.").first.wait_for()
    with running.studio.jobs.turn("next"):  # the turn was given back
        pass


def test_an_error_is_shown(page: Any) -> None:
    page.get_by_role("tab", name="Edit").click()
    page.get_by_label("my own mesh").first.check()
    page.click("#apply")
    page.get_by_text("bring a mesh for the source first").wait_for()


def test_no_file_outside_the_output_folder_is_served(running: Running) -> None:
    files, secret = running.studio.files.resolve(), running.folder / "secret.obj"
    (files / "mine.obj").write_text("v 1 2 3\n")
    assert running.ask("GET", f"/gradio_api/file={files}/mine.obj") == (200, b"v 1 2 3\n")
    (files / "link.obj").symlink_to(secret)
    (files / "links").symlink_to(running.folder)
    export = running.folder / "runs" / "tiny" / "export" / "config.json"
    upwards = ("/../../secret.obj", "/%2e%2e/%2e%2e/secret.obj", "/..%2f..%2fsecret.obj", "/..%252f..%252fsecret.obj")
    links = ("/link.obj", "/links/secret.obj", "/mine.obj%00", "", "/")
    absolute = ("/etc/passwd", "/dev/zero", "/proc/self/environ", str(secret), str(export), f"{files.parent}/grids")
    other = (
        "../secret.obj",
        "pyproject.toml",
        "~/.bashrc",
        "file:///etc/passwd",
        "https://example.com/a.obj",
        "a" * 5000,
    )
    paths = [*(f"{files}{path}" for path in upwards + links), *absolute, *other]
    for path in paths:
        for prefix in (
            "/gradio_api/file=",
            "/file=",
            "/gradio_api/file/",
            "/gradio_api/proxy=",
            "/static/",
            "/assets/",
            "/",
        ):
            status, body = running.ask("GET", f"{prefix}{path}")
            assert status in (400, 403, 404, 414), (prefix, path, status)
            assert b"v 0 0 0" not in body and b"root:" not in body


def test_what_the_page_does_not_need_is_not_there(running: Running) -> None:
    for path in (
        "/gradio_api/info",
        "/gradio_api/openapi.json",
        "/docs",
        "/openapi.json",
        "/monitoring",
        "/gradio_api/runs",
    ):
        assert running.ask("GET", path)[0] == 404
    for path in (
        "/gradio_api/process_recording",
        "/gradio_api/vibe-edit/",
        "/gradio_api/stream/a",
        "/gradio_api/call/begin",
    ):
        assert running.post(path, {})[0] == 404
    assert running.ask("PUT", "/")[0] == 405
    assert running.post("/gradio_api/queue/join", {"data": ["a" * MAX_MESSAGE]})[0] == 413
    assert running.ask("POST", "/gradio_api/queue/join", b"not json", content_type="application/json")[0] == 403
    assert running.ask("POST", "/gradio_api/queue/join", b"{}", origin="https://elsewhere.example")[0] == 403
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shapediff.app.gate.MAX_FOLDER", 0)
        assert running.ask("POST", "/gradio_api/upload", b"a")[0] == 507
    length = str((MAX_MEGABYTES << 20) * 2)
    assert running.ask("POST", "/gradio_api/upload", b"", content_length=length)[0] == 413
    assert running.ask("POST", "/gradio_api/upload", iter([b"a"]), transfer_encoding="chunked")[0] == 411  # type: ignore[arg-type]
    both = {"transfer_encoding": "chunked", "content_length": "5"}  # the server goes by the chunks
    assert running.ask("POST", "/gradio_api/upload", iter([b"a"]), **both)[0] == 411  # type: ignore[arg-type]


BENIGN = {"Model": "tiny", "Class": "chair", "How many": 1, "Steps": 2}


def test_a_posted_form_is_served(running: Running) -> None:
    before = running.results()
    assert '"success":true' in running.call(dict(BENIGN))
    assert len(running.results() - before) == 1


@pytest.mark.parametrize(
    "change",
    [
        *({"Model": name} for name in ("../outside", "/etc", "tiny/export", None, 3)),
        *({"Class": name} for name in ("../../etc/passwd", ["chair"], "x" * 1000, None)),
        *({"How many": num} for num in (-1, 0, 17, 10**9, "NaN", 1e308, None, 2.5)),
        *({"Steps": num} for num in (-1, 10**6, "1", None)),
        *({"Guidance": scale} for scale in (float("nan"), float("inf"), -1, 1e9, "3")),
        *({"Seed": seed} for seed in (-1, 2**40, "0")),
        {"Sampler": "__import__('os')"},
        {"Take them with you as": "../../obj"},
    ],
    ids=lambda change: " ".join(f"{name} {str(value)[:20]}" for name, value in change.items()),
)
def test_hostile_values_are_refused_and_cost_nothing(running: Running, change: dict[str, Any]) -> None:
    before = running.results()
    answer = running.call({**BENIGN, **change})
    assert '"success":false' in answer or answer.startswith(("400", "403", "422"))
    assert str(running.folder) not in answer  # where things lie is not told
    assert running.results() == before


def test_the_queue_has_an_end(running: Running) -> None:
    visitors = [f"waiting{i}" for i in range(QUEUE_LENGTH + 5)]
    with running.studio.jobs.turn("someone"):
        answers = [running.join(visitor, dict(BENIGN))[0] for visitor in visitors]
        for visitor in visitors:
            running.studio.jobs.begin(visitor)
            running.studio.jobs.stop(visitor)
    assert set(answers) == {200, 503}
    assert answers.count(200) <= QUEUE_LENGTH + 2  # one computes, one is on its way to


def test_a_file_of_this_machine_cannot_be_brought_as_an_upload(running: Running) -> None:
    label = f"Mesh, up to {MAX_MEGABYTES} MB"
    for path in (str(running.folder / "secret.obj"), "/etc/passwd", "https://example.com/a.obj", "a.obj", ["a"], None):
        file = {"path": path, "meta": {"_type": "gradio.FileData"}, "orig_name": "a.obj"}
        assert running.call({**BENIGN, label: file}).startswith("403")
