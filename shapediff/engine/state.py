"""The resumable state of a run: one layout that any number of ranks, ZeRO stage and precision writes and reads.

Each rank writes its share of the float32 weights, of Adam's moments and of their average. All is written aside and published
by rename, so that what bears a state's name is complete; deleting renames first, for the same reason. Exports, not states,
are what people share (see shapediff.checkpoint).
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from shapediff.engine import distributed, state_files
from shapediff.engine.ema import Ema
from shapediff.engine.loss_scaling import load_scale_state, scale_state
from shapediff.engine.shares import Shares
from shapediff.engine.state_files import PROGRESS_FILE, FileFacts, TensorFiles, finished_states, rank_file
from shapediff.errors import CheckpointError

log = logging.getLogger(__name__)

PARTIAL, OLD, DAMAGED = ".partial", ".old", ".damaged"
_FAILED = "failed: "


@dataclass(frozen=True)
class Progress:
    """Where a run stands: steps done and how many of them were left out, samples seen, seconds spent."""

    step: int = 0
    skipped: int = 0
    samples_seen: int = 0
    seconds: float = 0.0


def save_state(
    directory: Path, progress: Progress, shares: Shares, ema: Ema, *, keep: int, keep_every: int = 0
) -> Path:
    """Write `directory`/step-N from every rank; then remove all but the newest `keep` and every `keep_every`-th step (0: none).

    Raises CheckpointError, on every rank, where any rank could not write; nothing is left of it then, and every state that
    was there before still is.
    """
    final = directory / f"step-{progress.step:08d}"
    partial = final.with_name(final.name + PARTIAL)
    try:
        _together(lambda: _start(partial))
        written = _together(lambda: _write_mine(partial, shares, ema), everywhere=True)
        _together(lambda: _publish(partial, final, progress, shares, ema, written))
    except CheckpointError:
        if distributed.is_main():
            shutil.rmtree(partial, ignore_errors=True)
        raise
    if distributed.is_main():
        prune(directory, keep=keep, keep_every=keep_every)
    return final


def load_newest_state(directory: Path, shares: Shares, ema: Ema) -> Progress | None:
    """Take up the newest state under `directory` that is intact, on every rank; None where there is none at all.

    A damaged one is set aside with a warning. Raises CheckpointError where none is intact, or where it is of other networks.
    """
    if distributed.is_main():
        _clear_remnants(directory)
    distributed.barrier()
    states = finished_states(directory)
    if len(set(distributed.gather_text(" ".join(folder.name for folder in reversed(states))))) > 1:
        raise CheckpointError(
            f"the ranks see different states in {directory}: run_dir must lie on a disk all nodes share"
        )
    damaged: dict[Path, str] = {}
    for folder in reversed(states):
        problems = [problem for problem in distributed.gather_text(_problem(folder)) if problem]
        if not problems:
            progress = _load(folder, shares, ema)
            if distributed.is_main():
                _set_aside(damaged)
            return progress
        damaged[folder] = problems[0]
    if damaged:
        raise CheckpointError(
            f"no state is intact: {'; '.join(damaged.values())}. Use another run_dir, or remove {directory} to start anew"
        )
    return None


def _together(work: Callable[[], str | None], *, everywhere: bool = False) -> list[str]:
    """What `work` answers, on rank 0 or on every rank, told to all; CheckpointError on all of them where it failed on one."""
    answer = ""
    if everywhere or distributed.is_main():
        try:
            answer = work() or ""
        except OSError as error:
            answer = f"{_FAILED}{error} (rank {distributed.rank()})"
    answers = distributed.gather_text(answer)
    failed = [answer.removeprefix(_FAILED) for answer in answers if answer.startswith(_FAILED)]
    if failed:
        raise CheckpointError(f"the state cannot be written: {failed[0]}")
    return answers


def _start(partial: Path) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)


def _write_mine(partial: Path, shares: Shares, ema: Ema) -> str:
    """Write this rank's file; what the manifest must say of it, as JSON."""
    tensors: dict[str, Tensor] = {
        "rng/cpu": torch.get_rng_state(),
        "rng/device": get_accelerator().get_rng_state().cpu(),
    }
    starts = {}
    for share, average in zip(shares.mine, ema.averages, strict=True):
        for kind, tensor in (shares.tensors(share) | {"ema": average}).items():
            tensors[f"{kind}/{share.name}"] = tensor
            starts[f"{kind}/{share.name}"] = share.start
    return json.dumps(asdict(state_files.write_tensors(partial / rank_file(distributed.rank()), tensors, starts)))


