"""The convolution of a doubled grid: by eight products a voxel, the same as by twenty-seven."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from shapediff.models import UNet3DConfig
from shapediff.models.convolution import ConvOfDoubled, ConvOfParts, Stage, Upsample, doubled
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


@pytest.mark.parametrize("widths", [(16, 8), (24, 0)])
def test_a_convolution_of_parts_is_that_of_their_concatenation(widths: tuple[int, int]) -> None:
    conv, x = ConvOfParts(widths, 5).double(), channels_last(numbers(2, 24, 3, 4, 5))
    parts = [channels_last(part).requires_grad_() for part in x.split(widths, 1)[: 1 + bool(widths[1])]]
    found, expected = conv(*parts), conv(torch.cat(parts, 1))
    torch.testing.assert_close(found, expected)
    for a, b in zip(
        *(torch.autograd.grad(y.square().sum(), [*parts, *conv.parameters()]) for y in (found, expected)), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("bf16", [False, True])
def test_a_skip_connection_beside_is_one_that_is_concatenated(bf16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Output and gradients, which lie as convolutions like them; and less is kept for backward."""
    stage = Stage(24, 16, 8, width_beside=8)
    stage.conv_2.weight.data.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    results, kept = [], []
    for concatenates in (False, True):
        if concatenates:
            monkeypatch.setattr("shapediff.models.convolution.may_lie_beside", lambda x, beside: False)
        dtype = torch.bfloat16 if bf16 else torch.float32
        x, beside = (channels_last(numbers(2, width, 8, 8, 8).to(dtype)).requires_grad_() for width in (16, 8))
        condition = numbers(2, 8).float()
        storages: dict[int, int] = {}

        def keep(tensor: Tensor, storages: dict[int, int] = storages) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        keeping = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with threads(2):  # on one, oneDNN lays out the gradients of a float32 1x1x1 convolution otherwise
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16), keeping:
                y = stage(x, condition, beside)
            gradients = torch.autograd.grad(y.float().square().sum(), [x, beside, *stage.parameters()])
        lie_so = [value.is_contiguous(memory_format=torch.channels_last_3d) for value in (y, *gradients[:2])]
        assert concatenates or all(lie_so)
        results.append([y.detach(), *gradients])
        others = {x.data_ptr(), beside.data_ptr()}  # which a network keeps anyhow
        kept.append(sum(size for address, size in storages.items() if address not in others))
    of_x = float(results[1][1].norm())  # a bias before one channel a group has no gradient but of rounding
    for found, expected in zip(*results, strict=True):
        assert float((found - expected).norm()) < (2e-2 if bf16 else 1e-5) * (float(expected.norm()) + of_x)
    assert kept[1] - kept[0] == 2 * 24 * 8**3 * (2 if bf16 else 4)


def test_weights_are_rounded_once_for_sampling() -> None:
    """The sums of a doubled grid's weights too, not their parts: what is sampled with is as exact as what was trained."""
    config = UNet3DConfig(width=16, width_multipliers=(1, 2), num_heads=2, attention_levels=())
    network = config.build(resolution=32, num_classes=2)
    for parameter in network.parameters():
        parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(parameter.numel()))
    sampled, before = rounded(network, torch.device("cpu")), copy.deepcopy(network.state_dict())
    inputs = numbers(2, 32**3).float(), torch.tensor([3, 900]), torch.tensor([0, 2])
    with torch.inference_mode():
        exact = network(*inputs)
        with torch.autocast("cpu", torch.bfloat16):
            trained, found = network(*inputs), sampled(*inputs)
    errors = [float((value - exact).square().mean().sqrt()) for value in (found, trained)]
    assert 0 < errors[0] < 1.05 * errors[1] < 0.05 * float(exact.std())
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
