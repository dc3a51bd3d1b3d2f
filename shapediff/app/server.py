"""The server: gradio behind the gate, in a folder that goes when it does."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from shapediff.app.checkpoints import Checkpoints
from shapediff.app.gate import Gate
from shapediff.app.studio import Studio
from shapediff.app.uploads import MAX_MEGABYTES

QUEUE_LENGTH = 20


@contextmanager
def studio_in_own_folder(checkpoints: Checkpoints) -> Iterator[Studio]:
    """A studio in a fresh temporary folder, removed at the end."""
    with tempfile.TemporaryDirectory(prefix="shapediff-app-", ignore_cleanup_errors=True) as work:
        studio = Studio(checkpoints, Path(work))
        try:
            yield studio
        finally:
            studio.close()


def build_app(studio: Studio) -> Gate:
    """The whole page as an ASGI app."""
    # Read by gradio when it starts: no telemetry nor look for a newer version, and uploads where results are.
    os.environ.update(GRADIO_ANALYTICS_ENABLED="False", GRADIO_TEMP_DIR=str(studio.files.resolve()))
    import gradio

    from shapediff.app.page import build_page, theme
    from shapediff.app.viewer import CSS

    page = build_page(studio).queue(max_size=QUEUE_LENGTH, default_concurrency_limit=1)
    app = gradio.mount_gradio_app(
        FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        page,
        path="/",
        max_file_size=MAX_MEGABYTES << 20,
        allowed_paths=[],
        footer_links=[],
        run_history=False,
        show_error=False,
        enable_monitoring=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        theme=theme(),
        css=CSS,
    )
    return Gate(app, studio.files, max_upload=(MAX_MEGABYTES << 20) + (1 << 16))


def serve(studio: Studio, *, host: str, port: int) -> None:
    """Serve until Ctrl-C or SIGTERM."""
    # The server raises the signal that ended it once more, and SIGTERM would end the process before its folder is removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    config = uvicorn.Config(build_app(studio), host=host, port=port, log_level="warning", ws="none")
    config.timeout_graceful_shutdown = 2  # open pages keep a connection
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(config).run()
