"""WGAN-GP: a generator that lowers the Wasserstein-1 distance to the data, as a critic of slope 1 measures it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from shapediff.diffusion.editing import Edit
from shapediff.diffusion.loss import check_class_dropout, drop_labels
from shapediff.diffusion.random import NoiseSource
from shapediff.diffusion.samplers import OnStep
from shapediff.errors import ConfigError
from shapediff.methods.base import Batch, LossOutput, Method, MethodConfig, SampleConfig, Turn
from shapediff.models import ModelConfig
from shapediff.models.voxel_gan import VoxelCriticConfig, VoxelGeneratorConfig


@dataclass(frozen=True)
class WganGpConfig(MethodConfig):
    """W_1 by a critic with gradient penalty (Gulrajani et al. 2017): `penalty_weight` is their lambda.

    The critic learns at every step, the generator at every `num_critic_steps`-th. `class_dropout` shows a shape under the null
    label, to both, with that probability. The critic is of training alone, so that its sizes stand here.
    """

    critic: VoxelCriticConfig = field(default_factory=VoxelCriticConfig)
    latent_size: int = 128
    num_critic_steps: int = 5
    penalty_weight: float = 10.0
    class_dropout: float = 0.1

    def __post_init__(self) -> None:
        if self.num_critic_steps < 1 or self.latent_size < 1:
            raise ValueError(
                f"num_critic_steps={self.num_critic_steps} and latent_size={self.latent_size} must be at least 1"
            )
        if self.penalty_weight <= 0:
            raise ValueError(f"penalty_weight={self.penalty_weight} must be positive: nothing else bounds the slope")
        check_class_dropout(self.class_dropout)

    def build(self, *, resolution: int, num_classes: int) -> WganGp:
        return WganGp(self, resolution=resolution, num_classes=num_classes)


class WganGp(Method):
    """Two networks, "generator" and, in training alone, "critic"; both see Morton-ordered signals."""

    num_timesteps = 1
    sampling_settings = frozenset()
    """A shape is made at once, from its seed and label alone."""

    def __init__(self, config: WganGpConfig, *, resolution: int, num_classes: int) -> None:
        self.config = config
        self.resolution = resolution
        self.num_classes = num_classes

    def build_networks(self, model: ModelConfig) -> dict[str, nn.Module]:
        if not isinstance(model, VoxelGeneratorConfig):
            raise ConfigError("method=wgan_gp trains model=voxel_generator; other models are no generators")
        sizes = {"resolution": self.resolution, "num_classes": self.num_classes, "latent_size": self.config.latent_size}
        return {"generator": model.build(**sizes)}

    def build_training_networks(self) -> dict[str, nn.Module]:
        return {"critic": self.config.critic.build(resolution=self.resolution, num_classes=self.num_classes)}

    def turns(self, step: int) -> tuple[Turn, ...]:
        """The critic's, and behind the last of every `num_critic_steps` the generator's (Gulrajani et al. 2017, algorithm 1)."""
        critic, generator = Turn(self.loss, ("critic",)), Turn(self.generator_loss, ("generator",))
        is_generators = (step + 1) % self.config.num_critic_steps == 0
        return (critic, generator) if is_generators else (critic,)

    def loss(self, networks: Mapping[str, nn.Module], batch: Batch, seeds: Sequence[int]) -> LossOutput:
        """The critic's: D(G(z)) - D(x) + lambda (||grad D|| - 1)^2; the mean of `error`, D(x) - D(G(z)), estimates W_1.

        The gradient is taken at a random point of the line from each x to its G(z) (Gulrajani et al. 2017, eq. 3).
        """
        x, (label, share, z, _) = batch["voxels"], self._draws(batch, seeds)
        with torch.no_grad():
            fake = networks["generator"](z, label)
        scores, slope = networks["critic"](torch.cat([x, fake]), label.repeat(2), torch.lerp(x, fake, share[:, None]))
        gap, penalty, of_a_class = score_gap(scores), gradient_penalty(slope), label != self.num_classes
        metrics = {
            "wasserstein": gap,
            "gradient_penalty": penalty,
            "critic_slope": slope,
            "diversity": class_distances(fake[of_a_class], label[of_a_class]),
            "diversity_of_data": class_distances(x, batch["label"]),
            "coverage": covered(x, fake),
        }
        return _output(self.config.penalty_weight * penalty - gap, gap, batch, metrics)

    def generator_loss(self, networks: Mapping[str, nn.Module], batch: Batch, seeds: Sequence[int]) -> LossOutput:
        """The generator's: D(x) - D(G(z)), of which it moves the second term, for other latents than the critic just saw."""
        label, _, _, z = self._draws(batch, seeds)
        fake = networks["generator"](z, label)
        scores, _ = networks["critic"](torch.cat([batch["voxels"], fake]), label.repeat(2))
        gap = score_gap(scores)
        return _output(gap, gap, batch, {"generator_loss": gap})

    def _draws(self, batch: Batch, seeds: Sequence[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(labels with some dropped, shares in [0, 1), latents of the critic's turn, latents of the generator's)."""
        noise = NoiseSource(seeds, batch["voxels"].device)
        rate, null = self.config.class_dropout, self.num_classes
        label = drop_labels(batch["label"], noise.uniform(), null_label=null, rate=rate)
        share, z = noise.uniform(), noise.normal(2, self.config.latent_size)
        return label, share, z[:, 0], z[:, 1]

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
        """G(z, label), z from each seed or blended with that of another; a mixture blends the rows of its classes."""
        edit = edit or Edit()
        if not replace(edit, toward=None, weight=None).asks_nothing:
            raise ConfigError(
                "method=wgan_gp makes shapes from latents and finds no latent of a given shape: it interpolates between seeds "
                "and classes, and other edits need method=voxel_diffusion"
            )
        x = networks["generator"](edit.noise(seeds, label.device).normal(self.config.latent_size), label)
        if on_step is not None:
            on_step(1, 1)
        return x

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
            "method=wgan_gp finds no latent of a given shape; use method=voxel_diffusion, or seeds and classes"
        )


def score_gap(scores: Float[Tensor, "two_b"]) -> Float[Tensor, " b"]:
    """D(x) - D(G(z)) of scores of all x, then of all G(z): its mean is W_1 where D is the best of all critics of slope 1."""
    real, fake = scores.chunk(2)
    return real - fake


def gradient_penalty(slope: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
    """(||grad D|| - 1)^2, of both sides: the best critic has slope 1 almost everywhere between the two distributions."""
    return (slope - 1).square()


def class_distances(x: Float[Tensor, "b n"], label: Int[Tensor, " b"]) -> Float[Tensor, " pairs"]:
    """1 - IoU of all pairs of shapes of one class, inside where positive: 0 where all are the same, 1 where none overlap."""
    i, j = torch.triu(label[:, None] == label, diagonal=1).nonzero().unbind(1)
    return 1 - _ious(x, x)[i, j]


def covered(x: Float[Tensor, "b n"], fake: Float[Tensor, "k n"]) -> Float[Tensor, " b"]:
    """1 for each x that is the nearest by IoU to some of `fake`, else 0: coverage (Achlioptas et al. 2018), in one batch.

    As many draws of one distribution cover 1 - (1 - 1/b)^b of each other at most, in the mean: 0.684 at b = 4, 0.644 at 16, down
    to 1 - 1/e = 0.632; copies of one shape cover 1/b.
    """
    nearest = _ious(fake, x).argmax(1)
    return torch.zeros(len(x), device=x.device).index_fill(0, nearest, 1.0)


def _ious(a: Float[Tensor, "b n"], b: Float[Tensor, "k n"]) -> Float[Tensor, "b k"]:
    """Intersection over union of the voxels that are positive; 1 for two empty shapes."""
    a, b = (a > 0).float(), (b > 0).float()
    both = a @ b.T
    union = a.sum(1)[:, None] + b.sum(1) - both
    return torch.where(union > 0, both / union.clamp(min=1), 1.0)


def _output(per_sample: Tensor, gap: Tensor, batch: Batch, metrics: Mapping[str, Tensor]) -> LossOutput:
    return LossOutput(
        loss=per_sample.mean(),
        per_sample=per_sample.detach(),
        error=gap.detach(),
        t=torch.zeros_like(batch["label"]),
        label=batch["label"],
        metrics={name: values.detach() for name, values in metrics.items()},
    )
