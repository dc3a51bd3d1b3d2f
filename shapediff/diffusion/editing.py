"""Sampling under conditions that the model was never trained for: parts kept, symmetry, a start at given data, blended noise.

Everything here constrains a walk that some sampler makes. What x_0 must satisfy is a projection of every estimate of x_0, with
eps recomputed so that both still explain x_t: the range-null space decomposition of Wang et al. 2023 (DDNM, eq. 13) for what is
kept. The noise in x_t stays as independent as in training, and the last step, to clean data, leaves the projection exact.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from shapediff.diffusion.gaussian import column, q_sample
from shapediff.diffusion.guidance import Denoise
from shapediff.diffusion.random import Noise, NoiseSource
from shapediff.diffusion.samplers.common import OnStep, Process, Sampler
from shapediff.diffusion.schedule import NoiseSchedule

JUMP_LENGTH = 10
"""Steps that one jump of resampling takes back (Lugmayr et al. 2022, sec. 4.2)."""


@dataclass(frozen=True)
class Edit:
    """What is asked of a batch of samples beside their labels; the default asks nothing. Samples have n voxels.

    `x_0` (n,) is data that is given to all of them. Of it `keep` (n,) says which voxels come out exactly as given; with
    `strength` below 1 the walk starts at x_0 noised to that share of its steps (SDEdit, Meng et al. 2022), and at 0 returns x_0.
    `mirror` (n,) is a permutation of the voxels that is its own inverse: samples come out equal to themselves permuted.
    `num_resamples` walks every JUMP_LENGTH steps that often, going back by fresh noise (RePaint, Lugmayr et al. 2022,
    algorithm 1), so that what is made and what is kept agree; the cost grows by as much.
    `x_T` (b, n) takes the place of the noise that is drawn first. `toward`, b seeds, and `weight` (b,) turn every draw from a
    sample's own seed towards that of another one, by slerp.
    """

    x_0: Float[Tensor, " n"] | None = None
    keep: Bool[Tensor, " n"] | None = None
    strength: float = 1.0
    mirror: Int[Tensor, " n"] | None = None
    num_resamples: int = 1
    x_T: Float[Tensor, "b n"] | None = None
    toward: tuple[int, ...] | None = None
    weight: Float[Tensor, " b"] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.strength <= 1:
            raise ValueError(f"strength={self.strength} must lie in [0, 1]: 0 returns the shape, 1 makes a new one")
        if self.num_resamples < 1:
            raise ValueError(f"num_resamples={self.num_resamples} must be at least 1")
        if self.x_0 is None and (self.keep is not None or self.strength < 1):
            raise ValueError("keep and a strength below 1 need x_0, the data that they are about")

    @property
    def asks_nothing(self) -> bool:
        """Whether samples come out as without it."""
        return all(given is None for given in (self.x_0, self.mirror, self.x_T, self.toward))

    def rows(self, index: Sequence[int]) -> Edit:
        """The edit of some of the samples, in that order: what is each sample's own, and all that is common."""
        rows = list(index)
        return replace(
            self,
            x_T=None if self.x_T is None else self.x_T[rows],
            toward=None if self.toward is None else tuple(self.toward[i] for i in rows),
            weight=None if self.weight is None else self.weight[rows],
        )

    def to(self, device: torch.device | str) -> Edit:
        """Itself with every tensor on that device."""
        moved: dict[str, Any] = {
            field.name: value.to(device)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **moved)

    def noise(self, seeds: Sequence[int], device: torch.device | str) -> Noise:
        """What the sampler draws from, one stream for each of `seeds`, or a blend of it and that of `toward`."""
        own = NoiseSource(seeds, device)
        if self.toward is None or self.weight is None:
            return own
        return BlendedNoise(own, NoiseSource(self.toward, device), self.weight)

    def project(self, x_0: Float[Tensor, "b n"]) -> Float[Tensor, "b n"]:
        """The nearest to x_0 that is symmetric, with the kept voxels as given; these must be symmetric themselves."""
        if self.mirror is not None:
            x_0 = 0.5 * (x_0 + x_0[:, self.mirror])
        return x_0 if self.keep is None else torch.where(self.keep, self.given, x_0)

    @property
    def given(self) -> Float[Tensor, " n"]:
        """x_0, where an edit needs it."""
        assert self.x_0 is not None, "checked when the edit was made"
        return self.x_0


