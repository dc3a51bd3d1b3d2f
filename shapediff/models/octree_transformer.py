"""A decoder-only transformer over the nodes of a sequence: what token comes next, given which node it belongs to.

In breadth-first order the place of the next node is known before its token is. So element i of the sequence carries the token of
the node before it and looks from there to node i: keys turn by where a token comes from, queries by where the next one goes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from shapediff.models.layers import Rotation, rotate, run_block, sinusoidal_embedding, zero_init
from shapediff.models.positions import ROPE_BASE

NUM_TOKENS = 256
START = 256
"""What stands in the place of the token before the first."""

MAX_DEPTHS = 12
FIRST_ROOM = 256
"""Elements that a cache has room for at first."""


@dataclass(frozen=True)
class OctreeTransformerConfig:
    """Sizes of an OctreeTransformer. `recompute_activations` keeps the inputs of blocks alone for backward."""

    hidden_size: int = 256
    depth: int = 8
    num_heads: int = 4
    mlp_ratio: float = 4.0
    recompute_activations: bool = False

    def __post_init__(self) -> None:
        if min(self.hidden_size, self.depth, self.num_heads) < 1:
            raise ValueError("hidden_size, depth and num_heads must be positive")
        if self.hidden_size % self.num_heads or self.head_width % 2 or self.head_width < 6:
            raise ValueError(
                f"hidden_size={self.hidden_size} over num_heads={self.num_heads} must give each head an even number of channels, "
                "6 or more: rotary positions turn pairs on three axes"
            )

    @property
    def head_width(self) -> int:
        """Channels of one head."""
        return self.hidden_size // self.num_heads

    def num_tokens(self, resolution: int) -> int:
        """The typical length of a sequence: tokens are as many as the voxels of half a face (0.47 R^2 on furniture at 32^3)."""
        return resolution**2 // 2

    def build(self, *, resolution: int, num_classes: int) -> OctreeTransformer:
        """The network, for grids of `resolution` voxels a side."""
        return OctreeTransformer(self, resolution=resolution, num_classes=num_classes)


@dataclass(frozen=True)
class Nodes:
    """Nodes in the order of their tokens, (b, n) int64 each.

    `centres` (b, n, 3) float32 in voxels; `depths`; `children` 0 to 7, which child of its parent a node is; `parents`, the
    token of the parent, START where there is none.
    """

    centres: Float[Tensor, "b n 3"]
    depths: Int[Tensor, "b n"]
    children: Int[Tensor, "b n"]
    parents: Int[Tensor, "b n"]

    def map(self, function: Callable[[Tensor], Tensor]) -> Nodes:
        """`function` of each of the four."""
        return Nodes(*map(function, (self.centres, self.depths, self.children, self.parents)))


class Cache:
    """Keys and values of the elements so far, a pair (b, heads, n, d) a block; empty at the start."""

    def __init__(self) -> None:
        self._blocks: list[tuple[_Rows, _Rows]] = []

    def extend(self, block: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values of `block` with these behind them, which stay: views, to be read alone."""
        if block == len(self._blocks):
            self._blocks.append((_Rows(k), _Rows(v)))
        keys, values = self._blocks[block]
        return keys.append(k), values.append(v)


class _Rows:
    """Rows (b, heads, n, d) that grow at their end, in memory that doubles: a new element does not copy those before it."""

    def __init__(self, like: Tensor) -> None:
        self._room = like.new_empty(*like.shape[:2], FIRST_ROOM, like.shape[3])
        self._num = 0

    def append(self, rows: Tensor) -> Tensor:
        """All rows, a view."""
        end = self._num + rows.shape[2]
        if end > self._room.shape[2]:
            more = rows.new_empty(*rows.shape[:2], max(end, 2 * self._room.shape[2]), rows.shape[3])
            more[:, :, : self._num] = self._room[:, :, : self._num]
            self._room = more
        self._room[:, :, self._num : end] = rows
        self._num = end
        return self._room[:, :, :end]


