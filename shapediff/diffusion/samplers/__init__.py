"""Samplers: each a function that walks a timestep array from noise to data. `build_sampler` looks them up by name."""

from __future__ import annotations

from functools import partial

from shapediff.diffusion.samplers.common import OnStep, Process, Sampler, timestep_array
from shapediff.diffusion.samplers.ddim import sample_ddim
from shapediff.diffusion.samplers.ddpm import sample_ddpm

SAMPLERS = ("ddim", "ddpm")


def build_sampler(name: str, *, eta: float = 0.0) -> Sampler:
    """The sampler of that name; `eta` in [0, 1] is the share of fresh noise in each DDIM step and belongs to DDIM alone.

    Raises ValueError for an unknown name, or an eta that the sampler does not have.
    """
    if name not in SAMPLERS:
        raise ValueError(f"sampler {name!r} is unknown; use one of {', '.join(SAMPLERS)}")
    if name == "ddim":
        return partial(sample_ddim, eta=eta)
    if eta != 0:
        raise ValueError(f"eta={eta} belongs to the sampler ddim; {name} has none")
    return sample_ddpm


__all__ = ["SAMPLERS", "OnStep", "Process", "Sampler", "build_sampler", "sample_ddim", "sample_ddpm", "timestep_array"]
