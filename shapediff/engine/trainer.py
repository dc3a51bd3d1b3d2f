"""The training loop: batch, loss, backward, step, ema, report."""

from __future__ import annotations

import logging
import math
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import FrameType

import deepspeed
import numpy as np
import torch
from torch import Tensor

from shapediff.checkpoint import EXPORT_FOLDER, ExportConfig, write_export
from shapediff.data.dataset import ShapeDataset
from shapediff.data.sampler import DataOrder, rank_slice, sample_seeds
from shapediff.engine import distributed
from shapediff.engine.config import TrainConfig
from shapediff.engine.ema import Ema
from shapediff.engine.report import Reporter, duration, record_start
from shapediff.engine.state import Progress, load_newest_state, save_state
from shapediff.errors import ConfigError
from shapediff.grid.morton import morton_to_dense
from shapediff.methods import LossOutput
from shapediff.methods.base import Batch

log = logging.getLogger(__name__)

MAX_BAD_STEPS = 20
"""Steps with a loss that is not finite, in a row, after which a run gives up."""

STOPPED = 75
"""Exit status of a run that was told to stop and can be resumed (EX_TEMPFAIL: try again)."""

NUM_TIMESTEP_BUCKETS = 4
SHEET_COLUMNS, SHEET_ROWS = 4, 4


@dataclass(frozen=True)
class MicroBatch:
    """What one rank computes at once: the samples, and one seed for each."""

    batch: Batch
    seeds: list[int]


def train(config: TrainConfig) -> int:
    """Train as `config` says, resuming the run in `run_dir` if there is one; returns the exit status.

    0: trained to the end and exported. STOPPED: told to stop (SIGTERM, SIGINT), state saved; the same command goes on.
    Raises ConfigError, DataError or CheckpointError for what the user can mend.
    """
    device = distributed.start()
    try:
        return Trainer(config, device).fit()
    finally:
        distributed.stop()


