"""The training loop: batch, loss, backward, step, ema, report."""

from __future__ import annotations

import itertools
import logging
import math
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import deepspeed
import torch
from torch import Tensor, nn

from shapediff.checkpoint import EXPORT_FOLDER, ExportConfig, write_export
from shapediff.data.dataset import ShapeDataset
from shapediff.engine import distributed
from shapediff.engine.batches import Batches, MicroBatch
from shapediff.engine.checkpoints import Checkpoints
from shapediff.engine.config import TrainConfig
from shapediff.engine.curves import ErrorCurves
from shapediff.engine.ema import Ema
from shapediff.engine.exporting import duration, exported, record_model, recorded_model, taken_weights, trained
from shapediff.engine.finetuning import check_same_run, check_started_from, initial_weights
from shapediff.engine.latents import CachedLatents, cached_latents
from shapediff.engine.loss_scaling import scale_losses
from shapediff.engine.means import MetricMeans
from shapediff.engine.planning import Plan, foresee
from shapediff.engine.report import Metric, Reporter, record_start
from shapediff.engine.shares import Shares
from shapediff.engine.skipping import SkippedSteps, carry_to_gradient, clip_and_check
from shapediff.engine.state import Progress
from shapediff.engine.stopping import STOPPED, stop_signals
from shapediff.engine.taken import with_taken
from shapediff.engine.turns import check_compiles, check_stage, networks_in, trained_in
from shapediff.engine.wandb_run import WandbRun, require_wandb
from shapediff.engine.watch import watched_ranks
from shapediff.errors import ConfigError
from shapediff.grid.morton import morton_to_dense
from shapediff.hardware import GIB, accelerator_of, memory_in_use
from shapediff.methods import LossOutput, Turn

log = logging.getLogger(__name__)

SHEET_COLUMNS, SHEET_SHAPES = 4, 16


def train(config: TrainConfig) -> int:
    """Train as `config` says, resuming the run in `run_dir` if there is one; returns the exit status.

    0: trained to the end and exported. STOPPED: told to stop (SIGTERM, SIGINT), state saved; the same command goes on.
    Raises ConfigError, DataError, CheckpointError or TrainingError for what the user can mend.
    """
    device = distributed.start()
    try:
        with watched_ranks(device):
            return Trainer(config, device).fit()
    finally:
        distributed.stop()


