"""Autoregression in Morton order: p(x) = prod p(token_i | tokens before it), over the nodes of an octree or the bare voxels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from shapediff.diffusion.editing import Edit
from shapediff.diffusion.loss import drop_labels
from shapediff.diffusion.random import NoiseSource
from shapediff.diffusion.samplers import OnStep
from shapediff.errors import ConfigError
from shapediff.methods.base import TOKEN_SETTINGS, Batch, LossOutput, Method, MethodConfig, SampleConfig
from shapediff.methods.octree_sequence import TOKENIZERS, NodeList, Tokenizer, joined_nodes, nodes_of, sequences_of
from shapediff.models import ModelConfig
from shapediff.models.octree_transformer import START, Cache, Nodes, OctreeTransformerConfig

TokenKind = Literal["octree", "voxels"]


@dataclass(frozen=True)
class OctreeAutoregressionConfig(MethodConfig):
    """-log p(x), the label replaced by the null label with probability `class_dropout`.

    `tokens` "octree" writes a grid coarse to fine, eight child bits a token; "voxels" as R^3 bits, the textbook's way.
    """

    tokens: TokenKind = "octree"
    class_dropout: float = 0.1

    def __post_init__(self) -> None:
        if self.tokens not in TOKENIZERS:
            raise ValueError(f"tokens {self.tokens!r} is unknown; use one of {', '.join(TOKENIZERS)}")
        if not 0 <= self.class_dropout <= 1:
            raise ValueError(f"class_dropout={self.class_dropout} must lie in [0, 1]")

    def build(self, *, resolution: int, num_classes: int) -> OctreeAutoregression:
        return OctreeAutoregression(self, resolution=resolution, num_classes=num_classes)


class OctreeAutoregression(Method):
    """One network, "transformer", which sees tokens."""

    num_timesteps = 1
    sampling_settings = TOKEN_SETTINGS | {"guidance_scale"}

    def __init__(self, config: OctreeAutoregressionConfig, *, resolution: int, num_classes: int) -> None:
        self.config = config
        self.resolution = resolution
        self.num_classes = num_classes
        self.tokenizer: Tokenizer = TOKENIZERS[config.tokens](resolution)
        self._possible = self.tokenizer.possible()

    def build_networks(self, model: ModelConfig) -> dict[str, nn.Module]:
        if not isinstance(model, OctreeTransformerConfig):
            raise ConfigError(
                "method=octree_autoregression trains model=octree_transformer; other models are denoisers"
            )
        return {"transformer": model.build(resolution=self.resolution, num_classes=self.num_classes)}

    def loss(self, networks: Mapping[str, nn.Module], batch: Batch, seeds: Sequence[int]) -> LossOutput:
        """-log p(x) in nats over R^2, since tokens grow as the surface does; `error` is in bits per voxel."""
        noise = NoiseSource(seeds, batch["voxels"].device)
        label = drop_labels(
            batch["label"], noise.uniform(), null_label=self.num_classes, rate=self.config.class_dropout
        )
        nats = self.nats(networks, batch["voxels"], label)
        per_sample = nats / self.resolution**2
        return LossOutput(
            loss=per_sample.mean(),
            per_sample=per_sample.detach(),
            error=nats.detach() / (math.log(2) * self.resolution**3),
            t=torch.zeros_like(label),
            label=batch["label"],
        )

    def nats(
        self, networks: Mapping[str, nn.Module], signal: Float[Tensor, "b voxels"], label: Int[Tensor, " b"]
    ) -> Float[Tensor, " b"]:
        """-log p(x | label) of each grid, exactly: over log 2 and R^3, bits per voxel."""
        s = sequences_of(signal, self.tokenizer)
        logits = self._logits(networks, s.before, s.sources, s.nodes, label, lengths=s.lengths)
        nats = F.cross_entropy(logits[0], s.tokens[0], reduction="none")
        return torch.stack([one.sum() for one in nats.split(list(s.lengths))])

    def _logits(
        self,
        networks: Mapping[str, nn.Module],
        before: Tensor,
        sources: Nodes,
        nodes: Nodes,
        label: Tensor,
        cache: Cache | None = None,
        lengths: Sequence[int] | None = None,
    ) -> Float[Tensor, "b n 256"]:
        logits = networks["transformer"](before, sources, nodes, label, cache, lengths).float()
        return logits.masked_fill(~self._possible.to(logits.device)[nodes.depths], -math.inf)

    def sample(
        self,
        networks: Mapping[str, nn.Module],
        label: Int[Tensor, " b"] | Float[Tensor, "b labels"],
        seeds: Sequence[int],
        *,
        config: SampleConfig,
        edit: Edit | None = None,
        on_step: OnStep | None = None,
    ) -> Float[Tensor, "b voxels"]:
        if edit is not None and not edit.asks_nothing:
            raise ConfigError(
                "method=octree_autoregression samples fresh shapes only; edits need method=voxel_diffusion"
            )
        if label.is_floating_point():
            raise ConfigError(
                "method=octree_autoregression takes one class a shape; mixtures need method=voxel_diffusion"
            )
        device, noise, cache = label.device, NoiseSource(seeds), Cache()
        walks = [_Walk(self.tokenizer) for _ in seeds]
        scale = config.guidance_scale
        null = torch.full_like(label, self.num_classes)
        labels = {0.0: null, 1.0: label}.get(scale, torch.cat([label, null]))
        source = [walk.node() for walk in walks]
        before = torch.full((len(walks),), START)
        depths = int(source[0].depths[0]), len(self._possible) - 1
        while not all(walk.is_done for walk in walks):
            node = [walk.node() for walk in walks]
            times = len(labels) // len(walks)
            logits = self._logits(
                networks,
                before[:, None].repeat(times, 1).to(device),
                self._stacked(source, times, device),
                self._stacked(node, times, device),
                labels,
                cache,
            )[:, 0]
            if times == 2:
                logits = _guided(logits[: len(walks)], logits[len(walks) :], scale)
            before = choose(logits.cpu(), noise.uniform(), config)
            for walk, token in zip(walks, before.tolist(), strict=True):
                walk.take(token)
            source = node
            if on_step is not None:
                on_step(min(walk.depth for walk in walks) - depths[0], depths[1] - depths[0] + 1)
        grids = np.stack([self.tokenizer.decode(np.array(walk.tokens)) for walk in walks])
        return torch.from_numpy(grids).to(device).float() * 2 - 1

    def invert(
        self,
        networks: Mapping[str, nn.Module],
        label: Int[Tensor, " b"] | Float[Tensor, "b labels"],
        voxels: Float[Tensor, "b voxels"],
        *,
        config: SampleConfig,
        on_step: OnStep | None = None,
    ) -> Float[Tensor, "b n"]:
        raise ConfigError(
            "method=octree_autoregression has no noise to find a shape's own of; use method=voxel_diffusion"
        )

    def _stacked(self, nodes: list[NodeList], times: int, device: torch.device) -> Nodes:
        """One node of each walk, the whole `times` over: (times b, 1)."""
        return nodes_of(joined_nodes(nodes), self.resolution).map(
            lambda value: value[:, None].repeat(times, *[1] * value.ndim).to(device)
        )


class _Walk:
    """The tokens of one grid so far, and the nodes whose tokens come next."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._level = tokenizer.first()
        self._start = 0
        self.tokens: list[int] = []
        self.is_done = False
        self.depth = int(self._level.depths[0])

    def node(self) -> NodeList:
        """The node whose token comes next; at the end, the last one again."""
        i = min(len(self.tokens) - self._start, len(self._level.codes) - 1)
        level = self._level
        return NodeList(level.depths[i : i + 1], level.codes[i : i + 1], level.parents[i : i + 1])

    def take(self, token: int) -> None:
        """Go on, but for a grid that is done."""
        if self.is_done:
            return
        self.tokens.append(token)
        if len(self.tokens) - self._start == len(self._level.codes):
            below = self._tokenizer.below(np.array(self.tokens[self._start :]), self._level)
            self._start = len(self.tokens)
            self.depth += 1
            if len(below.codes):
                self._level = below
            else:
                self.is_done = True


