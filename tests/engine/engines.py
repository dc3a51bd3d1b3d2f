"""What Shares sees of a DeepSpeed engine of stage 0, without DeepSpeed and without a process group."""

from __future__ import annotations

import torch
from torch import nn

from shapediff.engine.optim import OptimizerConfig


class WholeEngine:
    """One process that holds everything."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.basic_optimizer = self.optimizer = OptimizerConfig(lr=0.1).build(module)

    def zero_optimization_stage(self) -> int:
        return 0

    def step(self) -> None:
        """One step with gradients that differ from step to step."""
        for p in self.module.parameters():
            p.grad = torch.sin(7 * p.detach()) + 0.1
        self.optimizer.step()