@dataclass(frozen=True)
class BlendedNoise:
    """Draws from a and b at once, turned from a's to b's by `weight` (b,) in [0, 1]: a's own at 0, b's own at 1."""

    a: Noise
    b: Noise
    weight: Float[Tensor, " b"]

    def normal(self, *shape: int) -> Float[Tensor, "b ..."]:
        """Standard normal numbers, (b, *shape) float32."""
        return slerp(self.a.normal(*shape), self.b.normal(*shape), self.weight)


def slerp(a: Float[Tensor, "b ..."], b: Float[Tensor, "b ..."], weight: Float[Tensor, " b"]) -> Float[Tensor, "b ..."]:
    """(sin((1-w) angle) a + sin(w angle) b) / sin(angle), each sample one vector (Shoemake 1985).

    Exactly a at 0 and b at 1. Where both have the same norm so has the result, and of independent normal draws it is a normal
    draw up to O(1 / sqrt(n)). Parallel vectors are blended linearly.
    """
    flat_a, flat_b, w = a.flatten(1).double(), b.flatten(1).double(), weight.double()
    angle = torch.cosine_similarity(flat_a, flat_b).clamp(-1, 1).acos()
    sine = angle.sin()
    of_a, of_b = (torch.where(sine > 1e-6, (u * angle).sin() / sine, u) for u in (1 - w, w))
    return column(of_a, a) * a + column(of_b, b) * b


def sample_edited(
    walk: Sampler,
    denoise: Denoise,
    x_T: Float[Tensor, "b n"],
    timesteps: Int[np.ndarray, " steps"],
    *,
    process: Process,
    noise: Noise,
    edit: Edit,
    on_step: OnStep | None = None,
) -> Float[Tensor, "b n"]:
    """`walk` from x_T to x_0 as `edit` asks; where it asks nothing, just that."""
    if edit.mirror is not None or edit.keep is not None:
        process = replace(process, project=edit.project)
    if edit.strength < 1:
        timesteps = timesteps[len(timesteps) - math.ceil(edit.strength * len(timesteps)) :]
        if not len(timesteps):
            return edit.project(edit.given.expand_as(x_T))
        start = torch.full((len(x_T),), int(timesteps[0]), device=x_T.device)
        x_T = q_sample(edit.given.expand_as(x_T), x_T, start, schedule=process.schedule)
    if edit.num_resamples == 1:
        return walk(denoise, x_T, timesteps, process=process, noise=noise, on_step=on_step)
    x_t, t = x_T, int(timesteps[0])
    for part, t_end, report in _parts(timesteps, edit.num_resamples, on_step):
        if t != part[0]:
            x_t = renoised(x_t, t, int(part[0]), noise=noise, schedule=process.schedule)
        x_t = walk(denoise, x_t, part, process=process, noise=noise, on_step=report, t_end=t_end)
        t = t_end
    return x_t


def renoised(
    x_t: Float[Tensor, "b n"], t: int, t_up: int, *, noise: Noise, schedule: NoiseSchedule
) -> Float[Tensor, "b n"]:
    """A draw from q(x_{t_up} | x_t), t_up > t >= -1: sqrt(r) x_t + sqrt(1 - r) z, r = abar_{t_up} / abar_t."""
    abar, abar_up = schedule.abar(torch.tensor([t, t_up])).tolist()
    ratio = abar_up / abar
    return math.sqrt(ratio) * x_t + math.sqrt(1 - ratio) * noise.normal(*x_t.shape[1:]).to(x_t.dtype)


def _parts(
    timesteps: Int[np.ndarray, " steps"], num_resamples: int, on_step: OnStep | None
) -> Iterator[tuple[Int[np.ndarray, " part"], int, OnStep | None]]:
    """(timesteps of a part, where it ends, report of its steps among all that are made), each part num_resamples times."""
    num_steps, done = len(timesteps) * num_resamples, 0
    for start in range(0, len(timesteps), JUMP_LENGTH):
        part, rest = timesteps[start : start + JUMP_LENGTH], timesteps[start + JUMP_LENGTH :]
        for _ in range(num_resamples):
            yield part, int(rest[0]) if len(rest) else -1, _moved(on_step, done, num_steps)
            done += len(part)


def _moved(on_step: OnStep | None, start: int, num_steps: int) -> OnStep | None:
    return None if on_step is None else lambda done, _: on_step(start + done, num_steps)
