"""Group normalisation with channels last by operations of PyTorch, where no loops run: its own, and finite differences."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from shapediff.models import openmp
from shapediff.models.norm import GroupNorm, _GroupNorm
from tests.models.test_norm import channels_last, everything, numbers


@pytest.fixture(autouse=True)
def no_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openmp, "parallel", lambda: None)


@pytest.mark.parametrize("rows", [1, 2], ids=["weight_of_all", "weight_a_sample"])
def test_gradients_are_those_of_finite_differences(rows: int) -> None:
    x = channels_last(3 + numbers(2, 6, 2, 3, 2)).requires_grad_()
    weight, bias = numbers(rows, 6, seed=1).requires_grad_(), numbers(rows, 6, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(lambda *a: _GroupNorm.apply(a[0], 3, a[1], a[2], 1e-5), (x, weight, bias))


@pytest.mark.parametrize("adaptive", [False, True])
def test_the_same_in_both_memory_formats(adaptive: bool) -> None:
    norm = GroupNorm(4, 8).double()
    norm.weight.data, norm.bias.data = numbers(8, seed=3), numbers(8, seed=4)
    x, dy, gain, offset = numbers(3, 8, 4, 4, 4), numbers(3, 8, 4, 4, 4, seed=1), numbers(3, 8), numbers(3, 8, seed=5)
    if not adaptive:
        gain, offset = torch.zeros(3, 8).double(), torch.zeros(3, 8).double()
    expected = F.group_norm(x, 4, norm.weight, norm.bias) * (1 + gain)[..., None, None, None]
    expected = expected + offset[..., None, None, None]
    plain, last = (
        everything(norm, x, gain, offset, dy, silu=False),
        everything(norm, channels_last(x), gain, offset, dy, silu=False),
    )
    torch.testing.assert_close(plain[0], expected)
    assert last[0].is_contiguous(memory_format=torch.channels_last_3d)
    for found, reference in zip(last, plain, strict=True):
        torch.testing.assert_close(found, reference)
    if not adaptive:
        torch.testing.assert_close(norm(channels_last(x)), expected)


@pytest.mark.parametrize("mean", [0.0, 2.0])
def test_bfloat16_is_as_exact_as_the_library(mean: float) -> None:
    """Against float64 of the same rounded inputs: the library sums up in float32, ours in parts of bfloat16."""
    norm = GroupNorm(8, 16)
    norm.weight.data, norm.bias.data = numbers(16, seed=3).float(), numbers(16, seed=4).float()
    low = [(mean + numbers(2, 16, 8, 8, 8)).bfloat16(), *(numbers(2, 16, seed=s).bfloat16() for s in (5, 6))]
    dy = (1 + numbers(2, 16, 8, 8, 8, seed=1)).bfloat16()
    plain = everything(norm, *low, dy, silu=False)
    last = everything(norm, channels_last(low[0]), *low[1:], dy, silu=False)
    exact = everything(norm.double(), *(value.double() for value in low), dy.double(), silu=False)
    for found, library, reference in zip(last, plain, exact, strict=True):
        error, known = ((value.double() - reference).square().mean().sqrt() for value in (found, library))
        assert error <= 2 * known + 4e-3 * reference.square().mean().sqrt()
