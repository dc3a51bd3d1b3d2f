"""What of the server can be reached from outside: a list of what the page needs, and nothing else that gradio offers.

gradio also serves an open proxy to other hosts (`/file=https://...`), recordings, monitoring and more, and what it lets be
read is a matter of its version. Here a file is served only from the output folder, and a request says how long it is before
it is read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

API = "/gradio_api"
READ = ("/assets/", "/static/", "/theme.css", "/favicon.ico", "/manifest.json", "/config", "/svelte/")
READ_API = ("/queue/data", "/heartbeat/", "/upload_progress", "/startup-events", "/theme.css", "/app_id")
WRITE_API = ("/run/predict", "/queue/join", "/cancel", "/reset")
FILE, UPLOAD = f"{API}/file=", f"{API}/upload"

POLICY = "; ".join(
    (
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "font-src 'self' data:",
        "connect-src 'self' data: blob:",
        "worker-src 'self' blob:",
        "object-src 'none'",
        "frame-ancestors 'self'",
    )
)
"""The browser asks no other host for anything, whatever a page or a frame in it would like."""

HEADERS = [
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"same-origin"),
]

MAX_MESSAGE, MAX_PATH = 256 << 10, 2000
MAX_FOLDER = 2 << 30
"""Bytes that may lie in the output folder when an upload begins."""


class Gate:
    """An ASGI app in front of `app`, whose files come from `folder` alone; an upload may have `max_upload` bytes."""

    def __init__(self, app: App, folder: Path, *, max_upload: int) -> None:
        self._app = app
        self._folder = folder.resolve()
        self._max_upload = max_upload

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 4xx or 507 in its place."""
        if scope["type"] != "http":  # the server's own start and stop; the page opens no web sockets
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        status = self._refusal(scope)
        if status is None and scope["method"] == "POST" and scope["path"] != UPLOAD:
            body = await _body(receive, MAX_MESSAGE)
            if body is None:
                status = 413
            else:
                status = None if self._names_own_files(body) else 403
                receive = _replayed(body, receive)
        if status is None:
            await self._app(scope, receive, _with_headers(send))
        else:
            await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"0")]})
            await send({"type": "http.response.body", "body": b""})

    def _refusal(self, scope: Scope) -> int | None:
        path, method = scope["path"], scope["method"]
        if len(path) > MAX_PATH:
            return 414
        if method in ("GET", "HEAD"):
            if path.startswith(FILE):
                return None if self._is_inside(path.removeprefix(FILE)) else 403
            is_known = path == "/" or _begins(path, READ) or _begins(path.removeprefix(API), READ_API)
            return None if is_known else 404
        if method != "POST":
            return 405
        if not _is_own_origin(scope):
            return 403
        if path == UPLOAD:
            return self._too_long(scope, self._max_upload) or (507 if self._is_full() else None)
        return self._too_long(scope, MAX_MESSAGE) if path.removeprefix(API) in WRITE_API else 404

    def _is_inside(self, name: str) -> bool:
        """Whether an absolute path leads to a plain file in the folder, once every .. and link is followed."""
        try:
            path = Path(name).resolve(strict=True)
        except (OSError, ValueError, RuntimeError):
            return False
        return Path(name).is_absolute() and path.is_relative_to(self._folder) and path.is_file()

    def _names_own_files(self, body: bytes) -> bool:
        """Whether every file that a message names lies in the folder: gradio would fetch an https:// one."""
        try:
            waiting = [json.loads(body)]
        except (ValueError, RecursionError):
            return False
        while waiting:
            value = waiting.pop()
            if isinstance(value, dict):
                if "path" in value and not (isinstance(value["path"], str) and self._is_inside(value["path"])):
                    return False
                waiting.extend(value.values())
            elif isinstance(value, list):
                waiting.extend(value)
        return True

    @staticmethod
    def _too_long(scope: Scope, most: int) -> int | None:
        headers = dict(scope["headers"])
        length = headers.get(b"content-length", b"")
        if not length.isdigit() or b"transfer-encoding" in headers:  # in chunks, the length says nothing
            return 411
        return 413 if int(length[:20]) > most else None

    def _is_full(self) -> bool:
        return sum(entry.st_size for entry in map(_stat, self._folder.rglob("*")) if entry is not None) > MAX_FOLDER


def _stat(path: Path) -> os.stat_result | None:
    """None for what was removed meanwhile."""
    try:
        return path.lstat()
    except FileNotFoundError:
        return None


def _begins(path: str, known: tuple[str, ...]) -> bool:
    """Whether the path is one of the known ones; those that end in / stand for what is below them."""
    return any(path == name or (name.endswith("/") and path.startswith(name)) for name in known)


def _is_own_origin(scope: Scope) -> bool:
    """Whether a browser sends this from the page itself, and not from a page of others that is open beside it."""
    headers = dict(scope["headers"])
    origin = headers.get(b"origin")
    return origin is None or origin.partition(b"://")[2] == headers.get(b"host")


def _with_headers(send: Send) -> Send:
    async def send_on(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", []), *HEADERS]
        await send(message)

    return send_on


async def _body(receive: Receive, most: int) -> bytes | None:
    """All of a body; None for one that is longer than `most` bytes, whatever was said of its length."""
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > most:
            return None
        more = message.get("more_body", False)
    return body


def _replayed(body: bytes, receive: Receive) -> Receive:
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> MutableMapping[str, Any]:
        return messages.pop() if messages else await receive()

    return replay
