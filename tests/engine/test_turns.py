"""What a turn trains and what is constant in it, without DeepSpeed; whole runs: tests/distributed/test_turns.py."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from shapediff.engine.turns import allows_stage, check_compiles, check_stage, networks_in, trained_in
from shapediff.errors import ConfigError
from shapediff.methods import Turn, VoxelDiffusionConfig


def turn(*trains: str) -> Turn:
    return Turn(lambda networks, batch, seeds: pytest.fail("not called"), trains or None)


def test_by_default_one_turn_trains_all_by_their_engines() -> None:
    engines = {"denoiser": nn.Linear(2, 2)}
    (only,) = VoxelDiffusionConfig().build(resolution=8, num_classes=1).turns(7)
    assert trained_in(only, engines) == engines == networks_in(only, engines, None)


def test_the_others_are_constants_that_gradients_flow_through() -> None:
    """d/dx of W_2 tanh(W_1 x) in closed form, and no gradient for W_2."""
    torch.manual_seed(0)
    first, second = nn.Linear(3, 4, bias=False), nn.Linear(4, 1, bias=False)
    engines = {"first": first, "second": SimpleNamespace(module=second)}
    networks = networks_in(turn("first"), engines, None)
    assert networks["first"] is first
    x = torch.randn(1, 3, requires_grad=True)
    hidden = networks["first"](x).tanh()
    networks["second"](hidden).sum().backward()
    slope = second.weight * (1 - hidden.square())
    torch.testing.assert_close(x.grad, slope @ first.weight)
    torch.testing.assert_close(first.weight.grad, slope.T @ x)
    assert second.weight.grad is None and second.weight.requires_grad


def test_constants_run_in_the_precision_of_the_run() -> None:
    engines = {"a": nn.Linear(2, 2), "b": SimpleNamespace(module=nn.Linear(2, 2))}
    assert networks_in(turn("a"), engines, torch.bfloat16)["b"](torch.ones(1, 2)).dtype == torch.bfloat16
    assert networks_in(turn("a"), engines, None)["b"](torch.ones(1, 2)).dtype == torch.float32


def test_stage_3_trains_no_network_alone() -> None:
    check_stage((turn(),), 3)
    check_stage((turn("a"), turn("b")), 2)
    with pytest.raises(ConfigError, match="use deepspeed=zero2"):
        check_stage((turn("a"),), 3)
    assert [allows_stage((turn("a"),), stage) for stage in range(4)] == [True, True, True, False]


def test_only_what_trains_as_one_and_lies_whole_is_compiled() -> None:
    check_compiles((turn(),), 2)
    with pytest.raises(ConfigError, match=r"leave train\.compile out"):
        check_compiles((turn("a"), turn("b")), 0)
    with pytest.raises(ConfigError, match="use deepspeed=zero2"):
        check_compiles((turn(),), 3)
