"""One rank of a test: steps spoilt on purpose under every ZeRO stage, against plain torch that never had them.

RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT say which rank; the data set and an empty folder are the arguments. Ends with
status 0 where everything held.
"""

from __future__ import annotations

import json
import logging
import math
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from shapediff.data.dataset import ShapeDataset
from shapediff.data.sampler import DataOrder, sample_seeds
from shapediff.engine import distributed
from shapediff.engine.config import DataConfig, LoopConfig, TrainConfig
from shapediff.engine.distributed import DeepSpeedConfig
from shapediff.engine.optim import OptimizerConfig
from shapediff.engine.trainer import Trainer
from shapediff.errors import TrainingError
from shapediff.methods import LossOutput
from shapediff.models import UNet3DConfig

STEPS, BATCH = 9, 4
SPOILT = {3: "the loss of a sample", 5: "the gradient", 6: "the loss alone"}
"""By number of the step, from 1; each in one sample of the last rank's first micro batch."""


def config(data: str, run: Path, *, zero_stage: int, micro_batch_size: int, offload: bool = False) -> TrainConfig:
    return TrainConfig(
        run_dir=str(run),
        data=DataConfig(path=data, resolution=8, mirror=False),
        model=UNet3DConfig(width=8, width_multipliers=(1,), num_res_blocks=1, attention_levels=(), num_heads=1),
        optimizer=OptimizerConfig(lr=1e-2, warmup_steps=4, decay_fraction=0.9),
        deepspeed=DeepSpeedConfig(zero_stage=zero_stage, precision="float32", offload_optimizer=offload),
        train=LoopConfig(
            steps=STEPS,
            batch_size=BATCH,
            micro_batch_size=micro_batch_size,
            ema_decay=0.5,
            log_every=1,
            sample_every=0,
            checkpoint_every=4,
            max_skipped=3,
        ),
    )


def spoil(output: LossOutput, what: str) -> LossOutput:
    if what == "the loss of a sample":
        per_sample = output.per_sample.clone()
        per_sample[-1] = math.nan
        return replace(output, loss=output.loss * math.nan, per_sample=per_sample)
    if what == "the gradient":  # the root of 0 is finite, its slope is not
        return replace(output, loss=output.loss + (output.loss - output.loss.detach()).sqrt())
    return replace(output, loss=output.loss + math.inf)  # which leaves the gradient as it was


class Crash(Exception):
    """As good as a kill."""


def spoilt_trainer(config: TrainConfig, *, every_step: bool = False, crash_at: int | None = None) -> Trainer:
    trainer = Trainer(config, torch.device("cpu"))
    plain_loss, calls = trainer.method.loss, [0]

    def loss(*arguments: Any) -> LossOutput:
        output, (step, micro) = plain_loss(*arguments), divmod(calls[0], trainer.accumulation)
        calls[0] += 1
        if first + step == crash_at:
            raise Crash
        what = "the loss of a sample" if every_step else SPOILT.get(first + step)
        here = micro == 0 and distributed.rank() == distributed.world_size() - 1
        return spoil(output, what) if what and here else output

    first = trainer.progress.step + 1
    trainer.method.loss = loss  # type: ignore[method-assign]
    return trainer


