"""Group normalisation and SiLU with channels last: the compiled loops against PyTorch's own in float64."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shapediff.models import norm_kernels, openmp
from shapediff.models.norm import GroupNorm, may_lie_beside


@contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last_3d)


def everything(
    norm: GroupNorm, x: Tensor, gain: Tensor | None, offset: Tensor | None, dy: Tensor, *, silu: bool, split: int = 0
) -> list[Tensor]:
    """The output and the gradients of x, weight, bias and, where given, gain and offset; x in two tensors from `split` on."""
    parts = [channels_last(part) for part in x.tensor_split([split], 1)] if split else [x]
    given = [
        v.clone(memory_format=torch.preserve_format).requires_grad_() for v in (*parts, gain, offset) if v is not None
    ]
    x, others = given[0], given[len(parts) :]
    if split:
        assert may_lie_beside(x, given[1])
    y = norm(x, *others, beside=given[1] if split else None, silu=silu)
    gradients = torch.autograd.grad(y, [norm.weight, norm.bias, *given], dy)
    dx = gradients[2 : 2 + len(parts)]
    assert not split or all(part.is_contiguous(memory_format=torch.channels_last_3d) for part in dx)
    return [y, torch.cat(dx, 1), *gradients[:2], *gradients[2 + len(parts) :]]


def norm_of(num_groups: int, width: int) -> GroupNorm:
    norm = GroupNorm(num_groups, width)
    norm.weight.data, norm.bias.data = 1 + numbers(width, seed=3).float(), numbers(width, seed=4).float()
    return norm


# One piece, several of them, rows that are not a power of two of cells, more channels than a row has numbers; then channels
# in two tensors: between groups and within one, and several pieces.
SHAPES = {
    "one": ((2, 16, 8, 8, 8), 0),
    "pieces": ((1, 8, 16, 16, 64), 0),
    "odd": ((3, 24, 3, 5, 7), 0),
    "wide": ((2, 528, 2, 2, 2), 0),
    "two": ((2, 96, 8, 8, 8), 64),
    "two within a group": ((3, 24, 3, 5, 7), 7),
    "two in pieces": ((2, 40, 16, 16, 16), 32),
}


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("shape", "split"), SHAPES.values(), ids=SHAPES)
def test_the_loops_are_as_exact_as_their_inputs(
    shape: tuple[int, ...], split: int, dtype: torch.dtype, adaptive: bool, silu: bool
) -> None:
    """Against float64 of the same inputs: y and dx to the rounding of their dtype, and gradients of weights better."""
    norm = norm_of(8, shape[1])
    x, dy = channels_last(2 + numbers(*shape)).to(dtype), channels_last(1 + numbers(*shape, seed=1)).to(dtype)
    gain, offset = (numbers(*shape[:2], seed=s).float() if adaptive else None for s in (5, 6))
    found = everything(norm, x, gain, offset, dy, silu=silu, split=split)
    exact = [None if v is None else v.double().contiguous() for v in (gain, offset)]
    expected = everything(norm.double(), x.double().contiguous(), *exact, dy.double().contiguous(), silu=silu)
    assert found[0].is_contiguous(memory_format=torch.channels_last_3d) and found[0].dtype == dtype
    rounding, better = (3e-6, 3e-6) if dtype == torch.float32 else (2.0**-8, 5e-5)
    for i, (value, reference) in enumerate(zip(found, expected, strict=True)):
        error = (value.double() - reference).abs().max() / reference.abs().max()
        assert error < (rounding if i < 2 else better)


def test_a_mean_far_from_zero_costs_no_variance() -> None:
    x = channels_last((1000 + numbers(1, 8, 8, 8, 8)).float())
    found = norm_of(4, 8)(x)
    expected = norm_of(4, 8).double()(x.double())
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-3)  # x itself is rounded to 6e-5
    assert float(expected.detach().std()) > 0.5


def test_sigmoid_is_exact_to_float32() -> None:
    """u sigmoid(u) as far as exp(-u) is a float32; its exponent is rounded, which tells where that is large."""
    x = torch.linspace(-1, 1, 1 << 16).reshape(1, 1, 32, 32, 64)
    out, plain = torch.empty_like(x), torch.empty_like(x)
    for y, silu in ((out, True), (plain, False)):
        norm_kernels.forward(x, None, y, 1, torch.full((1, 1), 50.0), torch.zeros(1, 1), 0.0, silu=silu)
    u = plain.double()
    assert float(u.abs().max()) > 86
    expected = u * torch.sigmoid(u)
    error = (out - expected).abs() / expected.abs().clamp_min(1e-38)
    assert bool((error < 4e-7 + 1e-7 * u.abs()).all())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_what_is_not_finite_is_not_hidden(value: float, dtype: torch.dtype) -> None:
    x = channels_last(numbers(2, 8, 4, 4, 4).to(dtype))
    x[1, 3, 2, 1, 0] = value
    norm = norm_of(4, 8)
    y, dx, d_weight, _ = everything(norm, x, None, None, torch.ones_like(x), silu=True)
    assert bool(y[0].isfinite().all()) and not bool(y[1, 2:4].isfinite().any())
    assert bool(dx[0].isfinite().all()) and not bool(dx[1, 2:4].isfinite().any())
    assert not bool(d_weight[2:4].isfinite().any()) and bool(d_weight[4:].isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_silu_far_out(dtype: torch.dtype) -> None:
    """Where exp(-u) is no float32 any more: u above, and 0 below, to the last bit."""
    norm = GroupNorm(1, 8)
    norm.weight.data.fill_(0)
    x = channels_last(numbers(1, 8, 4, 4, 4).to(dtype))
    for u in (87.5, 88.0, 100.0, 1e4, 1e30):
        for sign in (1, -1):
            norm.bias.data.fill_(sign * u)
            y, dx, d_weight, d_bias = everything(norm, x, None, None, torch.ones_like(x), silu=True)
            expected = u if sign > 0 else 0.0
            torch.testing.assert_close(y.double(), torch.full_like(y, expected).double(), rtol=2.0**-8, atol=u * 1e-37)
            assert bool(dx.isfinite().all()) and bool(d_weight.isfinite().all())
            assert d_bias.tolist() == pytest.approx([64.0 * (sign > 0)] * 8, abs=u * 1e-34)


def test_a_sample_is_the_same_in_any_batch() -> None:
    norm, x = norm_of(4, 8), channels_last(numbers(3, 8, 32, 16, 16).float())
    dy, gain, offset = torch.ones_like(x), numbers(3, 8).float(), numbers(3, 8, seed=1).float()
    together = everything(norm, x, gain, offset, dy, silu=True)
    for i in range(3):
        alone = everything(norm, *(v[i : i + 1] for v in (x, gain, offset, dy)), silu=True)
        assert torch.equal(together[0][i : i + 1], alone[0]) and torch.equal(together[1][i : i + 1], alone[1])


@pytest.mark.parametrize(
    ("shape", "split"),
    [((3, 24, 32, 32, 32), 0), ((1, 64, 24, 24, 24), 48), ((2, 8, 23, 23, 23), 0), ((1, 16, 16, 16, 16), 8)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_bits_do_not_depend_on_threads(dtype: torch.dtype, shape: tuple[int, ...], split: int) -> None:
    """A sample is the same on every machine share: also where its cells are not a multiple of anything."""
    norm = norm_of(4, shape[1])
    x, dy = channels_last(numbers(*shape).to(dtype)), channels_last(numbers(*shape, seed=1).to(dtype))
    gain, offset = numbers(*shape[:2]).float(), numbers(*shape[:2], seed=1).float()
    found = []
    for number in (1, 2, 3, 8):
        with threads(number):
            found.append(everything(norm, x, gain, offset, dy, silu=True, split=split))
            found[-1] += everything(norm, x, None, None, dy, silu=False, split=split)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_the_loops_run_on_linux() -> None:
    """Where PyTorch's threads are those of an OpenMP library: else everything here would test PyTorch against itself."""
    assert openmp.parallel() is not None or sys.platform != "linux"


