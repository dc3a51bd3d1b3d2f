"""What samplers share: timestep arrays, the evaluation of the denoiser, and the walk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal, Protocol, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from shapediff.diffusion.gaussian import Denoised, Prediction, denoised, eps_from_x0
from shapediff.diffusion.guidance import Denoise
from shapediff.diffusion.random import Noise
from shapediff.diffusion.schedule import NoiseSchedule
from shapediff.diffusion.variance import Variance, split_output

Spacing = Literal["trailing", "leading", "linspace"]
SPACINGS: tuple[str, ...] = get_args(Spacing)

OnStep = Callable[[int, int], None]
"""Called after each step with (steps done, steps in all)."""


@dataclass(frozen=True)
class Process:
    """What a sampler must know of the model: its schedule, what it predicts, and whether x_0 is clamped to [-1, 1].

    Where `variance` is "learned", the denoiser has twice the channels of x_t, and DDPM alone reads the second half.
    `project` is what an edit asks of x_0: every estimate is put through it, and so is what the last step returns.
    """

    schedule: NoiseSchedule
    prediction: Prediction
    clip_x0: bool = True
    variance: Variance = "fixed"
    project: Callable[[Float[Tensor, "b ..."]], Float[Tensor, "b ..."]] | None = None

    def __post_init__(self) -> None:
        if self.prediction == "epsilon" and self.schedule.ends_in_pure_noise:
            raise ValueError(
                "prediction='epsilon' cannot be sampled from a schedule that ends in pure noise, where eps says nothing of "
                "x_0; predict v or x0"
            )

    def evaluate(self, denoise: Denoise, x_t: Float[Tensor, "b ..."], t: int) -> Denoised:
        """x_0 and eps at x_t. Where x_0 is clamped or projected, eps is recomputed so that both still explain x_t.

        Either leaves a learned variance as it is: that of the step, around a mean that moved.
        """
        steps = torch.full((len(x_t),), t, device=x_t.device)
        output = denoise(x_t, steps).to(x_t.dtype)
        output, fraction = split_output(output) if self.variance == "learned" else (output, None)
        found = denoised(output, x_t, steps, prediction=self.prediction, schedule=self.schedule)
        if self.clip_x0 or self.project is not None:
            x_0 = found.x_0.clamp(-1, 1) if self.clip_x0 else found.x_0
            x_0 = x_0 if self.project is None else self.project(x_0)
            found = Denoised(x_0=x_0, eps=eps_from_x0(x_0, x_t, steps, schedule=self.schedule))
        return replace(found, variance_fraction=fraction)


class Sampler(Protocol):
    """Walk from noise x_T (b, ...) along `timesteps` (falling) to x_0 (b, ...), or to x_t at `t_end` where that is not -1."""

    def __call__(
        self,
        denoise: Denoise,
        x_T: Float[Tensor, "b ..."],
        timesteps: Int[np.ndarray, " steps"],
        *,
        process: Process,
        noise: Noise,
        on_step: OnStep | None = None,
        t_end: int = -1,
    ) -> Float[Tensor, "b ..."]: ...


def timestep_array(num_timesteps: int, num_steps: int, spacing: Spacing = "trailing") -> Int[np.ndarray, " steps"]:
    """`num_steps` falling timesteps within [0, num_timesteps) (Lin et al. 2024, table 2).

    "trailing" starts at T-1, where training saw (nearly) pure noise; "leading" ends at 0; "linspace" does both.
    Raises ValueError unless 1 <= num_steps <= num_timesteps.
    """
    if not 1 <= num_steps <= num_timesteps:
        raise ValueError(f"num_steps={num_steps} must lie between 1 and the {num_timesteps} timesteps of training")
    if spacing == "trailing":
        # Integers, since arange with a float step may yield one entry too many.
        return np.array([num_timesteps * (num_steps - i) // num_steps - 1 for i in range(num_steps)])
    if spacing == "leading":
        return np.arange(num_steps)[::-1] * (num_timesteps // num_steps)
    if spacing == "linspace":
        return np.linspace(num_timesteps - 1, 0, num_steps).round().astype(np.int64)
    raise ValueError(f"spacing={spacing!r}; use one of {SPACINGS}")


def steps_of(
    timesteps: Int[np.ndarray, " steps"], on_step: OnStep | None, t_end: int = -1
) -> Iterator[tuple[int, int]]:
    """The pairs (t, next entry of the array), the last going to t_end, by default clean data; reports progress after each."""
    return reported(step_pairs(timesteps, t_end), on_step)


def step_pairs(timesteps: Int[np.ndarray, " steps"], t_end: int = -1) -> list[tuple[int, int]]:
    """The pairs (t, next entry of the array), the last going to t_end. Raises ValueError where the array does not fall."""
    falling = [*map(int, timesteps), t_end]
    for t, t_prev in pairwise(falling):
        if t_prev >= t:
            raise ValueError(f"timesteps must fall, found {t} followed by {t_prev}")
    return list(pairwise(falling))


def reported(pairs: Sequence[tuple[int, int]], on_step: OnStep | None) -> Iterator[tuple[int, int]]:
    """Each of the pairs in turn, progress reported when the caller comes back for the next."""
    for done, pair in enumerate(pairs, start=1):
        yield pair
        if on_step is not None:
            on_step(done, len(pairs))
