"""Where a checkpoint comes from: a folder, a model that comes with shapediff, or the Hugging Face hub where a hub id is given."""

from __future__ import annotations

import re
from pathlib import Path

from shapediff.checkpoint import CARD_FILE, CONFIG_FILE, EXPORT_FOLDER, WEIGHTS_FILE, find_export
from shapediff.errors import CheckpointError

RUNS_FOLDER = Path("runs")
PRETRAINED_FOLDER = Path(__file__).parent / "pretrained"
DOWNLOADED_FILES = (CONFIG_FILE, WEIGHTS_FILE, CARD_FILE)
"""All that is ever taken from the hub: JSON, safetensors and text, nothing that could hold code."""


def locate(source: str | Path, *, revision: str | None = None) -> Path:
    """The export folder that `source` names. Raises CheckpointError, saying where it was looked for, where there is none.

    A folder that exists holds. Otherwise the name of a model that comes with shapediff; otherwise, given as text, a hub id
    "user/name", which is downloaded unless it was before (`revision`: a branch, tag or commit there). A path such as runs/a,
    or one in a folder that exists, is never taken for a hub id.
    """
    path = Path(source)
    if path.exists():
        return find_export(path)
    if str(source) in pretrained_names():
        return find_export(PRETRAINED_FOLDER / source)
    if isinstance(source, str) and _is_hub_id(source):
        return find_export(_download(source, revision))
    known = ", ".join(pretrained_names()) or "none"
    raise CheckpointError(
        f"no checkpoint at {source}: there is no such file or folder, nor does a model of that name come with shapediff "
        f"(there are: {known})"
    )


def default_checkpoint(runs: Path = RUNS_FOLDER) -> Path:
    """The newest export of a run under `runs`, else the first model that comes with shapediff. Raises CheckpointError."""
    configs = list(runs.glob(f"*/{EXPORT_FOLDER}/{CONFIG_FILE}"))
    if configs:
        return max(configs, key=lambda path: path.stat().st_mtime).parent
    names = pretrained_names()
    if not names:
        raise CheckpointError(
            f"there is no trained model under {runs}/, and none comes with this copy of shapediff; train one (`make quickstart` "
            "or `deepspeed launch/train.py`), or say where it is: --checkpoint RUN_OR_EXPORT"
        )
    return find_export(PRETRAINED_FOLDER / names[0])


def pretrained_names() -> list[str]:
    """The models that come with shapediff, sorted."""
    return sorted(config.parent.name for config in PRETRAINED_FOLDER.glob(f"*/{CONFIG_FILE}"))


def _is_hub_id(source: str) -> bool:
    user, _, name = source.partition("/")
    part = r"[A-Za-z0-9][\w.-]*"
    return (
        bool(re.fullmatch(part, user) and re.fullmatch(part, name))
        and user != RUNS_FOLDER.name
        and not Path(user).exists()
    )


def _download(hub_id: str, revision: str | None) -> str:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise CheckpointError(
            f"there is no folder {hub_id}; to fetch it from the Hugging Face hub: pip install 'shapediff[hub]'"
        ) from error
    try:
        return snapshot_download(hub_id, revision=revision, allow_patterns=list(DOWNLOADED_FILES))
    except Exception as error:  # those of the library that carries it among them, which changes from version to version
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"there is no folder {hub_id}, and the Hugging Face hub does not give it: {reason}"
        ) from error
