"""Whether a run fits the GPUs it is meant for, and what to change where it does not."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from shapediff.engine.config import TrainConfig
from shapediff.engine.costs import USABLE, UTILISATION, Costs, Memory, hours, memory, run_costs
from shapediff.engine.turns import allows_stage, check_stage
from shapediff.hardware import GIB, Accelerator
from shapediff.methods import Turn

log = logging.getLogger(__name__)

STAGES = (0, 1, 2, 3)


@dataclass(frozen=True)
class Plan:
    """A run on `num_gpus` alike; `autocast`: matrix products in 16 bits.

    Raises ValueError where the batch does not divide over the GPUs, or the model not the resolution, or the method does not train
    under the ZeRO stage.
    """

    config: TrainConfig
    resolution: int
    num_classes: int
    gpu: Accelerator
    num_gpus: int
    autocast: bool

    def __post_init__(self) -> None:
        self.config.train.split(self.num_gpus)
        if self.config.deepspeed.zero_stage != "auto":
            check_stage(self._turns, self.config.deepspeed.zero_stage)

    @property
    def micro_batch_size(self) -> int:
        """Samples that one GPU computes at once."""
        return self.config.train.split(self.num_gpus)[0]

    @cached_property
    def stages(self) -> tuple[int, ...]:
        """The ZeRO stages under which the method trains."""
        return tuple(stage for stage in STAGES if allows_stage(self._turns, stage))

    @cached_property
    def stage(self) -> int:
        """The ZeRO stage; where it is left open, the first from 1 on that fits, since every further one costs time.

        One GPU has nothing to share, and several that none fits share the most.
        """
        asked = self.config.deepspeed.zero_stage
        if asked != "auto":
            return asked
        stages = self.stages[1:] if self.num_gpus > 1 else self.stages[1:2]
        return next((stage for stage in stages if self.memory(stage=stage).total <= self.usable), stages[-1])

    @cached_property
    def costs(self) -> Costs:
        """What the networks cost as configured."""
        return self._costs(self.config.model.recompute_activations)

    @cached_property
    def costs_recomputing(self) -> Costs:
        """What they cost with model.recompute_activations=true."""
        return self.costs if self.costs.recompute else self._costs(True)

    @property
    def usable(self) -> int:
        """Bytes of a GPU that an estimate may fill."""
        return int(USABLE * self.gpu.memory)

    def memory(
        self, *, stage: int | None = None, micro_batch_size: int | None = None, recompute: bool = False
    ) -> Memory:
        """Memory of each GPU, as configured but for what is given; under another stage, with the offloading of `_sharing`."""
        stage = self.stage if stage is None else stage
        asked = self.config.deepspeed
        as_configured = asked.zero_stage in ("auto", stage)
        return memory(
            self.costs_recomputing if recompute else self.costs,
            stage=stage,
            num_gpus=self.num_gpus,
            micro_batch_size=micro_batch_size or self.micro_batch_size,
            offload_optimizer=asked.offload_optimizer,
            offload_parameters=asked.offload_parameters if as_configured else asked.offload_optimizer,
        )

    @property
    def peak_tflops(self) -> float | None:
        """Of one GPU in the precision of the run; None where it is not known."""
        return self.gpu.bf16_tflops if self.autocast else self.gpu.float32_tflops

    def hours(self, utilisation: float = UTILISATION) -> float | None:
        """Hours of training at that share of the peak; None where that is not known."""
        peak = self.peak_tflops
        return hours(self.costs, self.config, self.num_gpus * peak * utilisation) if peak else None

    @property
    def fits(self) -> bool:
        """Whether it can be expected to run."""
        return self.memory().total <= self.usable

    def remedies(self) -> list[str]:
        """Settings with which it would fit, the cheapest first; empty where none of them is enough."""
        return list(self._remedies()) or list(self._last_resorts())

    def _remedies(self) -> Iterator[str]:
        for size in self._smaller_micro_batches():
            if self.memory(micro_batch_size=size).total <= self.usable:
                yield f"train.micro_batch_size={size}"
                break
        if not self.costs.recompute and self.memory(recompute=True).total <= self.usable:
            yield "model.recompute_activations=true"
        for stage in self._further_stages():
            if self.memory(stage=stage).total <= self.usable:
                yield self._sharing(stage)
                break

    def _last_resorts(self) -> Iterator[str]:
        """Several settings together."""
        for stage in (self.stage, *self._further_stages()):
            for size in [self.micro_batch_size, *self._smaller_micro_batches()]:
                if self.memory(stage=stage, micro_batch_size=size, recompute=True).total <= self.usable:
                    settings = f"model.recompute_activations=true train.micro_batch_size={size}"
                    yield settings if stage == self.stage else f"{settings} {self._sharing(stage)}"
                    return

    def _further_stages(self) -> list[int]:
        return [stage for stage in self.stages if stage > self.stage]

    def _sharing(self, stage: int) -> str:
        """The file of conf/deepspeed for a further stage; what is offloaded stays so, and under stage 3 the weights too."""
        return f"deepspeed=zero{stage}_offload" if self.config.deepspeed.offload_optimizer else f"deepspeed=zero{stage}"

    def _smaller_micro_batches(self) -> list[int]:
        per_gpu = self.config.train.batch_size // self.num_gpus
        return [size for size in range(self.micro_batch_size - 1, 0, -1) if per_gpu % size == 0]

    def warning(self) -> str | None:
        """What to tell before memory runs out; None where it should not."""
        if self.fits:
            return None
        remedies = self.remedies()
        advice = (
            f"try {' or '.join(remedies)}" if remedies else "use a smaller model, a lower data.resolution or more GPUs"
        )
        needed, there = self.memory().total / GIB, self.gpu.memory / GIB
        return f"this run needs about {needed:.1f} GiB on each {self.gpu.name}, which has {there:.1f} GiB: {advice}"

    @cached_property
    def _turns(self) -> tuple[Turn, ...]:
        return self.config.method.build(resolution=self.resolution, num_classes=self.num_classes).turns(0)

    def _costs(self, recompute: bool) -> Costs:
        return run_costs(
            self.config,
            resolution=self.resolution,
            num_classes=self.num_classes,
            autocast=self.autocast,
            on_gpu=self.gpu.is_gpu,
            recompute=recompute,
        )


def foresee(plan: Plan) -> None:
    """Log what a run that is about to start should take of a GPU, as a warning where that is too much."""
    warning = plan.warning()
    if warning:
        log.warning("WARNING: %s", warning)
    else:
        log.info("about %.1f of %.1f GiB a GPU expected", plan.memory().total / GIB, plan.gpu.memory / GIB)
