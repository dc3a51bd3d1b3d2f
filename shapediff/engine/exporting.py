"""An export from the states of a run, on a machine without DeepSpeed: nothing here imports what trains."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shapediff.checkpoint import EXPORT_FOLDER, ExportConfig, config_to_dict, read_config, read_export, write_export
from shapediff.engine.state_files import PROGRESS_FILE, TensorFiles, check_file, finished_states, read_manifest
from shapediff.errors import CheckpointError
from shapediff.files import write_json
from shapediff.methods import Method

log = logging.getLogger(__name__)

MODEL_FILE, SETTINGS_FILE, STATE_FOLDER, TAKEN_FOLDER = "model.json", "config.json", "state", "taken"


def record_model(run: Path, config: ExportConfig) -> None:
    """Leave in the run's folder what an export says beside the weights and how far they are trained."""
    write_json(run / MODEL_FILE, config_to_dict(config))


def recorded_model(run: Path) -> ExportConfig | None:
    """What `record_model` left; None where there is nothing, as in runs of earlier versions."""
    return read_config(run / MODEL_FILE) if (run / MODEL_FILE).is_file() else None


def trained(config: ExportConfig, *, step: int, samples_seen: int, seconds: float) -> ExportConfig:
    """`config` with how far its weights are trained among the facts for people."""
    progress = {"steps": step, "samples_seen": samples_seen, "time": duration(seconds)}
    return replace(config, training={**config.training, **progress})


def exported(method: Method, weights: Mapping[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """Those of the networks in `weights` that sampling needs, which an export holds."""
    with torch.device("meta"):
        left_out = method.build_training_networks()
    return {name: state for name, state in weights.items() if name not in left_out}


def export_run(run: str | Path, out: str | Path | None = None, *, step: int | None = None) -> Path:
    """Write the export of a run's newest intact state, or of that at `step`, to `out` (RUN/export); returns its folder.

    It is what the run itself exports at its end, to the byte, from any number of ranks and any ZeRO stage. Raises
    CheckpointError where there is no such state, or none that is intact.
    """
    run = Path(run)
    if not (run / STATE_FOLDER).is_dir():
        raise CheckpointError(f"{run} is no run that can be exported: there is no folder {run / STATE_FOLDER}")
    config = recorded_model(run)
    if config is None:
        raise CheckpointError(
            f"{run / MODEL_FILE} is missing: of an earlier version; resume the run once, which writes it"
        )
    dtype = _export_dtype(run / SETTINGS_FILE)
    state = _newest_intact(run / STATE_FOLDER, step)
    progress, weights = read_average(state)
    facts = {key: progress[key] for key in ("step", "samples_seen", "seconds")}
    method = config.build_method()
    weights |= taken_weights(run, method)
    folder = Path(out) if out is not None else run / EXPORT_FOLDER
    write_export(folder, trained(config, **facts), exported(method, weights), dtype=dtype)
    return folder


def read_average(state: Path) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """progress.json of a state, and the whole averaged weights by network and parameter, float32."""
    progress = json.loads((state / PROGRESS_FILE).read_text(encoding="utf-8"))
    files = TensorFiles([state / name for name in sorted(read_manifest(state)) if name != PROGRESS_FILE])
    weights: dict[str, dict[str, Tensor]] = {}
    for name, shape in progress["parameters"].items():
        whole = torch.empty(math.prod(shape))
        files.fill(whole, f"ema/{name}", 0)
        network, parameter = name.split(".", 1)
        weights.setdefault(network, {})[parameter] = whole.view(shape)
    return progress, weights


def taken_weights(run: Path, method: Method) -> dict[str, dict[str, Tensor]]:
    """State dicts of the method's frozen networks, from the copy of what they were taken from in the folder of a run."""
    return method.taken_weights(read_export(run / TAKEN_FOLDER).networks) if method.frozen else {}


def duration(seconds: float) -> str:
    """Seconds as "1 h 05 min", "5 min" or "40 s"."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _newest_intact(directory: Path, step: int | None) -> Path:
    states = finished_states(directory)
    if step is not None:
        known = ", ".join(str(int(state.name.removeprefix("step-"))) for state in states)
        states = [state for state in states if state.name == f"step-{step:08d}"]
        if not states:
            raise CheckpointError(f"{directory} holds no state of step {step}; there are: {known or 'none'}")
    problems = []
    for state in reversed(states):
        try:
            for name, facts in read_manifest(state).items():
                check_file(state / name, facts)
            return state
        except CheckpointError as error:
            problems.append(str(error))
            log.warning("%s; looking for an older state", error)
    raise CheckpointError(f"no state in {directory} is intact: {'; '.join(problems) or 'there is none'}")


def _export_dtype(settings: Path) -> torch.dtype:
    try:
        found: Mapping[str, Any] = json.loads(settings.read_text(encoding="utf-8"))["train"]
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[found["export_dtype"]]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise CheckpointError(f"{settings} does not say what the weights are stored in: {error!r}") from error
