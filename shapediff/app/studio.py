"""What the page does, without the page: a visitor's form in, shapes kept under a token out."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from shapediff.app.checkpoints import Checkpoints
from shapediff.app.edits import EDITS, Form, Voxels
from shapediff.app.jobs import Jobs, Stopped
from shapediff.app.results import Results, remove_old
from shapediff.app.settings import Settings, one_of, settings
from shapediff.app.uploads import Uploads
from shapediff.diffusion.samplers import OnStep
from shapediff.errors import ConfigError
from shapediff.pipeline import ShapePipeline
from shapediff.shapes import Shapes, joined

FILES_FOLDER, GRIDS_FOLDER = "files", "grids"
STOPPABLE = 4
"""Shapes that a CPU computes together, and that are lost where a visitor stops before they are done."""
SOURCES = ("a shape made here", "my own mesh")


@dataclass(frozen=True)
class Made:
    """What a job made: the token of its shapes, their names, and a line for the visitor."""

    token: str
    names: tuple[str, ...]
    message: str


class Studio:
    """Everything behind the page. `work` is a folder of its own; what lies in its `files` may be read from outside."""

    def __init__(self, checkpoints: Checkpoints, work: Path) -> None:
        self.checkpoints = checkpoints
        self.files, self._grids = work / FILES_FOLDER, work / GRIDS_FOLDER
        for folder in (self.files, self._grids):
            folder.mkdir(parents=True, exist_ok=True)
        self.results = Results(self.files)
        self.uploads = Uploads(self.files, self._grids)
        self.jobs = Jobs()

    def generate(self, visitor: str, form: Form, on_step: OnStep | None = None) -> Made:
        """Sample shapes; stopped, those that are done. Raises ShapediffError, saying why, for a form that does not check."""
        pipeline = self.checkpoints.load(form["checkpoint"])
        chosen = _settings(pipeline, form)
        with self.jobs.turn(visitor, on_step) as step:
            shapes, message = _sample(pipeline, chosen, step)
        return self._keep(shapes, form, message)

    def edit(self, visitor: str, form: Form, on_step: OnStep | None = None) -> Made:
        """Make shapes out of shapes as `form["edit"]` says. Raises as `generate` does, and Stopped."""
        pipeline = self.checkpoints.load(form["checkpoint"])
        chosen = _settings(pipeline, form)
        prepare = EDITS[one_of("edit", form["edit"], EDITS)]
        with self.jobs.turn(visitor, on_step) as step:
            shapes = prepare(pipeline, chosen, form, lambda which: self._voxels(which, pipeline, form))(step)
        return self._keep(shapes, form, f"{_counted(len(shapes))}.")

    def close(self) -> None:
        """End what runs beside the server."""
        self.uploads.stop()

    def _voxels(self, which: str, pipeline: ShapePipeline, form: Form) -> Voxels:
        """The voxels of the form's "source" or "target"."""
        if one_of("start", form[f"{which}_kind"], SOURCES) == "my own mesh":
            if form[f"{which}_file"] is None:
                raise ConfigError(f"bring a mesh for the {which} first, or choose a shape made here")
            up = one_of("up axis", form[f"{which}_up"], ("y", "z"))
            return self.uploads.voxels(form[f"{which}_file"], pipeline, up="z" if up == "z" else "y")
        shapes = self.results.shapes(form["token"])
        voxels = shapes.voxels[shapes.names.index(one_of(f"{which} shape", form[f"{which}_shape"], shapes.names))]
        if len(voxels) != pipeline.config.resolution:
            raise ConfigError(
                f"that shape has {len(voxels)} voxels a side and this model makes {pipeline.config.resolution}; "
                "choose the model that made it"
            )
        return voxels

    def _keep(self, shapes: Shapes, form: Form, message: str) -> Made:
        for folder in (self.files, self._grids):
            remove_old(folder)
        # Where checkpoints lie on this machine is no business of the visitor's.
        shapes = dataclasses.replace(shapes, settings={**shapes.settings, "checkpoint": form["checkpoint"]})
        token = self.results.keep(shapes)
        return Made(token, self.results.shapes(token).names, message)


def _settings(pipeline: ShapePipeline, form: Form) -> Settings:
    names = ("label", "num", "seed", "guidance", "steps", "sampler", "mirror")
    return settings(pipeline.classes, pipeline.sampling_settings, **{name: form[name] for name in names})


def _sample(pipeline: ShapePipeline, chosen: Settings, step: OnStep) -> tuple[Shapes, str]:
    """The shapes, and what to say; a CPU computes a few together, and those that are done before a stop are kept."""
    batch_size = STOPPABLE if pipeline.device.type == "cpu" else chosen.num
    done: list[Shapes] = []
    try:
        for shapes in pipeline.stream(
            chosen.num, label=chosen.label, batch_size=batch_size, on_step=step, **chosen.options()
        ):
            done.append(shapes)
    except Stopped as stopped:
        if not done:
            raise
        return joined(done), f"{stopped} {sum(map(len, done))} of {_counted(chosen.num)} done."
    return joined(done), f"{_counted(chosen.num)}."


def _counted(num: int) -> str:
    return "1 shape" if num == 1 else f"{num} shapes"