class Trainer:
    """A run in progress on this rank."""

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        self.config = config
        self.device = device
        self.dataset = ShapeDataset(config.data.path, split="train", resolution=config.data.resolution)
        labels = self.dataset.labels if config.data.balance else None
        self.order = DataOrder(len(self.dataset), seed=config.train.seed, balance_labels=labels)
        self.export_config = ExportConfig(
            resolution=self.dataset.resolution,
            field=self.dataset.field,
            classes=tuple(self.dataset.classes),
            method=config.method,
            model=config.model,
            sampling=config.sampling,
        )
        try:
            self.micro_batch_size, self.accumulation = config.train.split(distributed.world_size())
            self.method = self.export_config.build_method()
            self.engines = self._start_engines()
        except ValueError as error:
            raise ConfigError(str(error)) from error
        self.ema = Ema({name: engine.module for name, engine in self.engines.items()}, decay=config.train.ema_decay)
        self.progress = self._resume()
        self.bad_steps = 0

    def fit(self) -> int:
        """Train to the end, or until told to stop; leaves a state either way, and an export at the end."""
        if distributed.is_main():
            record_start(self.config.run_path, self.config.to_dict())
        reporter = self._reporter() if distributed.is_main() else None
        with stop_signals() as stop, Prefetch(self) as batches:
            while not self._is_finished():
                started = time.monotonic()
                outputs = self._optimizer_step(batches.take(self.progress.step))
                seconds = time.monotonic() - started
                loss, told_to_stop = self._agree(outputs, stop.is_set)
                self._advance(seconds)
                self._report(reporter, outputs, loss, seconds)
                if told_to_stop:
                    return self._stop(reporter)
                self._save_and_draw(reporter)
        self._finish(reporter)
        return 0

    # One step.

    def _optimizer_step(self, micro_batches: list[MicroBatch]) -> list[LossOutput]:
        self._set_lr()
        outputs = []
        for micro in micro_batches:
            batch: Batch = {
                "voxels": micro.batch["voxels"].to(self.device),
                "label": micro.batch["label"].to(self.device),
            }
            output = self.method.loss(self.engines, batch, micro.seeds)
            for engine in self.engines.values():
                engine.backward(output.loss)
                engine.step()
            outputs.append(output)
        self.ema.update()
        return outputs

    def _set_lr(self) -> None:
        lr = self.config.optimizer.lr_at(self.progress.step, self._share_done())
        for engine in self.engines.values():
            for group in engine.optimizer.param_groups:
                group["lr"] = lr

    def _agree(self, outputs: list[LossOutput], told_to_stop: bool) -> tuple[float, bool]:
        """The mean loss of all ranks, and whether any rank was told to stop: one small message a step."""
        mine = torch.stack([output.loss.detach().float() for output in outputs]).mean()
        both = distributed.mean_over_ranks(torch.stack([mine, mine.new_tensor(float(told_to_stop))]))
        loss, stopped = both.tolist()
        self.bad_steps = 0 if math.isfinite(loss) else self.bad_steps + 1
        if self.bad_steps:
            log.warning("step %d: the loss is %s", self.progress.step, loss)
        if self.bad_steps >= MAX_BAD_STEPS:
            raise ConfigError(
                f"the loss was not finite for {self.bad_steps} steps in a row; lower optimizer.lr or use "
                "deepspeed.precision=float32, and resume: the states before are kept"
            )
        return loss, stopped > 0

    def _advance(self, seconds: float) -> None:
        step = self.progress.step + 1
        self.progress = replace(
            self.progress,
            step=step,
            samples_seen=step * self.config.train.batch_size,
            seconds=self._main_clock(self.progress.seconds + seconds),
        )

    def _main_clock(self, seconds: float) -> float:
        """Rank 0's clock, so that all ranks end a run of `max_minutes` at the same step."""
        if self.config.train.max_minutes is None or distributed.world_size() == 1:
            return seconds
        clock = torch.tensor(seconds if distributed.is_main() else 0.0, device=self.device, dtype=torch.float64)
        return float(distributed.mean_over_ranks(clock)) * distributed.world_size()

    def _share_done(self) -> float:
        loop = self.config.train
        by_time = self.progress.seconds / (60 * loop.max_minutes) if loop.max_minutes else 0.0
        return min(1.0, max(self.progress.step / loop.steps, by_time))

    def _is_finished(self) -> bool:
        return self._share_done() >= 1

    # Data.

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """This rank's micro batches of optimizer step number `step`: a pure function of the seed, the step and the rank."""
        loop = self.config.train
        mine = rank_slice(
            step * loop.batch_size, loop.batch_size, rank=distributed.rank(), world_size=distributed.world_size()
        )
        starts = range(mine.start, mine.stop, self.micro_batch_size)
        return [self._micro_batch(np.arange(start, start + self.micro_batch_size)) for start in starts]

    def _micro_batch(self, numbers: np.ndarray) -> MicroBatch:
        seeds = sample_seeds(self.config.train.seed, numbers)
        indices = self.order.indices(int(numbers[0]), len(numbers))
        batch = self.dataset.batch(indices, mirror_seeds=seeds if self.config.data.mirror else None)
        return MicroBatch({"voxels": batch["voxels"], "label": batch["label"]}, seeds.tolist())

    # Reports, states, pictures, export.

    def _report(self, reporter: Reporter | None, outputs: list[LossOutput], loss: float, seconds: float) -> None:
        step, logs = self.progress.step, self.progress.step % self.config.train.log_every == 0
        buckets = self._error_by_timestep(outputs) if logs else {}
        if reporter is None:
            return
        speed = self.config.train.batch_size / seconds
        share = max(self._share_done(), 1e-9)
        reporter.step(
            step, loss=loss, samples_per_second=speed, seconds_left=self.progress.seconds * (1 - share) / share
        )
        if logs:
            engine = next(iter(self.engines.values()))
            grad_norm = engine.get_global_grad_norm()
            reporter.metrics(
                step,
                {
                    "loss": loss,
                    "lr": engine.optimizer.param_groups[0]["lr"],
                    "grad_norm": float(grad_norm) if grad_norm is not None else float("nan"),
                    "samples_seen": self.progress.samples_seen,
                    "samples_per_second": speed,
                    "seconds": self.progress.seconds,
                    **buckets,
                },
            )

    def _error_by_timestep(self, outputs: list[LossOutput]) -> dict[str, float]:
        """The mean unweighted error over each quarter of the timesteps that this step happened to draw, all ranks."""
        t = distributed.gather_over_ranks(torch.cat([output.t for output in outputs]))
        error = distributed.gather_over_ranks(torch.cat([output.error for output in outputs]))
        bucket = (t * NUM_TIMESTEP_BUCKETS // self.method.num_timesteps).cpu()
        return {
            f"error_t{i}": float(error.cpu()[bucket == i].mean())
            for i in range(NUM_TIMESTEP_BUCKETS)
            if bool((bucket == i).any())
        }

    def _save_and_draw(self, reporter: Reporter | None) -> None:
        step, loop = self.progress.step, self.config.train
        if loop.checkpoint_every and step % loop.checkpoint_every == 0:
            self._save()
        if loop.sample_every and step % loop.sample_every == 0:
            self._draw(reporter, self.ema.gathered())

    def _save(self) -> None:
        path = save_state(
            self.config.run_path / "state",
            self.progress,
            self.engines,
            self.ema,
            keep=self.config.train.keep_checkpoints,
        )
        if distributed.is_main():
            log.info("state saved: %s", path)

    def _stop(self, reporter: Reporter | None) -> int:
        self._save()
        if reporter is not None:
            reporter.close()
            log.info("stopped at step %d; the same command goes on from there", self.progress.step)
        return STOPPED

    def _finish(self, reporter: Reporter | None) -> None:
        self._save()
        weights = self.ema.gathered()
        self._draw(reporter, weights)
        if reporter is None:
            return
        reporter.close()
        export = replace(self.export_config, training=self._facts())
        path = self.config.run_path / EXPORT_FOLDER
        write_export(path, export, weights, dtype=getattr(torch, self.config.train.export_dtype))
        log.info("exported to %s after %s", path, duration(self.progress.seconds))

    def _draw(self, reporter: Reporter | None, weights: dict[str, dict[str, Tensor]]) -> None:
        """Sample with the averaged weights, on rank 0, in networks of its own: the trained ones are never touched."""
        if reporter is None or not self.config.train.sample_every:
            return
        networks = self.method.build_networks(self.config.model)
        for name, network in networks.items():
            network.load_state_dict(weights[name])
            network.to(self.device).eval()
        num = SHEET_COLUMNS * SHEET_ROWS
        classes = self.export_config.classes
        label = torch.arange(num, device=self.device) * len(classes) // num if len(classes) < num else torch.arange(num)
        label = label.to(self.device)
        autocast = torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.config.deepspeed.uses_bf16(self.device)
        )
        with torch.inference_mode(), autocast:
            signal = self.method.sample(networks, label, list(range(num)), config=self.config.sampling)
        captions = [classes[i] for i in label.tolist()]
        dense = morton_to_dense(signal.float().cpu()).numpy()
        reporter.samples(self.progress.step, dense, captions, columns=SHEET_COLUMNS)

    def _facts(self) -> dict[str, object]:
        return {
            "data": self.config.data.path,
            "shapes": len(self.dataset),
            "steps": self.progress.step,
            "samples_seen": self.progress.samples_seen,
            "time": duration(self.progress.seconds),
            "seed": self.config.train.seed,
        }

    # Starting.

    def _start_engines(self) -> dict[str, deepspeed.DeepSpeedEngine]:
        torch.manual_seed(self.config.train.seed)
        settings = self.config.deepspeed.to_deepspeed(
            device=self.device,
            micro_batch_size=self.micro_batch_size,
            accumulation_steps=self.accumulation,
            grad_clip=self.config.optimizer.grad_clip,
        )
        engines = {}
        for name, network in self.method.build_networks(self.config.model).items():
            optimizer = self.config.optimizer.build(network)
            engines[name], *_ = deepspeed.initialize(model=network, optimizer=optimizer, config=settings)
        return engines

    def _resume(self) -> Progress:
        stage = self.config.deepspeed.zero_stage
        progress = load_newest_state(self.config.run_path / "state", self.engines, self.ema, zero_stage=stage)
        if progress is None:
            return Progress(world_size=distributed.world_size(), zero_stage=stage)
        if progress.samples_seen != progress.step * self.config.train.batch_size:
            raise ConfigError(
                f"the run in {self.config.run_dir} was started with batch_size="
                f"{progress.samples_seen // progress.step}; resume with that, or use another run_dir"
            )
        if distributed.is_main():
            log.info("resuming %s at step %d", self.config.run_dir, progress.step)
        return progress

    def _reporter(self) -> Reporter:
        parameters = sum(
            math.prod(getattr(p, "ds_shape", p.shape)) for e in self.engines.values() for p in e.parameters()
        )
        log.info(
            "%.1fM parameters, %d shapes of %d classes at %d^3, %d x %d x %d samples a step on %s, %s, ZeRO stage %d",
            parameters / 1e6,
            len(self.dataset),
            len(self.dataset.classes),
            self.dataset.resolution,
            distributed.world_size(),
            self.accumulation,
            self.micro_batch_size,
            self.device,
            "bf16" if self.config.deepspeed.uses_bf16(self.device) else "float32",
            self.config.deepspeed.zero_stage,
        )
        return Reporter(self.config.run_path, steps=self.config.train.steps, first_step=self.progress.step)


class Prefetch:
    """The next step's data, prepared by a thread while this step computes."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._next = self._pool.submit(trainer.micro_batches, trainer.progress.step)

    def take(self, step: int) -> list[MicroBatch]:
        """The micro batches of `step`; begins with those of step + 1."""
        ready = self._next.result()
        self._next = self._pool.submit(self._trainer.micro_batches, step + 1)
        return ready

    def __enter__(self) -> Prefetch:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)


@dataclass
class StopFlag:
    """Whether this process was told to stop."""

    is_set: bool = False


@contextmanager
def stop_signals() -> Iterator[StopFlag]:
    """SIGTERM and SIGINT raise a flag, looked at after each step, in place of killing the process."""
    flag = StopFlag()

    def set_flag(signum: int, frame: FrameType | None) -> None:
        flag.is_set = True

    before = {number: signal.signal(number, set_flag) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
