"""report.jsonl: what became of each source of a data set, a line a source, and the summary of a run."""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from shapediff.data.manifest import SPLITS, Manifest
from shapediff.data.shards import write_bytes

logger = logging.getLogger(__name__)

REPORT_NAME = "report.jsonl"


@dataclass(frozen=True)
class ReportLine:
    """One mesh or grid: `fill` is the part of the voxels inside, `reason` says why it was skipped.

    `faces` and `watertight` are of the mesh as read, `method` says how its solid was found (`geometry.voxelize.Solid`); None
    for grids. `reused` if an earlier run had done the work.
    """

    source: str
    status: Literal["ok", "skipped"]
    reason: str = ""
    faces: int | None = None
    watertight: bool | None = None
    method: str | None = None
    fill: float | None = None
    seconds: float = 0.0
    reused: bool = False


# Called after each source with its line, how many are done and how many there are.
Progress = Callable[[ReportLine, int, int], None]


@dataclass(frozen=True)
class PrepareSummary:
    """What a run of `prepare` or `import_voxels` left in `out`.

    `reasons` counts what was skipped by the kind of its reason, `num_skipped_per_class` by class, where it is known.
    """

    out: Path
    num_ok: int
    num_skipped: int
    num_reused: int
    num_per_class: dict[str, int]
    num_per_split: dict[str, int]
    num_skipped_per_class: dict[str, int]
    reasons: dict[str, int]
    seconds: float


def write_report(out: Path, lines: Sequence[ReportLine]) -> None:
    """Write OUT/report.jsonl at once."""
    text = "".join(json.dumps(asdict(line)) + "\n" for line in lines)
    write_bytes(out / REPORT_NAME, text.encode("ascii"))


def log_skip(line: ReportLine) -> None:
    """Warn of a source that was left out."""
    if line.status == "skipped":
        logger.warning("skipped %s: %s", printable(line.source), line.reason)


def summarize(
    out: Path,
    manifest: Manifest,
    lines: Sequence[ReportLine],
    *,
    seconds: float,
    class_of: Mapping[str, str] | None = None,
) -> PrepareSummary:
    """The summary of a finished run; `class_of` gives the class of each source that was skipped."""
    skipped = [line for line in lines if line.status == "skipped"]
    per_class = Counter(shape.class_name for shape in manifest.shapes)
    per_split: Counter[str] = Counter(shape.split for shape in manifest.shapes)
    return PrepareSummary(
        out=out,
        num_ok=len(lines) - len(skipped),
        num_skipped=len(skipped),
        num_reused=sum(line.reused for line in lines),
        num_per_class={name: per_class[name] for name in manifest.classes},
        num_per_split={name: per_split[name] for name in SPLITS},
        num_skipped_per_class=dict(Counter(class_of[line.source] for line in skipped)) if class_of else {},
        reasons=dict(Counter(_kind(line.reason) for line in skipped).most_common()),
        seconds=seconds,
    )


def _kind(reason: str) -> str:
    """A reason without what is particular to one mesh: what follows a colon or semicolon, names, numbers."""
    head = re.sub(r"'[^']*'", "'...'", re.split(r"[:;] ", reason)[0])
    return re.sub(r"(?<![\w.])\d[\d.]*(e[-+]?\d+)?", "N", head)[:100]


def printable(name: str) -> str:
    """A file name with bytes that are not text, and control characters, shown as escapes."""
    shown = name.encode("utf-8", "backslashreplace").decode("utf-8")
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in shown)