@pytest.mark.parametrize("given", [nn.Parameter, lambda x: x[:, :, :, :, 1:]], ids=["a_parameter", "a_part"])
def test_whatever_holds_the_numbers(given: Callable[[Tensor], Tensor]) -> None:
    """A parameter, or a part of other numbers, which has gaps; and a gradient that is not laid out."""
    norm, x, dy = norm_of(4, 8), given(channels_last(numbers(2, 8, 4, 4, 4).float())), numbers(2, 8, 4, 4, 4).float()
    found = everything(norm, x, None, None, dy[..., : x.shape[4]], silu=True)
    expected = everything(norm, x.contiguous(), None, None, dy[..., : x.shape[4]], silu=True)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_without_numba_it_is_the_librarys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openmp, "find_spec", lambda name: None)
    openmp.parallel.cache_clear()
    try:
        assert openmp.parallel() is None
    finally:
        openmp.parallel.cache_clear()


def test_many_threads_may_normalise_at_once() -> None:
    norm, xs = norm_of(4, 8), [channels_last(numbers(4, 8, 16, 16, 16, seed=s).float()) for s in range(8)]
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(a, norm(x)) for a, x in zip(pool.map(norm, xs), xs, strict=True))


@pytest.mark.parametrize("silu", [False, True])
def test_elsewhere_it_is_the_librarys(silu: bool) -> None:
    """Contiguous, or of 64 bits."""
    norm = norm_of(4, 8).double()
    x, gain, offset = numbers(3, 8, 4, 4, 4), numbers(3, 8), numbers(3, 8, seed=5)
    expected = (
        F.group_norm(x, 4, norm.weight, norm.bias) * (1 + gain)[..., None, None, None] + offset[..., None, None, None]
    )
    expected = F.silu(expected) if silu else expected
    for given in (x, channels_last(x)):
        torch.testing.assert_close(norm(given, gain, offset, silu=silu), expected)


def test_what_does_not_fit_does_not_lie_beside() -> None:
    """Loops would read past its end; a concatenation says what is wrong."""
    x = channels_last(numbers(2, 8, 4, 4, 4).float())
    assert may_lie_beside(x, x)
    for other in (channels_last(x[:1]), channels_last(x[:, :, :2]), x.bfloat16(), x.contiguous()):
        assert not may_lie_beside(x, other)