class Trainer:
    """A run in progress on this rank."""

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        self.device = device
        self.dataset = ShapeDataset(config.data.path, split="train", resolution=config.data.resolution)
        self.config = config = with_taken(config, self.dataset)
        self.export_config = ExportConfig(
            resolution=self.dataset.resolution,
            field=self.dataset.field,
            classes=tuple(self.dataset.classes),
            method=config.method,
            model=config.model,
            sampling=config.sampling,
            truncation_voxels=self.dataset.truncation_voxels,
            training=self._facts(),
        )
        try:
            self.micro_batch_size, self.accumulation = config.train.split(distributed.world_size())
            self.method = self.export_config.build_method()
            self.method.check_sampling(config.sampling)
            if config.data.cache_latents and not self.method.encodes:
                raise ConfigError("data.cache_latents is for methods that train on latents; leave it out")
            require_wandb(config.train.wandb)
            self._foresee()
            torch.manual_seed(config.train.seed)
            networks = {**self.method.build_networks(config.model), **self.method.build_training_networks()}
            self.frozen = self._start_frozen({name: networks.pop(name) for name in self.method.frozen})
            self.engines = self._start_engines(networks)
            torch.manual_seed(config.train.seed * 1_000_003 + distributed.rank())  # dropout of each rank's own
        except ValueError as error:
            raise ConfigError(str(error)) from error
        self.shares = Shares(self.engines)
        self.ema = Ema(self.shares, decay=config.train.ema_decay)
        self.curves = ErrorCurves(self.method.num_timesteps, self.export_config.classes)
        self.means = MetricMeans()
        self.checkpoints = Checkpoints(config.run_path / "state", config.train, self.shares, self.ema)
        self.skipped = SkippedSteps(config.run_path, self.dataset, max_in_a_row=config.train.max_skipped)
        self.progress = self._resume()
        self.source = self._cached() if config.data.cache_latents else self.dataset

    def fit(self) -> int:
        """Train to the end, or until told to stop; leaves a state either way, and an export at the end."""
        reporter = self._reporter() if distributed.is_main() else None
        with stop_signals() as stop:
            with self._batches() as batches:
                while self._share_done() < 1:
                    started = time.monotonic()
                    outputs, taken = self._step(batches.take())
                    loss, told_to_stop, clock = self._agree(outputs, stop.is_set, time.monotonic() - started)
                    self._advance(clock, taken)
                    self._report(reporter, loss, taken, batches.seconds_waited)
                    if told_to_stop:
                        return self._stop(reporter)
                    self._save_and_draw(reporter)
            self._finish(reporter)  # told to stop here, it comes to its end
        return 0

    def _step(self, micro_batches: list[MicroBatch]) -> tuple[list[LossOutput], bool]:
        """One step, by gradient accumulation over the micro batches: what its first turn gave, and whether all turns were taken.

        Where the loss of a turn or its gradient is not finite on any rank, the weights and moments that it trains and all
        averages stay as they were on all, and the step ends there; what turns before it did stays done.
        """
        self._set_lr()
        done = []
        for turn in self.method.turns(self.progress.step - self.progress.skipped):
            outputs, taken = self._take(turn, micro_batches)
            done.append(outputs)
            if not taken:
                break
        else:
            self.skipped.taken()
            self.ema.update()
            for output in itertools.chain(*done):
                self.curves.add(output)
                self.means.add(output)
        return done[0], taken

    def _take(self, turn: Turn, micro_batches: list[MicroBatch]) -> tuple[list[LossOutput], bool]:
        """One update of the networks that `turn` trains, and whether it was made."""
        trained = trained_in(turn, self.engines)
        networks = networks_in(turn, self.engines, self._autocast_dtype())
        outputs = []
        for micro in micro_batches:
            here = micro.to(self.device)
            with self._autocast_of_frozen():
                output = turn.loss({**networks, **self.frozen}, here.batch, here.seeds)
            for engine in trained.values():
                engine.backward(carry_to_gradient(output.loss))
                engine.step()
            outputs.append(output)
        taken = all(engine.was_step_applied() for engine in trained.values())
        if not taken:
            scaled = any(getattr(engine.optimizer, "loss_scale", 1.0) > 1.0 for engine in trained.values())
            self.skipped.left_out(self.progress.step + 1, micro_batches, outputs, loss_is_scaled=scaled)
        return outputs, taken

    def _set_lr(self) -> None:
        taken = self.progress.step - self.progress.skipped
        lr = self.config.optimizer.lr_at(taken, self._share_done(taken))
        for engine in self.engines.values():
            for group in engine.optimizer.param_groups:
                group["lr"] = lr

    def _agree(self, outputs: list[LossOutput], told_to_stop: bool, seconds: float) -> tuple[float, bool, float]:
        """What every rank must see alike, by one small message: the mean loss, whether any rank was told to stop, the time."""
        mine = [float(torch.stack([output.loss.detach() for output in outputs]).mean()), float(told_to_stop), seconds]
        together = distributed.mean_over_ranks(torch.tensor(mine, device=self.device, dtype=torch.float64))
        loss, stopped, seconds = together.tolist()
        return loss, stopped > 0, seconds

    def _advance(self, seconds: float, taken: bool) -> None:
        now = self.progress
        self.progress = replace(
            now,
            step=now.step + 1,
            skipped=now.skipped + (not taken),
            samples_seen=(now.step + 1) * self.config.train.batch_size,
            seconds=now.seconds + seconds,
        )

    def _share_done(self, steps: int | None = None) -> float:
        """How much of the run is done, 0 to 1, by steps (`steps` of them, or all there were) or by time, whichever is further."""
        loop = self.config.train
        by_time = self.progress.seconds / (60 * loop.max_minutes) if loop.max_minutes else 0.0
        return min(1.0, max((self.progress.step if steps is None else steps) / loop.steps, by_time))

    def _report(self, reporter: Reporter | None, loss: float, taken: bool, seconds_waited: float) -> None:
        step, logs = self.progress.step, taken and self.progress.step % self.config.train.log_every == 0
        errors = {**self.curves.take(), **self.means.take()} if logs else {}
        if reporter is None:
            return
        share, memory = self._share_done(), memory_in_use(self.device)
        turn = self.method.turns(step - self.progress.skipped - taken)[0]  # of which the loss is, too
        engine = next(iter(trained_in(turn, self.engines).values()))
        grad_norm = float(engine.get_global_grad_norm() or 0.0)
        left = self.progress.seconds * (1 - share) / share
        speed = reporter.step(step, loss=loss, grad_norm=grad_norm, memory=memory, seconds_left=left)
        if logs:
            metrics: dict[str, Metric] = {
                "loss": loss,
                "lr": engine.optimizer.param_groups[0]["lr"],
                "grad_norm": grad_norm,
                "samples_seen": self.progress.samples_seen,
                "samples_per_second": speed,
                "data_wait": reporter.share_of_time(seconds_waited),
                "memory_gib": memory / GIB,
                "seconds": self.progress.seconds,
            }
            reporter.metrics(step, {**metrics, **errors})

    def _save_and_draw(self, reporter: Reporter | None) -> None:
        step, loop = self.progress.step, self.config.train
        self.checkpoints.save_if_due(self.progress)
        if loop.sample_every and step % loop.sample_every == 0:
            self._draw(reporter, self._weights())

    def _stop(self, reporter: Reporter | None) -> int:
        self.checkpoints.save(self.progress)
        if reporter is not None:
            reporter.close()
            log.info("stopped at step %d, state saved; the same command goes on from there", self.progress.step)
        return STOPPED

    def _finish(self, reporter: Reporter | None) -> None:
        self.checkpoints.save(self.progress)
        weights = self._weights()
        if reporter is None:
            return
        path = self.config.run_path / EXPORT_FOLDER
        now = self.progress
        export = trained(self.export_config, step=now.step, samples_seen=now.samples_seen, seconds=now.seconds)
        write_export(path, export, weights, dtype=getattr(torch, self.config.train.export_dtype))
        if self.config.train.sample_every:
            self._draw(reporter, weights)
        reporter.close()
        log.info("exported to %s after %s of training", path, duration(self.progress.seconds))

    @torch.inference_mode()
    def _draw(self, reporter: Reporter | None, weights: dict[str, dict[str, Tensor]]) -> None:
        """Sample with the averaged weights, on rank 0, in networks of its own: the trained ones are never touched."""
        if reporter is None:
            return
        with torch.random.fork_rng(devices=[]):  # training must not depend on whether anything is drawn
            networks = self.method.build_networks(self.config.model)
        for name, network in networks.items():
            network.load_state_dict(weights[name])
            network.to(self.device).eval()
        classes = self.export_config.classes
        label = torch.arange(SHEET_SHAPES, device=self.device) * min(len(classes), SHEET_SHAPES) // SHEET_SHAPES
        dtype = self._autocast_dtype()
        with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
            signal = self.method.sample(networks, label, range(SHEET_SHAPES), config=self.config.sampling)
        dense = morton_to_dense(signal.float().cpu()).numpy()
        reporter.samples(self.progress.step, dense, [classes[i] for i in label.tolist()], columns=SHEET_COLUMNS)

    def _facts(self) -> dict[str, object]:
        """What people may want to know of the run, whatever its progress."""
        return {
            "data": self.config.data.path,
            "shapes": len(self.dataset),
            "seed": self.config.train.seed,
            **({"started from": self.config.train.init_from} if self.config.train.init_from else {}),
        }

    def _autocast_dtype(self) -> torch.dtype | None:
        return self.config.deepspeed.autocast_dtype(self.device)

    def _foresee(self) -> None:
        """What the run should take of a GPU, told before it is taken, and the ZeRO stage where that is left open."""
        stage = 1
        if self.device.type == "cuda" and distributed.is_main():
            plan = Plan(
                self.config,
                resolution=self.dataset.resolution,
                num_classes=len(self.dataset.classes),
                gpu=accelerator_of(self.device),
                num_gpus=distributed.world_size(),
                autocast=self._autocast_dtype() is not None,
            )
            stage = plan.stage
            foresee(plan)
        if self.config.deepspeed.zero_stage == "auto":
            agreed = distributed.gather_text(str(stage))[0]  # the GPUs may differ, the stage must not
            self.config = replace(self.config, deepspeed=self.config.deepspeed.with_stage(int(agreed)))

    def _weights(self) -> dict[str, dict[str, Tensor]]:
        """What is exported: the averages of what is trained, gathered from all ranks, and the rest as it is."""
        weights = {**self.ema.gathered(), **{name: network.state_dict() for name, network in self.frozen.items()}}
        return exported(self.method, weights)

    def _start_frozen(self, networks: dict[str, nn.Module]) -> dict[str, nn.Module]:
        for name, weights in taken_weights(self.config.run_path, self.method).items():
            networks[name].load_state_dict(weights)
        return {name: network.to(self.device).eval().requires_grad_(False) for name, network in networks.items()}

    def _cached(self) -> CachedLatents:
        def encode(voxels: Tensor) -> Tensor:
            with self._autocast_of_frozen():
                return self.method.encode(self.frozen, voxels)

        data = self.config.data
        return cached_latents(self.dataset, self.frozen, encode, mirror=data.mirror, turn=data.turn, device=self.device)

    def _autocast_of_frozen(self) -> AbstractContextManager[object]:
        """In the precision of the engines, which see to theirs themselves."""
        dtype = self._autocast_dtype()
        return torch.autocast(self.device.type, dtype, enabled=dtype is not None) if self.frozen else nullcontext()

    def _start_engines(self, networks: dict[str, nn.Module]) -> dict[str, deepspeed.DeepSpeedEngine]:
        grad_clip, plain = self.config.optimizer.grad_clip, self.config.deepspeed.zero_stage == 0
        settings = self.config.deepspeed.to_deepspeed(
            device=self.device,
            micro_batch_size=self.micro_batch_size,
            accumulation_steps=self.accumulation,
            grad_clip=0.0 if plain else grad_clip,
        )
        check_stage(self.method.turns(0), int(self.config.deepspeed.zero_stage))
        if self.config.train.compile:
            check_compiles(self.method.turns(0), int(self.config.deepspeed.zero_stage))
        engines = {}
        for name, weights in initial_weights(self.config, self.export_config).items():
            networks[name].load_state_dict(weights)
        for name, network in networks.items():
            optimizer = self.config.optimizer.build(network)
            if self.config.train.compile:
                network.compile()  # in place: names of parameters stay
            if plain:
                clip_and_check(optimizer, grad_clip=grad_clip)
            engines[name], *_ = deepspeed.initialize(model=network, optimizer=optimizer, config=settings)
            if self._autocast_dtype() == torch.float16:
                scale_losses(engines[name])
        return engines

    def _resume(self) -> Progress:
        batch_size = self.config.train.batch_size
        progress = self.checkpoints.resume()
        if not progress.step:
            check_started_from(self.config)
            return progress
        if (recorded := recorded_model(self.config.run_path)) is not None:
            check_same_run(self.config.run_dir, recorded, self.export_config)
        if progress.samples_seen != progress.step * batch_size:
            raise ConfigError(
                f"the run in {self.config.run_dir} was started with batch_size={progress.samples_seen // progress.step}, "
                f"not {batch_size}; resume with that, or use another run_dir"
            )
        if distributed.is_main():
            log.info("resuming %s at step %d", self.config.run_dir, progress.step)
        return progress

    def _batches(self) -> Batches:
        return Batches(
            self.source,
            self.config,
            first_step=self.progress.step,
            micro_batch_size=self.micro_batch_size,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
        )

    def _reporter(self) -> Reporter:
        sizes = [
            getattr(p, "ds_shape", p.shape) for engine in self.engines.values() for p in engine.module.parameters()
        ]
        log.info(
            "%.1fM parameters, %d shapes of %d classes at %d^3; %d x %d x %d samples a step on %s in %s, ZeRO stage %d",
            sum(map(math.prod, sizes)) / 1e6,
            len(self.dataset),
            len(self.dataset.classes),
            self.dataset.resolution,
            distributed.world_size(),
            self.accumulation,
            self.micro_batch_size,
            self.device,
            str(self._autocast_dtype() or torch.float32).removeprefix("torch."),
            self.config.deepspeed.zero_stage,
        )
        run, loop, settings = self.config.run_path, self.config.train, self.config.to_dict()
        record_model(run, self.export_config)
        record_start(run, settings, device=self.device, world_size=distributed.world_size())
        wandb = WandbRun(loop.wandb, run, settings) if loop.wandb else None
        return Reporter(run, loop, first_step=self.progress.step, wandb=wandb)