def _guided(conditional: Tensor, unconditional: Tensor, scale: float) -> Float[Tensor, "b 256"]:
    """log p_unc + scale (log p_cond - log p_unc), up to a constant; what is impossible stays so."""
    impossible = conditional.isinf()
    conditional, unconditional = (x.log_softmax(-1).masked_fill(impossible, 0.0) for x in (conditional, unconditional))
    return torch.lerp(unconditional, conditional, scale).masked_fill(impossible, -math.inf)


def choose(logits: Float[Tensor, "b tokens"], uniform: Float[Tensor, " b"], config: SampleConfig) -> Int[Tensor, " b"]:
    """A token a row, by the inverse of the distribution function at `uniform`.

    `temperature` divides the logits (0: the likeliest token); `top_k` keeps the k likeliest (0: all), `top_p` the likeliest that
    together reach that probability (Holtzman et al. 2020).
    """
    if config.temperature == 0:
        return logits.argmax(-1)
    p, order = (logits.double() / config.temperature).softmax(-1).sort(-1, descending=True)
    rank = torch.arange(p.shape[-1])
    is_kept = (p.cumsum(-1) - p < config.top_p) & (rank < (config.top_k or p.shape[-1]))
    kept: Bool[Tensor, "b tokens"] = is_kept | (rank == 0)
    cumulative = (p * kept).cumsum(-1)
    at = (cumulative <= uniform.double()[:, None] * cumulative[:, -1:]).sum(-1)
    last = kept.sum(-1) - 1
    return order.gather(-1, torch.minimum(at, last)[:, None])[:, 0]
