"""Convolutions with weights in oneDNN's order: the same numbers as PyTorch's, and sums that are rounded once."""

from __future__ import annotations

import platform

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shapediff.models.convolution import ConvOfDoubled, ConvOfParts, doubled, packed
from shapediff.models.packed import PackedConv3d, PackedConvTranspose3d, packs
from tests.models.test_norm import channels_last, numbers, threads

needs_units = pytest.mark.skipif(not packs(), reason="a CPU or a PyTorch without bfloat16 convolutions of oneDNN")


def grid(*shape: int, seed: int = 0) -> Tensor:
    return channels_last(numbers(*shape, seed=seed).bfloat16())


@pytest.fixture(autouse=True)
def _same_weights() -> None:
    torch.manual_seed(0)


def exact(conv: nn.Conv3d, x: Tensor) -> Tensor:
    """In float64 of weights and x as they are rounded."""
    weight, bias = (parameter.detach().bfloat16().double() for parameter in conv.parameters())
    return F.conv3d(x.double(), weight, bias, stride=conv.stride, padding=conv.padding)


def test_it_is_used_where_a_cpu_has_bfloat16() -> None:
    """Else everything here would be skipped in silence."""
    if platform.machine() != "x86_64" or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("no bfloat16 units of x86")
    assert packs()


@needs_units
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("side", "padding"), [(3, 1), (1, 0)])
@pytest.mark.parametrize("widths", [(16, 16), (1, 24), (24, 1), (40, 8)])
def test_bits_are_those_of_pytorch(widths: tuple[int, int], side: int, padding: int, stride: int) -> None:
    """Whatever the batch, and the number of threads."""
    conv, x = nn.Conv3d(*widths, side, stride=stride, padding=padding).bfloat16(), grid(3, widths[0], 9, 8, 7)
    with torch.inference_mode():
        own, expected = packed(conv), conv(x)
        assert torch.equal(own(x), expected)
        assert torch.equal(own(x.float()), expected) and torch.equal(own(x.contiguous()), expected)
        assert torch.equal(own(x[1:2]), expected[1:2])
        with threads(1):
            assert torch.equal(own(x), expected)


@needs_units
def test_a_sum_is_rounded_once_and_written_where_it_may_be() -> None:
    conv, x, term = nn.Conv3d(16, 24, 3, padding=1), grid(2, 16, 8, 8, 8), grid(2, 24, 8, 8, 8, seed=1)
    own, before = PackedConv3d(conv.weight, conv.bias, padding=1), term.clone()
    with torch.inference_mode():
        beside = own(x, term)
        assert torch.equal(term, before)
        within = own(x, term, in_place=True)
    assert torch.equal(within, beside) and within.data_ptr() == term.data_ptr()
    once = (exact(conv, x) + before.double()).bfloat16()
    assert float((beside == once).double().mean()) > 0.999  # products are summed up in float32
    torch.testing.assert_close(beside, once, rtol=2.0**-7, atol=1e-5)


@needs_units
@pytest.mark.parametrize("shape", [(2, 8, 8, 8, 8), (1, 64, 4, 4, 4), (3, 16, 3, 4, 5)])
def test_a_doubled_grid_costs_eight_products_or_its_convolution(shape: tuple[int, ...]) -> None:
    conv, x = ConvOfDoubled(shape[1], 16), grid(*shape)
    found, parts = packed(conv)(x), exact(conv, doubled(x))
    weight = conv.weight.detach().double()
    unrounded = F.conv3d(doubled(x).double(), weight, conv.bias.double(), padding=1)  # type: ignore[union-attr]
    error, of_parts = ((value.double() - unrounded).square().mean().sqrt() for value in (found, parts.bfloat16()))
    assert float(error.detach()) <= 1.1 * float(of_parts.detach())


@needs_units
def test_a_transposed_convolution_is_pytorchs() -> None:
    weight, bias, x = numbers(8, 6, 4, 4, 4).bfloat16(), numbers(6).bfloat16(), grid(2, 8, 3, 4, 5)
    own = PackedConvTranspose3d(weight, bias, stride=2, padding=1)
    assert torch.equal(own(x), F.conv_transpose3d(x, weight, bias, stride=2, padding=1))


@needs_units
@pytest.mark.parametrize("split", [0, 8])
def test_parts_are_summed_up_before_they_are_rounded(split: int) -> None:
    conv, x = ConvOfParts((24 - split, split), 16), grid(2, 24, 4, 4, 4)
    own, whole = packed(conv), exact(conv, x)
    parts = [channels_last(part) for part in x.split([24 - split, split], 1)]
    for found in (own(x), own(*parts) if split else own(x)):
        torch.testing.assert_close(found.double(), whole, rtol=2.0**-7, atol=2.0**-9 * float(whole.abs().max()))
