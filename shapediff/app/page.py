"""The page itself: what stands where, and which function of the studio a button calls. No logic of its own."""

from __future__ import annotations

import html
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import gradio as gr

from shapediff.app.fields import QUIET, Fields, edit_fields, how_to_sample, ideas, of_checkpoint, what_to_make
from shapediff.app.studio import Made, Studio
from shapediff.app.viewer import EMPTY, viewer
from shapediff.errors import ShapediffError
from shapediff.shapes import MESH_FORMATS, VOXEL_FORMATS

TITLE = """# shapediff
Choose what to make, press **Generate**, drag a shape to turn it, and take it with you as a file."""
SAMPLING: dict[str, Any] = {"concurrency_id": "sampling", "concurrency_limit": 1, "api_visibility": "private"}
FILES: dict[str, Any] = {"concurrency_id": "files", "concurrency_limit": 1, "api_visibility": "private"}
"""Another format is written while others sample."""


@dataclass(frozen=True)
class Result:
    """Where the page shows what was made; `token` is the visitor's hold on it, kept by the server."""

    token: gr.State
    picture: gr.HTML
    message: gr.Markdown
    group: gr.Group
    format: gr.Radio
    files: gr.File


def theme() -> gr.themes.Base:
    """The look, in the fonts of the visitor's own machine: named ones would be fetched from afar."""
    sans = ("ui-sans-serif", "system-ui", "sans-serif")
    return gr.themes.Default(
        primary_hue="orange", neutral_hue="stone", font=sans, font_mono=("ui-monospace", "monospace")
    )


def build_page(studio: Studio) -> gr.Blocks:
    """The page over a studio."""
    with gr.Blocks(title="shapediff", analytics_enabled=False) as page:
        gr.Markdown(TITLE)
        with gr.Row():
            with gr.Column(scale=2, min_width=360):
                fields = what_to_make()
                with gr.Tabs():
                    with gr.Tab("Generate") as generate_tab:
                        generate = gr.Button("Generate", variant="primary", elem_id="generate")
                    with gr.Tab("Edit"):
                        fields |= edit_fields()
                        edit = gr.Button("Apply", variant="primary", elem_id="apply")
                stop = gr.Button("Stop", size="sm", elem_id="stop")
                fields |= how_to_sample()
                with generate_tab:
                    ideas(fields)
            with gr.Column(scale=3, min_width=420, elem_classes="result"):
                result = _result()
        _offer_checkpoints(studio, page, fields)
        _run(studio, generate, studio.generate, fields, result)
        _run(studio, edit, studio.edit, fields, result)
        result.format.input(_files(studio), [result.token, result.format], result.files, **FILES)

        def stop_job(request: gr.Request) -> None:
            studio.jobs.stop(_visitor(request))

        stop.click(stop_job, **QUIET)
        page.unload(stop_job)
    return page


def _result() -> Result:
    token = gr.State()
    picture = gr.HTML(EMPTY, elem_classes="viewer")
    message = gr.Markdown(elem_id="message")
    with gr.Group(visible=False) as group:
        format = gr.Radio([*MESH_FORMATS, *VOXEL_FORMATS], value="glb", label="Take them with you as", elem_id="format")
        files = gr.File(label="Files", file_count="multiple", interactive=False, elem_id="files")
    return Result(token, picture, message, group, format, files)


def _offer_checkpoints(studio: Studio, page: gr.Blocks, fields: Fields) -> None:
    names = ("label", "second_label", "guidance", "quality", "steps", "sampler")
    outputs = [fields[name] for name in names]

    def choose(name: str) -> list[Any]:
        with _errors_shown():
            values = of_checkpoint(studio, name)
        return [values[name] for name in names]

    def look() -> list[Any]:
        with _errors_shown():
            found = studio.checkpoints.names()
        return [gr.update(choices=found, value=found[0]), *choose(found[0])]

    page.load(look, None, [fields["checkpoint"], *outputs], **QUIET)
    fields["checkpoint"].input(choose, fields["checkpoint"], outputs, **QUIET)


def _run(studio: Studio, button: gr.Button, job: Callable[..., Made], fields: Fields, result: Result) -> None:
    """A click asks for a turn, waits for it, computes, and shows."""
    names = [*fields, "token", "format"]
    inputs = [*fields.values(), result.token, result.format]
    outputs = [result.token, result.picture, result.message, result.group, result.files]
    outputs += [fields["source_shape"], fields["target_shape"]]

    def begin(request: gr.Request) -> None:
        studio.jobs.begin(_visitor(request))

    def compute(request: gr.Request, progress: gr.Progress = gr.Progress(), *values: Any) -> list[Any]:  # noqa: B008
        form = dict(zip(names, values, strict=True))
        started = time.monotonic()
        with _errors_shown():
            made = job(_visitor(request), form, lambda done, steps: progress((done, steps), unit="steps"))
            shapes = studio.results.shapes(made.token)
            files = _files(studio)(made.token, form["format"])
        choices = gr.update(choices=list(made.names), value=made.names[0])
        message = f"{made.message} {time.monotonic() - started:.0f} s."
        return [made.token, viewer(shapes), message, gr.update(visible=True), files, choices, choices]

    button.click(begin, **QUIET).then(compute, inputs, outputs, show_progress_on=result.picture, **SAMPLING)


def _files(studio: Studio) -> Callable[[Any, Any], list[str] | None]:
    def files(token: Any, format: Any) -> list[str] | None:
        if token is None:
            return None
        with _errors_shown():
            return [str(path) for path in studio.results.files(token, format)]

    return files


def _visitor(request: gr.Request) -> str:
    return str(request.session_hash)[:64]


@contextmanager
def _errors_shown() -> Iterator[None]:
    """What the visitor did wrong is shown to them; what else goes wrong is for the log."""
    try:
        yield
    except ShapediffError as error:
        text = html.escape(str(error), quote=False)
        raise gr.Error(text, duration=None, print_exception=False) from error