class OctreeTransformer(nn.Module):
    """`net(tokens, sources, nodes, label) -> logits`: the distribution of each node's token given all tokens before it."""

    def __init__(self, config: OctreeTransformerConfig, *, resolution: int, num_classes: int) -> None:
        super().__init__()
        self.config = config
        self.resolution = resolution
        width = config.hidden_size
        self.condition = _Label(width, num_classes)
        self.token = nn.Embedding(NUM_TOKENS + 1, width)
        self.parent = nn.Embedding(NUM_TOKENS + 1, width)
        self.node_depth = nn.Embedding(MAX_DEPTHS, width)
        self.child = nn.Embedding(8, width)
        for table in (self.token, self.parent, self.node_depth, self.child):
            nn.init.normal_(table.weight, std=0.02)
        self.place = nn.Linear(3 * PLACE_CHANNELS, width)
        self.blocks = nn.ModuleList(_Block(config, i) for i in range(config.depth))
        self.norm_out = nn.LayerNorm(width)
        self.out = zero_init(nn.Linear(width, NUM_TOKENS))

    def example_inputs(self, batch_size: int, resolution: int) -> tuple[Tensor, Nodes, Nodes, Tensor]:
        """Arguments of `forward` of the right shapes, of the typical length."""
        tokens = torch.zeros(batch_size, self.config.num_tokens(resolution), dtype=torch.long)
        nodes = Nodes(torch.zeros(*tokens.shape, 3), tokens, tokens, tokens)
        return tokens, nodes, nodes, torch.zeros(batch_size, dtype=torch.long)

    def forward(
        self,
        tokens: Int[Tensor, "b n"],
        sources: Nodes,
        nodes: Nodes,
        label: Int[Tensor, " b"],
        cache: Cache | None = None,
        lengths: Sequence[int] | None = None,
    ) -> Float[Tensor, "b n 256"]:
        """Logits of the tokens of `nodes`.

        `tokens` and `sources` are what stands before each: the token of the node before, START for the first, and that node. With
        a `cache` these continue what it holds, one element at a time. With `lengths`, one a label, all sequences lie one after
        the other in a single row: b is 1 there but for the labels, and nothing is spent on padding.
        """
        places = sinusoidal_embedding(nodes.centres.flatten(), PLACE_CHANNELS, max_period=10_000)
        h = (
            self.token(tokens)
            + self.parent(nodes.parents)
            + self.node_depth(nodes.depths)
            + self.child(nodes.children)
            + self.place(places.reshape(*tokens.shape, -1))
            + self._conditions(label, lengths)
        ).float()
        width = self.config.head_width
        turn_q, turn_k = rotation_of(nodes.centres, width), rotation_of(sources.centres, width)
        for block in self.blocks:
            h = run_block(block, h, turn_q, turn_k, cache, lengths, recompute=self.config.recompute_activations)
        return self.out(self.norm_out(h))

    def _conditions(self, label: Int[Tensor, " b"], lengths: Sequence[int] | None) -> Float[Tensor, "b n d"]:
        """What the labels add, to each element of its own sequence."""
        rows = self.condition(label)
        if lengths is None:
            return rows[:, None]
        return rows.repeat_interleave(torch.tensor(lengths, device=rows.device), 0)[None]


PLACE_CHANNELS = 64


def rotation_of(centres: Float[Tensor, "b n 3"], head_width: int) -> Rotation:
    """Axial rotary angles of places in the grid, in voxels: a third of a head's channels turns with each of x, y and z."""
    num = head_width // 6
    frequencies = ROPE_BASE ** (-torch.arange(num, device=centres.device) / num)
    angles = (centres[..., None] * frequencies).flatten(2)[:, None]  # b 1 n 3 num
    angles = F.pad(angles, (0, head_width // 2 - 3 * num))
    return angles.cos(), angles.sin()


class _Label(nn.Module):
    """A row a class, and one more for the null label."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.label = nn.Embedding(num_classes + 1, width)
        nn.init.normal_(self.label.weight, std=0.02)

    def forward(self, label: Int[Tensor, " b"]) -> Float[Tensor, "b width"]:
        return self.label(label)


class _Block(nn.Module):
    """Causal attention and MLP on a residual stream; both branches start as nothing."""

    def __init__(self, config: OctreeTransformerConfig, number: int) -> None:
        super().__init__()
        width, hidden = config.hidden_size, int(config.hidden_size * config.mlp_ratio)
        self.number, self.num_heads = number, config.num_heads
        self.norm_1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.attention_out = zero_init(nn.Linear(width, width))
        self.norm_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(approximate="tanh"), zero_init(nn.Linear(hidden, width))
        )

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        turn_q: Rotation,
        turn_k: Rotation,
        cache: Cache | None,
        lengths: Sequence[int] | None,
    ) -> Float[Tensor, "b n d"]:
        x = x + self._attend(self.norm_1(x), turn_q, turn_k, cache, lengths)
        return x + self.mlp(self.norm_2(x))

    def _attend(
        self, x: Tensor, turn_q: Rotation, turn_k: Rotation, cache: Cache | None, lengths: Sequence[int] | None
    ) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b n (three heads d) -> three b heads n d", three=3, heads=self.num_heads)
        q, k = (F.rms_norm(a, a.shape[-1:]) for a in (q, k))  # against drift, as in the denoisers
        q, k = rotate(q, turn_q), rotate(k, turn_k)
        if lengths is not None:
            each = zip(*(a.split(list(lengths), 2) for a in (q, k, v)), strict=True)
            h = torch.cat([F.scaled_dot_product_attention(a, b, c, is_causal=True) for a, b, c in each], 2)
        elif cache is None:
            h = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            k, v = cache.extend(self.number, k, v)
            h = F.scaled_dot_product_attention(q, k, v)
        return self.attention_out(rearrange(h, "b heads n d -> b n (heads d)"))
