"""Rotary positions and windows: what attention may depend on, and what windows save."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from shapediff.grid.morton import morton_decode, morton_encode
from shapediff.models import DiT3DConfig, describe
from shapediff.models.dit3d import _Block
from shapediff.models.layers import Rotation, SelfAttention, rotate
from shapediff.models.positions import rotary_table

HEAD = 20  # three pairs an axis and two channels over


def test_rotary_scores_depend_on_offsets_alone() -> None:
    """(R_m q) . (R_n k) = q . R_{n-m} k for all pairs of cells, and differs from offset to offset."""
    side = 4
    rotation = rotary_table(side, HEAD)
    q, k = torch.randn(2, HEAD, generator=torch.Generator().manual_seed(0))
    scores = rotate(q.expand(side**3, -1), rotation) @ rotate(k.expand(side**3, -1), rotation).T
    cells = morton_decode(torch.arange(side**3))
    offsets = (cells[None] - cells[:, None] + side - 1) @ torch.tensor([1, 10, 100])  # one number an offset
    means = []
    for offset in offsets.unique():
        same = scores[offsets == offset]
        # float32 sums of 20 terms of order 1.
        assert same.max() - same.min() < 1e-5
        means.append(same.mean())
    assert len(means) == (2 * side - 1) ** 3
    assert torch.stack(means).sort().values.diff().min() > 0


def test_rotations_keep_lengths_and_the_dtype() -> None:
    x = torch.randn(2, 64, HEAD, generator=torch.Generator().manual_seed(0))
    turned = rotate(x, rotary_table(4, HEAD))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1), rtol=1e-5, atol=0)
    torch.testing.assert_close(turned[:, 0], x[:, 0])  # the cell at the origin does not turn
    assert rotate(x.bfloat16(), rotary_table(4, HEAD)).dtype == torch.bfloat16


def test_rotary_cells_are_told_apart_along_each_axis() -> None:
    cos, sin = rotary_table(8, 12)
    cells = morton_decode(torch.arange(512)).float()
    # Two frequencies an axis, 1 and 1/10, and x first.
    expected = torch.stack([cells, 0.1 * cells], -1).flatten(1)
    torch.testing.assert_close(cos, expected.cos())
    torch.testing.assert_close(sin, expected.sin())


def _masked(attention: SelfAttention, x: Tensor, mask: Tensor, rotation: Rotation | None) -> Tensor:
    """Attention among all tokens with a mask: the slow reference."""
    q, k, v = rearrange(attention.qkv(x), "b n (three h d) -> three b h n d", three=3, h=attention.num_heads)
    q = F.rms_norm(q, q.shape[-1:]) * attention.q_scale
    k = F.rms_norm(k, k.shape[-1:]) * attention.k_scale
    if rotation is not None:
        q, k = rotate(q, rotation), rotate(k, rotation)
    scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~mask, -torch.inf)
    return attention.out(rearrange(scores.softmax(-1) @ v, "b h n d -> b n (h d)"))


def _block(window_size: int) -> _Block:
    torch.manual_seed(0)
    block = _Block(DiT3DConfig(hidden_size=2 * HEAD, num_heads=2), window_size)
    torch.nn.init.normal_(block.modulation.weight, std=0.1)
    return block


@pytest.mark.parametrize("rope", [False, True])
@pytest.mark.parametrize("window_size", [1, 2, 4, 8, 16])
def test_windows_are_masked_full_attention(window_size: int, rope: bool) -> None:
    """The mask joins cells whose coordinates agree after division by the window's side, wherever they are in the array."""
    side, block = 8, _block(window_size)
    rotation = rotary_table(side, HEAD) if rope else None
    x = torch.randn(2, side**3, 2 * HEAD)
    window = morton_decode(torch.arange(side**3)) // window_size
    mask = (window[:, None] == window[None]).all(-1)
    # float32; rotations by absolute and by windows' own coordinates round differently.
    torch.testing.assert_close(
        block._attend(x, rotation), _masked(block.attention, x, mask, rotation), rtol=1e-4, atol=1e-5
    )


def test_permuting_windows_permutes_outputs() -> None:
    block, rotation = _block(2), rotary_table(4, HEAD)
    x, condition = torch.randn(2, 8, 8, 2 * HEAD), torch.randn(2, 2 * HEAD)
    order = torch.randperm(8)
    out = block(x.flatten(1, 2), condition, rotation).unflatten(1, (8, 8))
    permuted = block(x[:, order].flatten(1, 2), condition, rotation).unflatten(1, (8, 8))
    torch.testing.assert_close(permuted, out[:, order], rtol=1e-5, atol=1e-6)


def test_a_token_is_heard_in_its_window_until_a_global_block() -> None:
    config = DiT3DConfig(hidden_size=12, depth=3, num_heads=2, patch_size=2, window_size=2, global_every=3)
    assert [config.window_of(i) for i in range(3)] == [2, 2, 0]
    x = torch.randn(1, 64, 12)
    nudged = x.clone()
    nudged[0, morton_encode(torch.tensor([3, 0, 0]))] += torch.randn(12)
    condition = torch.randn(1, 12)
    for window_size, heard in ((2, 8), (0, 64)):
        torch.manual_seed(0)
        block = _Block(config, window_size)
        torch.nn.init.normal_(block.modulation.weight)
        changed = (block(x, condition) != block(nudged, condition)).any(-1)
        assert changed.sum() == heard


def test_windows_cost_in_proportion_to_tokens() -> None:
    """FLOPs and numbers kept for backward are a + b n for windows alone, exactly, and more than that with global blocks."""
    windows = DiT3DConfig(hidden_size=24, depth=2, num_heads=2, patch_size=2, window_size=4, global_every=3)
    flops, kept = zip(
        *((d.forward_flops, d.activation_bytes) for d in (describe(windows, r) for r in (16, 32, 64))), strict=True
    )
    for costs in (flops, kept):
        assert costs[2] - costs[1] == 8 * (costs[1] - costs[0])
    full = DiT3DConfig(hidden_size=24, depth=2, num_heads=2, patch_size=2)
    assert describe(full, 64).forward_flops > 50 * flops[2]
