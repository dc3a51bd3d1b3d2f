"""Autoregression in Morton order: p(x) = prod p(token_i | tokens before it), over the nodes of an octree or the bare voxels."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from shapediff.data.sampler import sample_seed
from shapediff.diffusion.editing import Edit
from shapediff.diffusion.loss import check_class_dropout, drop_labels
from shapediff.diffusion.random import NoiseSource
from shapediff.diffusion.samplers import OnStep
from shapediff.errors import ConfigError
from shapediff.methods.base import TOKEN_SETTINGS, Batch, LossOutput, Method, MethodConfig, SampleConfig
from shapediff.methods.octree_choice import choose, fittest, guided_terms, product_of
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
        check_class_dropout(self.class_dropout)

    def build(self, *, resolution: int, num_classes: int) -> OctreeAutoregression:
        return OctreeAutoregression(self, resolution=resolution, num_classes=num_classes)


class OctreeAutoregression(Method):
    """One network, "transformer", which sees tokens."""

    num_timesteps = 1
    sampling_settings = TOKEN_SETTINGS | {"guidance_scale"}
    has_likelihood = True

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
            error=self._bits(nats.detach()),
            t=torch.zeros_like(label),
            label=batch["label"],
        )

    def bits_per_voxel(
        self,
        networks: Mapping[str, nn.Module],
        voxels: Float[Tensor, "b voxels"],
        label: Int[Tensor, " b"],
        seeds: Sequence[int],
    ) -> Float[Tensor, " b"]:
        """Exact: nothing is drawn."""
        return self._bits(self.nats(networks, voxels, label))

    def _bits(self, nats: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        return nats / (math.log(2) * self.resolution**3)

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
        edit = edit or Edit()
        if edit.mirror is not None or edit.strength < 1 or edit.x_T is not None or edit.toward is not None:
            raise ConfigError(
                "method=octree_autoregression completes shapes and mixes classes; other edits need method=voxel_diffusion"
            )
        if edit.keep is None:
            return self._decoded(networks, label, seeds, config, None, on_step)[0]
        tries = edit.num_resamples
        allowed = self.tokenizer.agreeing((edit.given > 0).cpu().numpy(), edit.keep.cpu().numpy())
        of_tries = [seed if i == 0 else sample_seed(seed, i) for seed in seeds for i in range(tries)]
        labels = label.repeat_interleave(tries, 0)
        found, log_weight = self._decoded(networks, labels, of_tries, config, allowed, on_step)
        uniform = NoiseSource([sample_seed(seed, tries) for seed in seeds]).uniform()
        best = fittest(log_weight.reshape(-1, tries), uniform).to(found.device)
        return found.unflatten(0, (-1, tries))[torch.arange(len(best)), best]

    def _decoded(
        self,
        networks: Mapping[str, nn.Module],
        label: Tensor,
        seeds: Sequence[int],
        config: SampleConfig,
        allowed: Callable[[NodeList], Bool[np.ndarray, " tokens"]] | None,
        on_step: OnStep | None,
    ) -> tuple[Float[Tensor, "b voxels"], Float[Tensor, " b"]]:
        """Signals drawn token by token, and the log of the probability that their tokens would have been `allowed` anyway."""
        device, noise, cache = label.device, NoiseSource(seeds), Cache()
        walks = [_Walk(self.tokenizer) for _ in seeds]
        labels, weights = guided_terms(label, scale=config.guidance_scale, null_label=self.num_classes)
        source = [walk.node() for walk in walks]
        before, log_weight = torch.full((len(walks),), START), torch.zeros(len(walks))
        depths = int(source[0].depths[0]), len(self._possible) - 1
        while not all(walk.is_done for walk in walks):
            node = [walk.node() for walk in walks]
            logits = self._logits(
                networks,
                before[:, None].repeat(len(labels), 1).to(device),
                self._stacked(source, len(labels), device),
                self._stacked(node, len(labels), device),
                labels.flatten(),
                cache,
            )
            log_p = product_of(logits[:, 0].unflatten(0, labels.shape), weights).cpu()
            if allowed is not None:
                agrees = torch.from_numpy(np.stack([allowed(each) for each in node]))
                log_p = log_p.masked_fill(~agrees, -math.inf)
                going_on = torch.tensor([not walk.is_done for walk in walks])
                log_weight += torch.where(going_on, log_p.logsumexp(-1), 0.0)
            before = choose(log_p, noise.uniform(), config)
            for walk, token in zip(walks, before.tolist(), strict=True):
                walk.take(token)
            source = node
            if on_step is not None:
                on_step(min(walk.depth for walk in walks) - depths[0], depths[1] - depths[0] + 1)
        grids = np.stack([self.tokenizer.decode(np.array(walk.tokens)) for walk in walks])
        return torch.from_numpy(grids).to(device).float() * 2 - 1, log_weight

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
