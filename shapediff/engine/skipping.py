"""Steps whose loss or gradient is not finite: left out on every rank alike, and the samples in them put down."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from shapediff.data.dataset import ShapeDataset
from shapediff.engine import distributed
from shapediff.engine.batches import MicroBatch
from shapediff.errors import TrainingError
from shapediff.methods import LossOutput

log = logging.getLogger(__name__)

SKIPPED_FILE = "skipped.jsonl"
MAX_SHOWN = 8


def carry_to_gradient(loss: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """`loss`, whose gradient is NaN where it is not finite itself.

    A loss can be infinite and its gradient not. The gradient is what all ranks share, and what every ZeRO stage looks at
    before a step: so no rank needs to be asked.
    """
    return loss * torch.where(loss.detach().isfinite(), 1.0, math.nan)


def clip_and_check(optimizer: Any, *, grad_clip: float) -> None:
    """Let a plain optimizer clip its gradient and leave out a step where that is not finite, as those of ZeRO 1 to 3 do.

    DeepSpeed's engine looks for `overflow` and `_global_grad_norm` on its optimizer, and finds them here.
    """

    def before_step(*_: object) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(parameters, grad_clip or math.inf)
        optimizer._global_grad_norm = norm
        optimizer.overflow = not norm.isfinite()
        if optimizer.overflow:
            # Without a gradient a parameter keeps its moments and its count of steps.
            for p in parameters:
                p.grad = None

    optimizer.register_step_pre_hook(before_step)


class SkippedSteps:
    """What is put down of steps that were left out, and how many in a row there may be; every rank holds one."""

    def __init__(self, run: Path, dataset: ShapeDataset, *, max_in_a_row: int) -> None:
        self._path = run / SKIPPED_FILE
        self._dataset = dataset
        self._max_in_a_row = max_in_a_row
        self._in_a_row = 0

    def taken(self) -> None:
        """A step was taken: the row ends."""
        self._in_a_row = 0

    def left_out(
        self, step: int, micro_batches: Sequence[MicroBatch], outputs: Sequence[LossOutput], *, loss_is_scaled: bool
    ) -> None:
        """Put down what may have spoiled step number `step`; every rank must call it, with its own part.

        A gradient that overflowed under a scaled loss counts for nothing: the next step has a lower scale. Raises
        TrainingError where this was one step too many in a row.
        """
        ranks, rows, cause = _offending(distributed.gathered(_samples(micro_batches, outputs)))
        if loss_is_scaled and cause == "gradient":
            return
        self._in_a_row += 1
        if distributed.is_main():
            self._write(step, cause, [self._described(rank, row) for rank, row in zip(ranks, rows, strict=True)])
        if self._in_a_row >= self._max_in_a_row:
            raise TrainingError(
                f"{self._in_a_row} steps in a row, the last of them step {step}, had a loss or a gradient that is not finite; "
                f"{self._path} names the samples. Lower optimizer.lr, use deepspeed.precision=float32, or raise "
                "train.max_skipped; the same command goes on from the last saved state"
            )

    def _write(self, step: int, cause: str, samples: list[dict[str, object]]) -> None:
        line = {"step": step, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "cause": cause, "samples": samples}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
        shown = ", ".join("{id} ({class}) at t={t}, loss {loss}, rank {rank}".format(**s) for s in samples[:MAX_SHOWN])
        more = f" and {len(samples) - MAX_SHOWN} more, see {self._path}" if len(samples) > MAX_SHOWN else ""
        log.warning("step %d left out, its %s is not finite: %s%s", step, cause, shown, more)

    def _described(self, rank: int, row: list[float]) -> dict[str, object]:
        index, t, label, loss, _ = row
        return {
            "rank": rank,
            "index": int(index),
            "id": self._dataset.shapes[int(index)].id,
            "class": self._dataset.classes[int(label)],
            "t": int(t),
            # JSON knows no NaN.
            "loss": loss if math.isfinite(loss) else str(loss),
        }


def _samples(micro_batches: Sequence[MicroBatch], outputs: Sequence[LossOutput]) -> Float64[Tensor, "n 5"]:
    """A row a sample of this rank's: place in the data set, timestep, class, its loss, the loss of its micro batch."""
    rows = []
    for micro, output in zip(micro_batches, outputs, strict=True):
        index, loss = (
            torch.tensor(micro.indices, device=output.t.device),
            output.loss.detach().expand_as(output.per_sample),
        )
        rows.append(torch.stack([c.double() for c in (index, output.t, output.label, output.per_sample, loss)], 1))
    return torch.cat(rows)


def _offending(samples: Float64[Tensor, "ranks n 5"]) -> tuple[list[int], list[list[float]], str]:
    """(ranks, rows, what was not finite): the samples whose own loss was not, else those of a micro batch whose loss was not.

    A gradient is of no one sample: where only that was not finite, all of them.
    """
    own, shared = (~samples[..., column].isfinite() for column in (3, 4))
    bad = own if own.any() else shared
    cause = "loss" if bad.any() else "gradient"
    chosen = bad if bad.any() else torch.ones_like(bad)
    return chosen.nonzero()[:, 0].tolist(), samples[chosen].tolist(), cause
