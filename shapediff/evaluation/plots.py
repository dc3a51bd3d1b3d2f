"""An evaluation as a picture; needs matplotlib (`pip install shapediff[plot]`)."""

from __future__ import annotations

from pathlib import Path

from shapediff.errors import ConfigError
from shapediff.evaluation.evaluator import OVERALL, Evaluation
from shapediff.evaluation.intervals import Estimate
from shapediff.evaluation.report import title
from shapediff.files import replaced_file

SHOWN = ("1-nna-cd", "cov-cd", "1-nna-iou", "accuracy", "novelty", "one-part")


def plot(evaluation: Evaluation, path: Path) -> None:
    """Write a PNG: a panel a metric, a row a class, samples (blue) beside training shapes in their place (grey), with intervals.

    Raises ConfigError where matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("--plot needs matplotlib: pip install matplotlib") from error
    names = [OVERALL, *evaluation.counts]
    shown = [metric for metric in SHOWN if metric in evaluation.generated[OVERALL]]
    figure = Figure(figsize=(2.6 * len(shown), 1.2 + 0.3 * len(names)), layout="constrained")
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for panel, metric in zip(panels, shown, strict=True):
        for scores, colour, shift in ((evaluation.train, "0.6", 0.15), (evaluation.generated, "tab:blue", -0.15)):
            rows = [scores[name][metric] for name in names]
            panel.errorbar(
                [100 * row.value for row in rows],
                [i + shift for i in range(len(names))],
                xerr=[100 * _half_width(row) for row in rows],
                fmt="o",
                color=colour,
                markersize=4,
            )
        if metric.startswith(("1-nna", "novelty")):
            panel.axvline(50, color="0.8", zorder=0)
        panel.set_title(title(metric), fontsize=9)
        panel.set_xlim(-4, 104)
        panel.set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    FigureCanvasAgg(figure)
    with replaced_file(path) as partial:
        figure.savefig(partial, dpi=130)


def _half_width(estimate: Estimate) -> float:
    return estimate.high - estimate.value