def _publish(partial: Path, final: Path, progress: Progress, shares: Shares, ema: Ema, written: list[str]) -> None:
    files = {rank_file(rank): FileFacts(**json.loads(facts)) for rank, facts in enumerate(written)}
    for name, facts in files.items():
        if not (partial / name).is_file() or (partial / name).stat().st_size != facts.size:
            raise OSError(f"{partial / name} is not seen on rank 0: run_dir must lie on a disk that all nodes share")
    engines = shares.engines.items()
    files[PROGRESS_FILE] = state_files.write_json_file(
        partial / PROGRESS_FILE,
        {
            **asdict(progress),
            "world_size": distributed.world_size(),
            "zero_stages": {name: int(engine.zero_optimization_stage()) for name, engine in engines},
            "ema_updates": ema.num_updates,
            "optimizer_steps": shares.num_steps(),
            "loss_scales": {name: scale_state(engine) for name, engine in engines},
            "parameters": shares.shapes,
        },
    )
    state_files.write_manifest(partial, files)
    if final.exists():
        _remove(final)
    partial.rename(final)
    state_files.sync(final.parent)


def _problem(folder: Path) -> str:
    """What is wrong with a state, as far as this rank looks: the ranks check its files in turns."""
    try:
        files = state_files.read_manifest(folder)
        for name in sorted(files)[distributed.rank() :: distributed.world_size()]:
            state_files.check_file(folder / name, files[name])
    except CheckpointError as error:
        return str(error)
    return ""


def _load(folder: Path, shares: Shares, ema: Ema) -> Progress:
    facts = json.loads((folder / PROGRESS_FILE).read_text(encoding="utf-8"))
    _check_parameters(folder, {name: tuple(shape) for name, shape in facts["parameters"].items()}, shares.shapes)
    files = TensorFiles([folder / name for name in sorted(state_files.read_manifest(folder)) if name != PROGRESS_FILE])
    shares.start_moments(facts["optimizer_steps"])
    for share in shares.held:
        for kind, tensor in shares.tensors(share).items():
            files.fill(tensor, f"{kind}/{share.name}", share.start)
    for share, average in zip(shares.mine, ema.averages, strict=True):
        files.fill(average, f"ema/{share.name}", share.start)
    shares.publish()
    ema.num_updates = facts["ema_updates"]
    for name, engine in shares.engines.items():
        load_scale_state(engine, facts["loss_scales"].get(name))
    _load_rng(files, facts["step"], facts["world_size"])
    return Progress(**{field.name: facts[field.name] for field in fields(Progress)})


def _check_parameters(
    folder: Path, found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> None:
    different = sorted(key for key in found.keys() | expected.keys() if found.get(key) != expected.get(key))
    if different:
        key = different[0]
        raise CheckpointError(
            f"{folder} is the state of another model: {len(different)} parameters differ, the first is {key} (state: "
            f"{found.get(key, 'none')}, this run: {expected.get(key, 'none')}); resume with the settings of its "
            "config.json, or use another run_dir"
        )


def _load_rng(files: TensorFiles, step: int, world_size: int) -> None:
    """On the same number of ranks every generator goes on; on another, each starts at a place of its own."""
    cpu, device = (files.of_rank(distributed.rank(), f"rng/{kind}") for kind in ("cpu", "device"))
    if world_size != distributed.world_size() or cpu is None or device is None:
        torch.manual_seed(step * 1_000_003 + distributed.rank())
        return
    torch.set_rng_state(cpu)
    if get_accelerator().device_name() != "cpu" and device.numel() == get_accelerator().get_rng_state().numel():
        get_accelerator().set_rng_state(device)


def prune(directory: Path, *, keep: int, keep_every: int) -> None:
    """Remove all finished states but the newest `keep` and every `keep_every`-th step (0: none)."""
    for folder in finished_states(directory)[:-keep]:
        step = int(folder.name.removeprefix("step-"))
        if not keep_every or step % keep_every:
            _remove(folder)


def _remove(folder: Path) -> None:
    """Delete so that what is half deleted bears no state's name; what cannot be deleted is left to the next start."""
    old = folder.with_name(folder.name + OLD)
    shutil.rmtree(old, ignore_errors=True)
    with suppress(OSError):
        folder.rename(old)
    shutil.rmtree(old, ignore_errors=True)


def _set_aside(damaged: Mapping[Path, str]) -> None:
    """Rename, so that damaged states neither count among those kept nor stand where the run will write again."""
    for folder, problem in damaged.items():
        aside = folder.with_name(folder.name + DAMAGED)
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
        log.warning("%s; set aside as %s, going on from the state before", problem, aside.name)


def _clear_remnants(directory: Path) -> None:
    for remnant in (*directory.glob(f"step-*{PARTIAL}"), *directory.glob(f"step-*{OLD}")):
        shutil.rmtree(remnant, ignore_errors=True)
