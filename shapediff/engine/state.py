"""The resumable state of a run: written aside, published by rename, so that what is there is always complete.

Resume data is read back by the run that wrote it and is not for sharing; exports are (see shapediff.checkpoint).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from shapediff.engine import distributed
from shapediff.engine.ema import Ema
from shapediff.errors import CheckpointError
from shapediff.files import write_json

PROGRESS_FILE = "progress.json"
PARTIAL = ".partial"


@dataclass(frozen=True)
class Progress:
    """Where a run stands: steps done and how many of them were left out, samples seen, seconds spent, layout of its shards."""

    step: int = 0
    skipped: int = 0
    samples_seen: int = 0
    seconds: float = 0.0
    world_size: int = 1
    zero_stage: int = 0


def save_state(directory: Path, progress: Progress, engines: Mapping[str, Any], ema: Ema, *, keep: int) -> Path:
    """Write `directory`/step-N from every rank and remove all but the newest `keep`; returns the folder."""
    final = directory / f"step-{progress.step:08d}"
    partial = final.with_name(final.name + PARTIAL)
    if distributed.is_main():
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    distributed.barrier()
    for name, engine in engines.items():
        engine.save_checkpoint(str(partial), tag=name, save_latest=False)
    torch.save({"ema": ema.state_dict(), "rng": torch.get_rng_state()}, partial / _rank_file())
    distributed.barrier()
    if distributed.is_main():
        write_json(partial / PROGRESS_FILE, asdict(progress))
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        for old in _finished(directory)[:-keep]:
            shutil.rmtree(old)
    distributed.barrier()
    return final


def load_newest_state(directory: Path, engines: Mapping[str, Any], ema: Ema, *, zero_stage: int) -> Progress | None:
    """Take up the newest state under `directory` on every rank; None where there is none.

    Raises CheckpointError when it was written with another number of ranks or another ZeRO stage.
    """
    finished = _finished(directory)
    if not finished:
        return None
    newest = finished[-1]
    progress = Progress(**json.loads((newest / PROGRESS_FILE).read_text(encoding="utf-8")))
    found, now = (progress.world_size, progress.zero_stage), (distributed.world_size(), zero_stage)
    if found != now:
        raise CheckpointError(
            f"{newest} was written by {found[0]} ranks under ZeRO stage {found[1]}, this run has {now[0]} under stage {now[1]}; "
            "resume with the same, or start another run_dir"
        )
    for name, engine in engines.items():
        loaded, _ = engine.load_checkpoint(str(newest), tag=name)
        if loaded is None:
            raise CheckpointError(f"{newest / name} cannot be read; remove {newest} to resume from the state before it")
    mine = torch.load(newest / _rank_file(), weights_only=True)
    ema.load_state_dict(mine["ema"])
    torch.set_rng_state(mine["rng"])
    return progress


def _finished(directory: Path) -> list[Path]:
    return sorted(p for p in directory.glob("step-*") if p.suffix != PARTIAL and (p / PROGRESS_FILE).is_file())


def _rank_file() -> str:
    return f"rank-{distributed.rank():05d}.pt"
