"""The form: its fields by the names that the studio reads."""

from __future__ import annotations

from typing import Any

import gradio as gr

from shapediff.app.edits import BETWEEN, EDITS, MAX_SHARE, MIN_SHARE
from shapediff.app.settings import MAX_GUIDANCE, MAX_SEED, MAX_SHAPES, MAX_STEPS, NO_CLASS, SIDES
from shapediff.app.studio import SOURCES, Studio
from shapediff.app.uploads import MAX_MEGABYTES, UPLOAD_SUFFIXES
from shapediff.diffusion.samplers import SAMPLERS

Fields = dict[str, gr.components.Component]

PRESETS = {"quick": ("dpm_solver", 12), "good": ("ddim", 50), "best": ("ddim", 150)}
EDIT_HELP = {
    "Complete": "Keep one side of a shape as it is; the model makes the rest.",
    "Vary": "The same shape again, a little different, or very.",
    "Interpolate": "The way from one shape to another, in as many shapes as asked for above.",
    "Mix classes": "Something of two classes: both pull at every step.",
}
QUIET: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
"""How a field that changes others asks the server: at once, beside the queue of jobs."""

NEW_SEED = f"() => Math.floor(Math.random() * {MAX_SEED})"


def what_to_make() -> Fields:
    """Model, class and number."""
    with gr.Group():
        checkpoint = gr.Dropdown([], label="Model", elem_id="checkpoint")
        with gr.Row():
            label = gr.Dropdown([NO_CLASS], value=NO_CLASS, label="Class", elem_id="label")
            num = gr.Slider(1, MAX_SHAPES, value=4, step=1, label="How many", elem_id="num")
    return {"checkpoint": checkpoint, "label": label, "num": num}


def how_to_sample() -> Fields:
    """Quality, seed and what is behind them."""
    new_seed = gr.Button("new", render=False)
    with gr.Group(), gr.Row():
        quality = gr.Radio(list(PRESETS), value="good", label="Quality", info="Better takes longer.", scale=3)
        seed = gr.Number(
            0,
            label="Seed",
            info="The same one gives the same shapes.",
            precision=0,
            scale=2,
            min_width=150,
            buttons=[new_seed],
            elem_id="seed",
        )
    with gr.Accordion("More settings", open=False):
        guidance = gr.Slider(
            0,
            MAX_GUIDANCE,
            value=3,
            step=0.5,
            label="Guidance",
            info="How strictly to keep to the class; 1 is not at all.",
        )
        steps = gr.Slider(1, MAX_STEPS, value=50, step=1, label="Steps", info="More steps, finer shapes, longer waits.")
        sampler = gr.Dropdown(list(SAMPLERS), value="ddim", label="Sampler")
        mirror = gr.Checkbox(label="Symmetric: left and right mirror each other")
    new_seed.click(None, None, seed, js=NEW_SEED, api_visibility="private")
    quality.input(lambda name: PRESETS.get(name, PRESETS["good"]), quality, [sampler, steps], **QUIET)
    return {
        "seed": seed,
        "guidance": guidance,
        "steps": steps,
        "sampler": sampler,
        "mirror": mirror,
        "quality": quality,
    }


def ideas(fields: Fields) -> None:
    """Settings to try, at a click."""
    gr.Examples(
        [[1, "dpm_solver", 12, 3.0], [9, "ddim", 50, 3.0], [4, "ddim", 50, 1.0], [4, "ddim", 50, 7.0]],
        [fields[name] for name in ("num", "sampler", "steps", "guidance")],
        example_labels=["one, quickly", "nine to choose from", "wild: no guidance", "strict: much guidance"],
        label="Try",
        cache_examples=False,
        api_visibility="private",
    )


