"""The convolution of a doubled grid: by eight products a voxel, the same as by twenty-seven."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from shapediff.models.convolution import ConvOfDoubled, doubled
from tests.models.test_norm import channels_last, numbers, threads


def plain(conv: ConvOfDoubled, x: Tensor) -> Tensor:
    return F.conv3d(doubled(x), conv.weight.to(x.dtype), conv.bias.to(x.dtype), padding=1)  # type: ignore[union-attr]


@pytest.mark.parametrize("shape", [(2, 3, 4, 4, 4), (1, 8, 2, 3, 5), (2, 4, 1, 1, 1)])
def test_it_is_the_convolution_of_the_doubled_grid(shape: tuple[int, ...]) -> None:
    """With its gradients, at borders too."""
    conv = ConvOfDoubled(shape[1], 6, 3, padding=1).double()
    x = channels_last(numbers(*shape)).requires_grad_()
    found, expected = conv(x), plain(conv, x)
    torch.testing.assert_close(found, expected)
    dy = numbers(*found.shape, seed=1)
    for a, b in zip(*(torch.autograd.grad(y, [x, *conv.parameters()], dy) for y in (found, expected)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("shape", "is_transposed"), [((1, 8, 8, 8, 8), True), ((1, 64, 4, 4, 4), False)])
def test_bfloat16_is_as_exact_as_the_plain_one(shape: tuple[int, ...], is_transposed: bool) -> None:
    """Where cells are many and channels few; elsewhere it is the plain one, to the bit, in any batch."""
    conv = ConvOfDoubled(shape[1], 16, 3, padding=1)
    x = channels_last(numbers(*shape).bfloat16())
    exact = plain(conv, x.double())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found, library = conv(x), plain(conv, x)
        assert torch.equal(found, library) != is_transposed
    errors = [float((value.double() - exact.detach()).square().mean().sqrt()) for value in (found, library)]
    assert errors[0] <= 1.1 * errors[1]


def test_the_bits_do_not_depend_on_threads() -> None:
    conv, x = ConvOfDoubled(16, 16, 3, padding=1), channels_last(numbers(1, 16, 16, 16, 16).bfloat16())
    found = []
    for number in (1, 2):
        with threads(number), torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            found.append(conv(x))
    assert torch.equal(*found)
