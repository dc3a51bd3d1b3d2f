"""The parts of the engine that need no process group: learning rate, batch split, EMA, config, resumable positions."""

from __future__ import annotations

import json
from pathlib import Path

import hydra
import pytest
import torch
from torch import nn

from launch.config import register_defaults, to_config
from shapediff.engine.config import LoopConfig, TrainConfig
from shapediff.engine.ema import Ema
from shapediff.engine.optim import OptimizerConfig
from shapediff.engine.shares import Shares
from shapediff.errors import ConfigError
from shapediff.models import DiT3DConfig, OctreeTransformerConfig, UNet3DConfig, VAE3DConfig
from tests.engine.engines import WholeEngine

ROOT = Path(__file__).resolve().parents[2]


def test_learning_rate_warms_up_holds_and_decays() -> None:
    config = OptimizerConfig(lr=1.0, warmup_steps=9, decay_fraction=0.5)
    assert [round(config.lr_at(step, 0.0), 6) for step in (0, 4, 9, 100)] == [0.1, 0.5, 1.0, 1.0]
    assert [config.lr_at(100, share) for share in (0.5, 0.75, 1.0)] == [1.0, 0.5, 0.0]
    assert OptimizerConfig(lr=1.0, warmup_steps=0).lr_at(0, 1.0) == 1.0


def test_only_matrices_decay() -> None:
    network = nn.Sequential(nn.Linear(3, 4), nn.GroupNorm(2, 4))
    decayed, plain = OptimizerConfig(weight_decay=0.1).build(network).param_groups
    assert [p.shape for p in decayed["params"]] == [(4, 3)]
    assert decayed["weight_decay"] == 0.1
    assert len(plain["params"]) == 3
    assert plain["weight_decay"] == 0


def test_embeddings_do_not_decay() -> None:
    """Of labels, tokens and places: a row that is seldom seen would shrink at every step that it is not in."""
    tables = {
        VAE3DConfig(width=8): {"position_in.table", "encoder.1.position.table", "position_latent.table", "prior"},
        UNet3DConfig(width=8, width_multipliers=(1, 2), attention_levels=()): {
            *("condition.label.weight", "position_in.table", "down.2.position.table")
        },
        OctreeTransformerConfig(hidden_size=24, depth=1, num_heads=2): {
            *("condition.label.weight", "token.weight", "parent.weight", "child.weight", "node_depth.weight")
        },
    }
    for model, expected in tables.items():
        network = model.build(resolution=8, num_classes=2)
        decayed, plain = OptimizerConfig(weight_decay=0.1).build(network).param_groups
        names = {id(p): name for name, p in network.named_parameters()}
        assert {names[id(p)] for p in plain["params"] if p.ndim > 1} == expected
        assert all(p.ndim > 1 for p in decayed["params"])


@pytest.mark.parametrize(
    ("batch", "micro", "world", "expected"),
    [(8, None, 2, (4, 1)), (8, 2, 2, (2, 2)), (8, 8, 4, (2, 1)), (6, 3, 1, (3, 2))],
)
def test_batch_is_split_evenly(batch: int, micro: int | None, world: int, expected: tuple[int, int]) -> None:
    assert LoopConfig(batch_size=batch, micro_batch_size=micro).split(world) == expected


def test_batch_that_cannot_be_split_is_refused() -> None:
    with pytest.raises(ValueError, match="use a multiple of 3"):
        LoopConfig(batch_size=8, micro_batch_size=1).split(3)
    with pytest.raises(ValueError, match="multiple of"):
        LoopConfig(batch_size=8, micro_batch_size=3).split(1)


def test_ema_is_the_recursion_and_forgets_its_start() -> None:
    network = nn.Linear(1, 1, bias=False)
    nn.init.constant_(network.weight, 0.0)
    ema = Ema(Shares({"net": WholeEngine(network)}), decay=0.5)
    expected = 0.0
    for n, weight in enumerate([1.0, 2.0, -1.0, 4.0]):
        nn.init.constant_(network.weight, weight)
        ema.update()
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * weight
    assert ema.gathered()["net"]["weight"].item() == pytest.approx(expected, rel=1e-6)
    assert network.weight.item() == 4.0


def test_a_run_is_described_by_plain_settings() -> None:
    config = TrainConfig(run_dir="runs/a", model=DiT3DConfig(depth=3), train=LoopConfig(steps=7))
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train": {"stepz": 1}}, "train: setting 'stepz' is unknown; did you mean 'steps'"),
        ({"train": {"steps": "many"}}, "train.steps: expected int"),
        ({"model": {"name": "unet"}}, "model 'unet' is unknown; did you mean 'unet3d'"),
        ({"method": {"name": "voxel_diffusion", "schedule": {"name": "cos"}}}, "noise schedule 'cos' is unknown"),
        ({"deepspeed": {"zero_stage": 4}}, "deepspeed.zero_stage '4' is unknown. There are: 0, 1, 2, 3, auto"),
        ({"deepspeed": {"precision": "fp8"}}, "deepspeed.precision 'fp8' is unknown"),
        ({"deepspeed": {"precision": "fp16", "zero_stage": 0}}, "precision=fp16 needs zero_stage 1, 2 or 3"),
        ({"deepspeed": {"offload_optimizer": True, "zero_stage": 0}}, "offload_optimizer needs zero_stage 1, 2 or 3"),
        ({"deepspeed": {"offload_parameters": True, "zero_stage": 2}}, "offload_parameters needs zero_stage=3, not 2"),
        ({"train": {"checkpoint_minutes": 0}}, "checkpoint_minutes=0.0 must be positive"),
        ({"train": {"max_minutes": -5}}, "max_minutes=-5.0 must be positive, or null"),
        ({"train": {"max_minutes": 0}}, "max_minutes=0.0 must be positive, or null"),
        ({"train": {"keep_every": -1}}, "keep_every must not be negative"),
        ({"optimiser": {}}, "'optimiser' is unknown; did you mean 'optimizer'"),
    ],
)
def test_a_typo_fails_at_launch(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig.from_dict(settings)


@pytest.mark.parametrize("path", sorted((ROOT / "conf" / "deepspeed").glob("zero*.yaml")), ids=lambda path: path.stem)
def test_every_way_to_share_the_work_is_a_choice_on_the_command_line(path: Path) -> None:
    """`deepspeed=NAME`, and DeepSpeed's own configuration says what the name does."""
    register_defaults()
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        settings = hydra.compose("train", overrides=[f"deepspeed={path.stem}"])
        assert to_config(hydra.compose("train")).deepspeed.zero_stage == "auto"
    config = to_config(settings).deepspeed
    found = config.to_deepspeed(device=torch.device("cpu"), micro_batch_size=1, accumulation_steps=1, grad_clip=1.0)
    zero, stage, offloads = found["zero_optimization"], int(path.stem[4]), path.stem.endswith("_offload")
    assert zero["stage"] == stage
    assert ("offload_optimizer" in zero, "offload_param" in zero) == (offloads, offloads and stage == 3)
