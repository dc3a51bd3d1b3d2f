"""Samplers: each a function that walks a timestep array from noise to data. `build_sampler` looks them up by name.

`ddim_inversion` walks the other way, from data to noise, and so is no entry of the table.
"""

from __future__ import annotations

from functools import partial

from shapediff.diffusion.samplers.common import OnStep, Process, Sampler, timestep_array
from shapediff.diffusion.samplers.ddim import sample_ddim
from shapediff.diffusion.samplers.ddim_inversion import ddim_inversion
from shapediff.diffusion.samplers.ddpm import sample_ddpm
from shapediff.diffusion.samplers.dpm_solver import sample_dpm_solver
from shapediff.diffusion.samplers.heun import sample_heun

SAMPLERS: dict[str, Sampler] = {
    "ddim": sample_ddim,
    "ddpm": sample_ddpm,
    "dpm_solver": sample_dpm_solver,
    "heun": sample_heun,
}


def build_sampler(name: str, *, eta: float = 0.0) -> Sampler:
    """The sampler of that name; `eta` in [0, 1] is the share of fresh noise in each DDIM step and belongs to DDIM alone.

    Raises ValueError for an unknown name, or an eta that the sampler does not have.
    """
    if name not in SAMPLERS:
        raise ValueError(f"sampler {name!r} is unknown; use one of {', '.join(SAMPLERS)}")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta={eta} must lie in [0, 1]")
    if name == "ddim":
        return partial(sample_ddim, eta=eta)
    if eta != 0:
        raise ValueError(f"eta={eta} belongs to the sampler ddim; {name} has none")
    return SAMPLERS[name]


__all__ = [
    "SAMPLERS",
    "OnStep",
    "Process",
    "Sampler",
    "build_sampler",
    "ddim_inversion",
    "sample_ddim",
    "sample_ddpm",
    "sample_dpm_solver",
    "sample_heun",
    "timestep_array",
]
