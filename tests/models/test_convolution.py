"""The convolution of a doubled grid: by eight products a voxel, the same as by twenty-seven."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from shapediff.models import UNet3DConfig
from shapediff.models.convolution import ConvOfDoubled, Upsample, doubled
from shapediff.pipeline import rounded
from tests.models.test_norm import channels_last, numbers, threads


def plain(conv: ConvOfDoubled, x: Tensor) -> Tensor:
    return F.conv3d(doubled(x), conv.weight.to(x.dtype), conv.bias.to(x.dtype), padding=1)  # type: ignore[union-attr]


@pytest.mark.parametrize("shape", [(2, 3, 4, 4, 4), (1, 8, 2, 3, 5), (2, 1, 2, 1, 1), (0, 3, 4, 4, 4)])
def test_it_is_the_convolution_of_the_doubled_grid(shape: tuple[int, ...]) -> None:
    """With its gradients, at borders too."""
    conv = ConvOfDoubled(shape[1], 6).double()
    x = channels_last(numbers(*shape)).requires_grad_()
    found, expected = conv(x), plain(conv, x)
    torch.testing.assert_close(found, expected)
    dy = numbers(*found.shape, seed=1)
    for a, b in zip(*(torch.autograd.grad(y, [x, *conv.parameters()], dy) for y in (found, expected)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("shape", "is_transposed"), [((1, 8, 8, 8, 8), True), ((1, 64, 4, 4, 4), False)])
def test_bfloat16_is_as_exact_as_the_plain_one(shape: tuple[int, ...], is_transposed: bool) -> None:
    """Where cells are many and channels few; elsewhere it is the plain one, to the bit, in any batch."""
    conv = ConvOfDoubled(shape[1], 16)
    x = channels_last(numbers(*shape).bfloat16())
    exact = plain(conv, x.double())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found, library = conv(x), plain(conv, x)
        assert torch.equal(found, library) != is_transposed
    errors = [float((value.double() - exact.detach()).square().mean().sqrt()) for value in (found, library)]
    assert errors[0] <= 1.1 * errors[1]


def test_the_bits_do_not_depend_on_threads() -> None:
    conv, x = ConvOfDoubled(16, 16), channels_last(numbers(1, 16, 16, 16, 16).bfloat16())
    found = []
    for number in (1, 2):
        with threads(number), torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            found.append(conv(x))
    assert torch.equal(*found)


def test_what_is_doubled_keeps_channels_last_and_so_does_its_gradient() -> None:
    """Half of a concatenation's gradient does not: the convolution before it would pay for that."""
    up, x = Upsample(8), channels_last(numbers(1, 8, 4, 4, 4).float()).requires_grad_()
    y = up(x)
    assert y.is_contiguous(memory_format=torch.channels_last_3d)
    seen: list[Tensor] = []
    y.register_hook(seen.append)
    torch.cat([y, y.detach()], 1).square().sum().backward()
    assert seen[0].is_contiguous(memory_format=torch.channels_last_3d)


def test_weights_are_rounded_once_for_sampling_as_at_every_step() -> None:
    """The sums of a doubled grid's weights too, not their parts: what is sampled with is what was trained."""
    network = UNet3DConfig(width=8, width_multipliers=(1, 2), num_heads=2, attention_levels=()).build(
        resolution=32, num_classes=2
    )
    for parameter in network.parameters():
        parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(parameter.numel()))
    inputs = numbers(2, 32**3).float(), torch.tensor([3, 900]), torch.tensor([0, 2])
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(rounded(network, torch.device("cpu"))(*inputs), network(*inputs))
