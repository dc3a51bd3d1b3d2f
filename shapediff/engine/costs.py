"""What a run costs, from its configuration alone: arithmetic, the memory of each GPU under each ZeRO stage, hours.

Weights are float32 under every precision (autocast casts them as they are used), AdamW keeps two moments of each, and the
average one float32 more. Rajbhandari et al. (2020, sec. 5) count the shares; DeepSpeed keeps a copy of the weights beside the
moments from stage 1 on, and under stage 3 keeps what it gathered where it is used again within 10^9 weights, wherever it was
gathered from. Stage 1 is counted with all gradients, which it keeps where they accumulate; else it shares them as stage 2 does.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from shapediff.engine.config import TrainConfig
from shapediff.engine.distributed import BUCKET_NUMBERS
from shapediff.hardware import GIB
from shapediff.models.description import describe_network

FLOAT = 4
MAX_GATHERED = 1_000_000_000
"""Weights that DeepSpeed's stage 3 leaves gathered at most (stage3_max_live_parameters)."""
BACKWARD_SLACK = 1.1
"""Over what is kept for backward, for gradients and workspaces on the way: 1.02 to 1.16 measured, UNet3D and DiT3D on a CPU."""
OUTSIDE_TENSORS = GIB
"""What the CUDA context and its libraries, or Python and theirs, take beside tensors."""
USABLE = 0.92
"""The share of a GPU's memory that an estimate may fill: allocators leave holes."""
UTILISATION = 0.3
"""The share of peak arithmetic that training is assumed to reach."""


@dataclass(frozen=True)
class Costs:
    """What the networks of a run cost: `forward_flops` and `activation_bytes` of a sample, the rest whatever the batch.

    `cast_weight_bytes` are the weights in 16 bits that autocast keeps from forward to backward.
    """

    parameters: int
    forward_flops: int
    activation_bytes: int
    cast_weight_bytes: int
    recompute: bool

    @property
    def train_flops(self) -> int:
        """Of a sample: backward takes twice what forward takes, and recomputing once more."""
        return (4 if self.recompute else 3) * self.forward_flops


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU at the fullest moment of a step. `working` is the activations, or what the optimizer's step needs."""

    weights: int
    gradients: int
    optimizer: int
    ema: int
    working: int
    other: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.ema + self.working + self.other


def run_costs(
    config: TrainConfig, *, resolution: int, num_classes: int, recompute: bool, autocast: bool, on_gpu: bool
) -> Costs:
    """The costs of the networks of `config`. Raises ValueError where its settings do not fit each other.

    `recompute` stands for model.recompute_activations; `autocast`: matrix products in 16 bits.
    """
    method = config.method.build(resolution=resolution, num_classes=num_classes)
    with torch.device("meta"):
        networks = {
            **method.build_networks(replace(config.model, recompute_activations=False)),
            **method.build_training_networks(),
        }
    found = [
        describe_network(network, method.resolution_of(name), recompute=recompute, autocast=autocast, on_gpu=on_gpu)
        for name, network in networks.items()
        if name not in method.frozen
    ]
    return Costs(
        parameters=sum(d.parameters for d in found),
        forward_flops=sum(d.forward_flops for d in found),
        activation_bytes=sum(d.activation_bytes for d in found),
        cast_weight_bytes=sum(d.cast_weight_bytes for d in found),
        recompute=recompute,
    )


def memory(
    costs: Costs,
    *,
    stage: int,
    num_gpus: int,
    micro_batch_size: int,
    offload_optimizer: bool = False,
    offload_parameters: bool = False,
) -> Memory:
    """Memory of each of `num_gpus` under ZeRO `stage`.

    `offload_optimizer` counts from stage 1 on and takes the average along, which lies where the optimizer's weights do;
    `offload_parameters` counts under stage 3.
    """
    whole = FLOAT * costs.parameters
    even = -(-whole // num_gpus)
    share = even if stage else whole
    offloaded = offload_optimizer and stage > 0
    # Both moments, and from stage 1 on a copy of the weights. For a moment Adam's step takes as much again: twice the share
    # for roots and quotients, and from stage 1 on the gradients of the share, flat.
    optimizer = step = 0 if offloaded else (3 if stage else 2) * share
    # One GPU that holds all weights gathers none; from CPU memory it does.
    gathers = stage == 3 and (num_gpus > 1 or offload_parameters)
    gathered = FLOAT * min(costs.parameters, MAX_GATHERED) if gathers else 0
    resident = whole if stage < 3 else 0 if offload_parameters else share
    kept = micro_batch_size * costs.activation_bytes + costs.cast_weight_bytes
    return Memory(
        weights=resident + gathered,
        gradients=share if stage >= 2 else whole,
        optimizer=optimizer,
        ema=0 if offloaded else even,
        working=max(int(BACKWARD_SLACK * kept), step),
        other=OUTSIDE_TENSORS + (2 * FLOAT * BUCKET_NUMBERS if stage else 0),
    )


def hours(costs: Costs, config: TrainConfig, tflops: float) -> float:
    """Hours of the run where arithmetic takes all the time, at `tflops` of all GPUs together; `max_minutes` bounds them."""
    loop = config.train
    by_steps = loop.steps * loop.batch_size * costs.train_flops / (1e12 * tflops) / 3600
    return min(by_steps, loop.max_minutes / 60) if loop.max_minutes else by_steps
