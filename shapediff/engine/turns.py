"""The updates of one step: which networks each trains, the others being constants in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from shapediff.errors import ConfigError
from shapediff.methods import Turn


def trained_in(turn: Turn, engines: Mapping[str, Any]) -> dict[str, Any]:
    """The engines of the networks that `turn` trains."""
    return {name: engine for name, engine in engines.items() if turn.trains is None or name in turn.trains}


def networks_in(turn: Turn, engines: Mapping[str, Any], autocast: torch.dtype | None) -> dict[str, nn.Module]:
    """What the loss of `turn` calls: the engines that it trains, and the networks of the others as constants."""
    trained = trained_in(turn, engines)
    others = {name: _Constant(engine.module, autocast) for name, engine in engines.items() if name not in trained}
    return {**trained, **others}


def allows_stage(turns: tuple[Turn, ...], stage: int) -> bool:
    """Whether `stage` of ZeRO can train so: what a turn holds still is called without its engine, which 3 does not do."""
    return stage != 3 or all(turn.trains is None for turn in turns)


def check_stage(turns: tuple[Turn, ...], stage: int) -> None:
    """Raise ConfigError where `stage` of ZeRO does not allow these turns."""
    if not allows_stage(turns, stage):
        raise ConfigError(
            "this method trains its networks in turns, which ZeRO stage 3 does not do; use deepspeed=zero2"
        )


def check_compiles(turns: tuple[Turn, ...], stage: int) -> None:
    """Raise ConfigError where networks that train so are not compiled."""
    if any(turn.trains is not None for turn in turns):
        raise ConfigError("this method trains its networks in turns, which are not compiled; leave train.compile out")
    if stage == 3:
        raise ConfigError("ZeRO stage 3 gathers weights layer by layer, which is not compiled; use deepspeed=zero2")


class _Constant(nn.Module):
    """A network whose weights take no gradient, called past its engine, which would take any backward for its own."""

    def __init__(self, network: nn.Module, autocast: torch.dtype | None) -> None:
        super().__init__()
        self._network = network
        self._autocast = autocast

    def forward(self, *args: Tensor) -> Any:
        constants = {name: weight.detach() for name, weight in self._network.named_parameters()}
        with torch.autocast(args[0].device.type, self._autocast, enabled=self._autocast is not None):
            return torch.func.functional_call(self._network, constants, args)
