"""Prints, for each ZeRO stage, the bytes a parameter that DeepSpeed keeps on a rank between backward and step."""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import deepspeed
import torch

from shapediff.engine import distributed
from shapediff.engine.distributed import BUCKET_NUMBERS, DeepSpeedConfig
from shapediff.engine.optim import OptimizerConfig
from shapediff.models import DiT3DConfig

RESOLUTION = 8


def kept(stage: int, device: torch.device) -> float:
    """Bytes a parameter in tensors that are alive, the buffers of exchange aside."""
    gc.collect()
    before = alive()
    network = DiT3DConfig(hidden_size=192, depth=4, num_heads=3).build(resolution=RESOLUTION, num_classes=3)
    num = sum(p.numel() for p in network.parameters())
    settings = DeepSpeedConfig(zero_stage=stage, precision="float32").to_deepspeed(
        device=device, micro_batch_size=1, accumulation_steps=1, grad_clip=1.0
    )
    engine, *_ = deepspeed.initialize(model=network, optimizer=OptimizerConfig().build(network), config=settings)
    for step in range(2):
        zeros = torch.zeros(1, dtype=torch.long)
        engine.backward(engine(torch.randn(1, RESOLUTION**3), zeros, zeros).square().mean())
        if step == 0:  # AdamW makes its moments at the first step
            engine.step()
    found = sum(size for key, size in alive().items() if key not in before)
    engine.destroy()
    return found / num


def alive() -> dict[int, int]:
    """The bytes of every storage that a tensor holds."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor):
            for tensor in (thing, thing.grad if thing.is_leaf else None):
                if tensor is not None and tensor.device.type == "cpu":
                    storage = tensor.untyped_storage()
                    found[storage._cdata] = storage.nbytes()
    return {key: size for key, size in found.items() if size != 4 * BUCKET_NUMBERS}


if __name__ == "__main__":
    device = distributed.start()
    result = {stage: kept(stage, device) for stage in (0, 1, 2, 3)}
    if distributed.is_main():
        print("KEPT", json.dumps(result))
    distributed.stop()