def reference(config: TrainConfig) -> tuple[dict[str, Tensor], list[float], dict[int, tuple[str, str, int]]]:
    """Plain torch on whole batches, SPOILT left out: the averaged weights, the losses, and by spoilt step the sample."""
    dataset = ShapeDataset(config.data.path, split="train", resolution=8)
    method = config.method.build(resolution=8, num_classes=len(dataset.classes))
    torch.manual_seed(config.train.seed)
    networks = method.build_networks(config.model)
    network = networks["denoiser"]
    optimizer = config.optimizer.build(network)
    average = {key: p.detach().clone() for key, p in network.named_parameters()}
    order = DataOrder(len(dataset), seed=config.train.seed, balance_labels=dataset.labels)
    taken, losses, samples = 0, [], {}
    for step in range(1, STEPS + 1):
        numbers = np.arange(BATCH) + (step - 1) * BATCH
        seeds, indices = sample_seeds(config.train.seed, numbers), order.indices(int(numbers[0]), BATCH)
        output = method.loss(networks, dataset.batch(indices), seeds.tolist())  # type: ignore[arg-type]
        if step in SPOILT:
            # The last sample of the last rank's first micro batch.
            per_rank = BATCH // distributed.world_size()
            place = BATCH - per_rank + (config.train.micro_batch_size or per_rank) - 1
            shape = dataset.shapes[indices[place]]
            samples[step] = (shape.id, shape.class_name, int(output.t[place]))
            continue
        for group in optimizer.param_groups:
            group["lr"] = config.optimizer.lr_at(taken, taken / STEPS)
        optimizer.zero_grad()
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), config.optimizer.grad_clip)
        optimizer.step()
        decay = min(config.train.ema_decay, (1 + taken) / (10 + taken))
        for key, p in network.named_parameters():
            average[key].lerp_(p.detach(), 1 - decay)
        taken += 1
        losses.append(output.loss.item())
    return average, losses, samples


def held_out_errors(config: TrainConfig, weights: dict[str, Tensor]) -> Tensor:
    """What a network with these weights gets wrong, by sample."""
    dataset = ShapeDataset(config.data.path, split="train", resolution=8)
    method = config.method.build(resolution=8, num_classes=len(dataset.classes))
    networks = method.build_networks(config.model)
    networks["denoiser"].load_state_dict(weights)
    with torch.no_grad():
        return method.loss(networks, dataset.batch(np.arange(16)), range(16)).per_sample  # type: ignore[arg-type]


def check(config: TrainConfig) -> None:
    average, losses, samples = reference(config)
    with suppress(Crash):
        spoilt_trainer(config, crash_at=5).fit()
    trainer = spoilt_trainer(config)  # resumes after step 4
    assert (trainer.progress.step, trainer.progress.skipped) == (4, 1)
    assert trainer.fit() == 0
    assert (trainer.progress.step, trainer.progress.skipped) == (STEPS, len(SPOILT))
    # Not weight by weight: biases before a norm have no gradient but rounding, which Adam turns into steps of lr.
    errors = [held_out_errors(config, weights) for weights in (trainer.ema.gathered()["denoiser"], average)]
    torch.testing.assert_close(*errors, rtol=1e-4, atol=1e-5)
    if not distributed.is_main():
        return
    run = config.run_path
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == [step for step in range(1, STEPS + 1) if step not in SPOILT]
    np.testing.assert_allclose([line["loss"] for line in metrics], losses, rtol=1e-4)
    assert all(0 < line["grad_norm"] < 100 for line in metrics)
    lines = {line["step"]: line for line in map(json.loads, (run / "skipped.jsonl").read_text().splitlines())}
    assert [lines[step]["cause"] for step in SPOILT] == ["loss", "gradient", "loss"]
    (sample,) = lines[3]["samples"]
    assert (sample["id"], sample["class"], sample["t"]) == samples[3]
    assert sample["rank"] == distributed.world_size() - 1 and sample["loss"] == "nan"
    assert len(lines[5]["samples"]) == BATCH  # a gradient is of no one sample
    micro = min(config.train.micro_batch_size or BATCH, BATCH // distributed.world_size())
    assert len(lines[6]["samples"]) == micro and samples[6][0] in {s["id"] for s in lines[6]["samples"]}


def main() -> None:
    logging.basicConfig(level=logging.ERROR)
    data, folder = sys.argv[1], Path(sys.argv[2])
    distributed.start()
    for stage in range(4):
        check(config(data, folder / f"zero{stage}", zero_stage=stage, micro_batch_size=1))
    for stage in (1, 2, 3):
        check(config(data, folder / f"offload{stage}", zero_stage=stage, micro_batch_size=2, offload=True))
    hopeless = config(data, folder / "hopeless", zero_stage=1, micro_batch_size=2)
    with pytest.raises(TrainingError, match="3 steps in a row, the last of them step 3"):
        spoilt_trainer(hopeless, every_step=True).fit()
    distributed.stop()


if __name__ == "__main__":
    main()