def edit_fields() -> Fields:
    """What each edit asks for; only what belongs to the chosen one is shown."""
    edit = gr.Radio(list(EDITS), value="Complete", label="Edit", elem_id="edit")
    help = gr.Markdown(EDIT_HELP["Complete"])
    between = gr.Radio(list(BETWEEN), value=BETWEEN[0], label="Between", visible=False)
    with gr.Group() as source_group:
        source = _shape_fields("source", "Start from")
    with gr.Group(visible=False) as target_group:
        target = _shape_fields("target", "End at")
    with gr.Row() as side_row:
        side = gr.Dropdown(list(SIDES), value="bottom", label="Keep the")
        share = gr.Slider(MIN_SHARE, MAX_SHARE, value=0.5, step=0.05, label="How much of the cube")
    strength = gr.Slider(
        0, 1, value=0.5, step=0.05, label="Strength", info="0 changes nothing, 1 begins anew.", visible=False
    )
    second_seed = gr.Number(1, label="Second seed", precision=0, visible=False)
    second_label = gr.Dropdown([], label="Second class", visible=False)
    second_share = gr.Slider(0, 1, value=0.5, step=0.05, label="Share of the second class", visible=False)
    shown = [help, between, source_group, target_group, side_row, strength, second_seed, second_label, second_share]

    def show(edit: str, between: str) -> list[Any]:
        is_way = edit == "Interpolate"
        between_shapes = is_way and between == "two shapes"
        visible = [
            is_way,
            edit in ("Complete", "Vary") or between_shapes,
            between_shapes,
            edit == "Complete",
            edit == "Vary",
            is_way and between == "two seeds",
            edit == "Mix classes" or (is_way and between == "two classes"),
            edit == "Mix classes",
        ]
        return [EDIT_HELP.get(edit, ""), *(gr.update(visible=is_shown) for is_shown in visible)]

    for choice in (edit, between):
        choice.change(show, [edit, between], shown, **QUIET)
    return {
        "edit": edit,
        "between": between,
        **source,
        **target,
        "side": side,
        "share": share,
        "strength": strength,
        "second_seed": second_seed,
        "second_label": second_label,
        "second_share": second_share,
    }


def _shape_fields(which: str, title: str) -> Fields:
    kind = gr.Radio(list(SOURCES), value=SOURCES[0], label=title)
    shape = gr.Dropdown([], label="Shape", info="Those on the right; generate some first.", elem_id=f"{which}_shape")
    file = gr.File(
        label=f"Mesh, up to {MAX_MEGABYTES} MB",
        file_types=list(UPLOAD_SUFFIXES),
        height=110,
        visible=False,
        elem_id=f"{which}_file",
    )
    up = gr.Radio([("y is up", "y"), ("z is up", "z")], value="y", label="Axes", visible=False)
    kind.change(
        lambda kind: [gr.update(visible=(kind == SOURCES[0]) == is_made) for is_made in (True, False, False)],
        kind,
        [shape, file, up],
        **QUIET,
    )
    return {f"{which}_kind": kind, f"{which}_shape": shape, f"{which}_file": file, f"{which}_up": up}


def of_checkpoint(studio: Studio, name: str) -> dict[str, Any]:
    """What the fields become when a checkpoint is chosen: its classes, and the settings that it was exported with.

    What the model does not use, such as steps and samplers, is hidden.
    """
    pipeline = studio.checkpoints.load(name)
    classes, sampling = list(pipeline.classes), pipeline.config.sampling
    has_steps = "num_steps" in pipeline.sampling_settings
    return {
        "label": gr.update(choices=[*classes, NO_CLASS], value=classes[0]),
        "second_label": gr.update(choices=classes, value=classes[-1]),
        "guidance": gr.update(
            value=min(sampling.guidance_scale, MAX_GUIDANCE), visible="guidance_scale" in pipeline.sampling_settings
        ),
        "quality": gr.update(visible=has_steps),
        "steps": gr.update(value=min(sampling.num_steps, MAX_STEPS), visible=has_steps),
        "sampler": gr.update(value=sampling.sampler, visible=has_steps),
    }
