"""Segment reductions against a slow loop, with and without torch-scatter."""

from __future__ import annotations

import importlib.util
import itertools

import pytest
import torch

from shapediff.grid import segment
from shapediff.grid.morton import morton_encode
from shapediff.grid.segment import indptr_from_sorted, segment_reduce

SLOW = {
    "sum": lambda rows: rows.sum(0),
    "mean": lambda rows: rows.mean(0),
    "max": lambda rows: rows.max(0).values,
}


@pytest.fixture(params=["torch", "torch_scatter"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run the test on one backend. torch-scatter is optional for users, and there in `make test`."""
    if request.param == "torch":
        monkeypatch.setattr(segment, "segment_csr", None)
    elif importlib.util.find_spec("torch_scatter") is None:
        pytest.skip("torch-scatter is not installed (the extra `scatter`)")
    return request.param


def _case(*width: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([0, 3, 1, 0, 0, 8, 2, 40, 0])
    values = torch.randn(int(lengths.sum()), *width, generator=generator, dtype=dtype)
    return values, torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])


@pytest.mark.parametrize("op", SLOW)
@pytest.mark.parametrize("width", [(), (5,), (2, 3)])
def test_equals_a_loop(backend: str, op: str, width: tuple[int, ...]) -> None:
    values, indptr = _case(*width)
    expected = torch.zeros(len(indptr) - 1, *width, dtype=values.dtype)
    for s, (start, stop) in enumerate(itertools.pairwise(indptr)):
        if stop > start:
            expected[s] = SLOW[op](values[start:stop])
    found = segment_reduce(values, indptr, op)
    # Sums of 40 float64 terms in another order; maxima are exact.
    torch.testing.assert_close(found, expected, rtol=0, atol=0 if op == "max" else 1e-14)


@pytest.mark.parametrize("op", SLOW)
def test_gradient(backend: str, op: str) -> None:
    values, indptr = _case(2)
    assert torch.autograd.gradcheck(lambda v: segment_reduce(v, indptr, op), values.requires_grad_())


def test_children_of_a_parent_from_morton_codes(backend: str) -> None:
    coords = torch.cartesian_prod(*[torch.arange(4)] * 3)
    codes = morton_encode(coords).sort().values[torch.arange(64) % 3 > 0]
    parents, counts = torch.unique(codes >> 3, return_counts=True)
    indptr = indptr_from_sorted(codes >> 3, 8)
    assert segment_reduce(torch.ones(len(codes)), indptr).tolist() == counts.tolist()
    assert parents.tolist() == list(range(8))


def test_no_rows_and_no_segments(backend: str) -> None:
    assert segment_reduce(torch.zeros(0, 3), torch.tensor([0, 0]), "max").tolist() == [[0.0, 0.0, 0.0]]
    assert segment_reduce(torch.zeros(0, 3), torch.tensor([0])).shape == (0, 3)


def test_refuses_pointers_that_are_none() -> None:
    for indptr in ([1, 3], [0, 2], [0, 2, 1, 3], [[0, 3]]):
        with pytest.raises(ValueError, match="indptr"):
            segment_reduce(torch.zeros(3), torch.tensor(indptr))
    with pytest.raises(ValueError, match="op="):
        segment_reduce(torch.zeros(3), torch.tensor([0, 3]), "min")
    for ids in ([1, 0], [-1, 0], [0, 5]):
        with pytest.raises(ValueError, match="rise"):
            indptr_from_sorted(torch.tensor(ids), 5)
