"""An evaluation as JSON and as tables of text, and where these go."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shapediff.errors import ConfigError, DataError
from shapediff.evaluation.distances import DISTANCES
from shapediff.evaluation.evaluator import OVERALL, Evaluation
from shapediff.evaluation.intervals import Estimate


@dataclass(frozen=True)
class _Row:
    """How a metric is shown: what it is, where good ones are, and by what it is multiplied."""

    title: str
    aim: str
    factor: float = 1.0
    digits: int = 3


_ROWS: dict[str, _Row] = {
    "1-nna": _Row("1-NNA, %", "50", 100, 1),
    "cov": _Row("COV, %", "as training shapes", 100, 1),
    "mmd": _Row("MMD x 1000", "low", 1000, 2),
    "fid": _Row("FID, classifier features", "low", 1, 2),
    "kid": _Row("KID x 1000", "0", 1000, 2),
    "precision": _Row("precision, %", "as training shapes", 100, 1),
    "recall": _Row("recall, %", "as training shapes", 100, 1),
    "accuracy": _Row("class accuracy, %", "as held-out", 100, 1),
    "jsd": _Row("JSD, bits", "low", 1, 4),
    "novelty": _Row("novelty, %", "50", 100, 1),
    "to-train": _Row("1 - IoU to nearest training shape", "as held-out", 1, 3),
    "diversity": _Row("diversity, mean 1 - IoU", "as held-out", 1, 3),
    "parts": _Row("parts a shape", "as held-out", 1, 2),
    "one-part": _Row("in one part, %", "as held-out", 100, 1),
    "closed": _Row("closed, %", "100", 100, 1),
    "bits": _Row("bits a voxel, held-out shapes", "low", 1, 5),
    "reconstruction": _Row("IoU of the autoencoder, held-out shapes, %", "100", 100, 1),
}
_BY_CLASS = (
    "1-nna-cd",
    "cov-cd",
    "mmd-cd",
    "1-nna-iou",
    "accuracy",
    "fid",
    "recall",
    "novelty",
    "one-part",
    "bits",
    "reconstruction",
)


def report_path(folder: Path, settings: Mapping[str, Any], *, beside: bool) -> Path:
    """`report.json` in `folder`, where there is none or one of the same settings, which may be written anew.

    Otherwise, with `beside`, the first of report-2.json, report-3.json ... of which that is true; without, ConfigError, naming
    what differs. Raises DataError for a report that is damaged.
    """
    wanted = _comparable(json.loads(json.dumps(settings)))
    for number in range(1, 10_000):
        path = folder / ("report.json" if number == 1 else f"report-{number}.json")
        if not path.exists():
            return path
        try:
            found = _comparable(json.loads(path.read_text(encoding="utf-8"))["settings"])
        except (OSError, ValueError, TypeError, LookupError) as error:
            raise DataError(f"{path} is no report ({error!r}); move it away or use another --out") from error
        different = sorted(key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key))
        if not different:
            return path
        if not beside:
            key = different[0]
            raise ConfigError(
                f"{path} is a report of {key}={found.get(key)}, this command says {key}={wanted.get(key)}; use another --out"
            )
    raise ConfigError(f"{folder} holds too many reports; use another --out")


def _comparable(settings: dict[str, Any]) -> dict[str, Any]:
    """What identifies a report: nested settings by dotted names, without how long it and each of its shapes took."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        inner = {f"{key}.{name}": item for name, item in value.items()} if isinstance(value, dict) else {key: value}
        flat |= inner
    for measured in ("seconds", "seconds_each"):
        flat.pop(measured, None)
    return flat


def to_json(evaluation: Evaluation, settings: dict[str, Any]) -> dict[str, Any]:
    """Plain values: for each class and overall, for each metric, value, low and high of each of the three sets."""
    sets = {"samples": evaluation.generated, "training": evaluation.train, "held_out": evaluation.held_out}
    names = [OVERALL, *evaluation.counts]
    return {
        "settings": settings,
        "counts": evaluation.counts,
        "scores": {
            name: {
                metric: {key: _plain(scores[name][metric]) for key, scores in sets.items() if metric in scores[name]}
                for metric in evaluation.generated[name]
            }
            for name in names
        },
    }


def table(evaluation: Evaluation) -> str:
    """Markdown: overall with 95 % intervals beside real shapes, then the classes."""
    generated, train, held_out = (s[OVERALL] for s in (evaluation.generated, evaluation.train, evaluation.held_out))
    num, num_classes = sum(evaluation.counts.values()), len(evaluation.counts)
    lines = [
        f"{num} samples, {num} held-out and {num} training shapes of {num_classes} classes.",
        "",
        "| overall | samples | training shapes in their place | held-out shapes | aim |",
        "|---|---|---|---|---|",
    ]
    for metric in sorted(generated, key=_order):
        cells = [cell(metric, _plain(s[metric])) if metric in s else "" for s in (generated, train, held_out)]
        lines.append(f"| {title(metric)} | {' | '.join(cells)} | {_row(metric).aim} |")
    shown = [metric for metric in _BY_CLASS if metric in generated]
    lines += [
        "",
        f"| class | shapes | {' | '.join(title(metric) for metric in shown)} |",
        "|---|---|" + "---|" * len(shown),
    ]
    for name, count in evaluation.counts.items():
        values = [cell(metric, _plain(evaluation.generated[name][metric])) for metric in shown]
        lines.append(f"| {name} | {count} | {' | '.join(values)} |")
    return "\n".join(lines) + "\n"


def title(metric: str) -> str:
    """What tables call a metric."""
    distance = metric.rpartition("-")[2]
    name = _row(metric).title
    if distance not in DISTANCES:
        return name
    first, comma, unit = name.partition(",")
    return f"{first} {distance.upper()}{comma}{unit}" if comma else f"{name}, {distance.upper()}"


def cell(metric: str, found: Mapping[str, float]) -> str:
    """How tables show what a report says of a metric: its value and half its interval, in the unit of `title`."""
    digits = _row(metric).digits
    value, high = (in_unit(metric, found[key]) for key in ("value", "high"))
    return f"{value:.{digits}f} ± {high - value:.{digits}f}"


def in_unit(metric: str, value: float) -> float:
    """`value` in the unit of `title`."""
    return _row(metric).factor * value


def _row(metric: str) -> _Row:
    base, _, distance = metric.rpartition("-")
    return _ROWS[base if distance in DISTANCES else metric]


def _order(metric: str) -> tuple[int, str]:
    base, _, distance = metric.rpartition("-")
    return list(_ROWS).index(base if distance in DISTANCES else metric), metric


def _plain(estimate: Estimate) -> dict[str, float]:
    return {"value": estimate.value, "low": estimate.low, "high": estimate.high}
