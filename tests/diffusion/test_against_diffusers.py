"""The same walk through diffusers, another implementation: equal where it means the same, shown where it does not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from diffusers.guiders.guider_utils import rescale_noise_cfg

from shapediff.diffusion.guidance import Guidance, guided
from shapediff.diffusion.random import NoiseSource
from shapediff.diffusion.samplers import Process, sample_ddim, sample_ddpm, sample_dpm_solver, timestep_array
from shapediff.diffusion.schedule import NoiseScheduleConfig
from tests.diffusion.closed_forms import Denoise, flow, gaussian, two_clusters

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SCHEDULE = NoiseScheduleConfig("linear").build()
SEED, NUM = 7, 256
PREDICTION_TYPES = {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}
# Their tables are float32 products of a thousand factors; x_0 is of size 1.
TOLERANCE = 1e-5


def _denoiser(prediction: str = "v") -> Denoise:
    best = two_clusters(std=0.2).denoiser(SCHEDULE, prediction)
    return lambda x_t, t: best(x_t.double().reshape(-1, 2), t.expand(x_t.numel() // 2)).reshape(x_t.shape).float()


def _noise() -> torch.Tensor:
    """One sample of many numbers, float32, (1, NUM)."""
    return NoiseSource([99]).normal(NUM)


def _theirs(scheduler: Any, denoise: Denoise, x_T: torch.Tensor, **options: Any) -> torch.Tensor:
    x_t = x_T
    for t in scheduler.timesteps:
        x_t = scheduler.step(denoise(x_t, t[None]), t, x_t, **options).prev_sample
    return x_t


def _ddim(num_steps: int, *, spacing: str = "trailing", prediction: str = "v", clip: bool = False) -> DDIMScheduler:
    scheduler = DDIMScheduler(
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        prediction_type=PREDICTION_TYPES[prediction],
        clip_sample=clip,
        timestep_spacing=spacing,
    )
    scheduler.set_timesteps(num_steps)
    return scheduler


@pytest.mark.parametrize(
    ("name", "theirs"), [("linear", "linear"), ("scaled_linear", "scaled_linear"), ("cosine", "squaredcos_cap_v2")]
)
def test_tables_agree(name: str, theirs: str) -> None:
    start, end = {"linear": (1e-4, 0.02), "scaled_linear": (0.00085, 0.012), "cosine": (1e-4, 0.02)}[name]
    found = DDPMScheduler(beta_schedule=theirs, beta_start=start, beta_end=end).alphas_cumprod
    # float32 products of a thousand factors; cosine betas near 1 lose more.
    torch.testing.assert_close(NoiseScheduleConfig(name).build().alphas_cumprod.float(), found, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["linear", "scaled_linear"])
def test_zero_terminal_snr_agrees(name: str) -> None:
    start, end = {"linear": (1e-4, 0.02), "scaled_linear": (0.00085, 0.012)}[name]
    found = DDIMScheduler(
        beta_schedule=name, beta_start=start, beta_end=end, rescale_betas_zero_snr=True
    ).alphas_cumprod
    ours = NoiseScheduleConfig(name, zero_terminal_snr=True).build().alphas_cumprod
    torch.testing.assert_close(ours.float(), found, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
@pytest.mark.parametrize("num_steps", [10, 50])
@pytest.mark.parametrize("eta", [0.0, 0.6])
@pytest.mark.parametrize("clip", [False, True])
def test_ddim_agrees_where_the_steps_divide_the_timesteps(
    prediction: str, num_steps: int, eta: float, clip: bool
) -> None:
    scheduler, denoise = _ddim(num_steps, prediction=prediction, clip=clip), _denoiser(prediction)
    theirs = _theirs(
        scheduler, denoise, _noise(), eta=eta, use_clipped_model_output=clip,
        generator=torch.Generator().manual_seed(SEED),
    )  # fmt: skip
    ours = sample_ddim(
        denoise,
        _noise(),
        timestep_array(1000, num_steps),
        process=Process(SCHEDULE, prediction, clip_x0=clip),
        noise=NoiseSource([SEED]),
        eta=eta,
    )
    # epsilon divides by sqrt(abar_T) = 0.006, at the start: rounding there grows a little.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE if prediction != "epsilon" else 1e-4)


@pytest.mark.parametrize("num_steps", [10, 37, 200])
@pytest.mark.parametrize("clip", [False, True])
def test_ddpm_agrees(num_steps: int, clip: bool) -> None:
    scheduler = DDPMScheduler(
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        prediction_type="v_prediction",
        variance_type="fixed_small",
        clip_sample=clip,
    )
    # Their betas are differences of float32 products: of the beta of neighbouring timesteps three digits are left. The walk
    # is what is compared here, so they get our table; it agrees with theirs, as tested above.
    scheduler.alphas_cumprod = SCHEDULE.alphas_cumprod
    timesteps = timestep_array(1000, num_steps)
    scheduler.set_timesteps(timesteps=timesteps.tolist())
    theirs = _theirs(scheduler, _denoiser(), _noise(), generator=torch.Generator().manual_seed(SEED))
    process, noise = Process(SCHEDULE, "v", clip_x0=clip), NoiseSource([SEED])
    ours = sample_ddpm(_denoiser(), _noise(), timesteps, process=process, noise=noise)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("num_steps", [10, 37, 200])
@pytest.mark.parametrize("clip", [False, True])
def test_ddpm_with_learned_variance_agrees(num_steps: int, clip: bool) -> None:
    """On arrays that end at t = 0: where the last step comes from higher up, theirs adds noise to x_0 itself."""
    scheduler = DDPMScheduler(
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        prediction_type="v_prediction",
        variance_type="learned_range",
        clip_sample=clip,
    )
    scheduler.alphas_cumprod = SCHEDULE.alphas_cumprod  # as above
    timesteps, denoise = timestep_array(1000, num_steps, "leading"), _denoiser()
    scheduler.set_timesteps(timesteps=timesteps.tolist())

    def doubled(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.cat([denoise(x_t, t), torch.cos(3 * x_t) * (1 + t.reshape(-1, 1) / 1000)], 1)

    theirs = _theirs(scheduler, doubled, _noise(), generator=torch.Generator().manual_seed(SEED))
    process, noise = Process(SCHEDULE, "v", clip_x0=clip, variance="learned"), NoiseSource([SEED])
    ours = sample_ddpm(doubled, _noise(), timesteps, process=process, noise=noise)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("spacing", ["trailing", "leading"])
@pytest.mark.parametrize("num_steps", [1, 2, 10, 20, 50])
def test_dpm_solver_agrees(num_steps: int, spacing: str) -> None:
    scheduler = DPMSolverMultistepScheduler(
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        prediction_type="v_prediction",
        algorithm_type="dpmsolver++",
        solver_order=2,
        solver_type="midpoint",
        final_sigmas_type="zero",
    )
    timesteps = timestep_array(1000, num_steps, spacing)
    # "leading" ends at t = 0, in the long step of log SNR where ours is of first order: leave that step out of both.
    timesteps = timesteps[:-1] if spacing == "leading" and num_steps > 1 else timesteps
    scheduler.set_timesteps(timesteps=timesteps.tolist())
    theirs = _theirs(scheduler, _denoiser(), _noise())
    process = Process(SCHEDULE, "v", clip_x0=False)
    ours = sample_dpm_solver(_denoiser(), _noise(), timesteps, process=process, noise=NoiseSource([SEED]))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("num_steps", "spacing"), [(7, "trailing"), (30, "trailing"), (10, "linspace")])
def test_ddim_differs_where_theirs_steps_to_a_timestep_that_is_not_the_next(num_steps: int, spacing: str) -> None:
    """They go from t to t - T // N; the denoiser is then asked at the next entry of the array, another level of noise.

    Shown on Gaussian data, where the result of the array is a product of known factors: ours is that product. Theirs is not,
    and what it comes to is the product with t - T // N in place of the next entry.
    """
    mean, std = 0.2, 0.3
    data = gaussian(mean, std)
    scheduler = _ddim(num_steps, spacing=spacing)
    timesteps = scheduler.timesteps.numpy()
    denoise = data.denoiser(SCHEDULE)
    x_T = _noise().double()

    def product(t_prev_of: list[int]) -> torch.Tensor:
        x_t = x_T
        for t, t_prev in zip(timesteps.tolist(), t_prev_of, strict=True):
            abar, abar_prev = SCHEDULE.abar(torch.tensor([t, t_prev]))
            x_0 = data.x_0_hat(x_t.reshape(-1, 1), abar.reshape(1, 1)).reshape(x_t.shape)
            x_t = abar_prev.sqrt() * x_0 + (1 - abar_prev).sqrt() / (1 - abar).sqrt() * (x_t - abar.sqrt() * x_0)
        return x_t

    ours = sample_ddim(
        denoise, x_T, timesteps, process=Process(SCHEDULE, "v", clip_x0=False), noise=NoiseSource([SEED])
    )
    theirs = _theirs(scheduler, denoise, x_T)
    next_entries = [*timesteps[1:].tolist(), -1]
    their_entries = [max(t - 1000 // num_steps, -1) for t in timesteps.tolist()]
    assert their_entries != next_entries
    torch.testing.assert_close(ours, product(next_entries), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(theirs, product(their_entries), rtol=0, atol=TOLERANCE)
    assert (ours - theirs).abs().max() > 100 * TOLERANCE


def test_ddim_comes_to_the_flow_in_many_steps_and_theirs_does_not() -> None:
    """At 600 steps T // N is 1: theirs goes down 600 timesteps of 1000, to the next entries' names but not their noise.

    Gaussian data of std 0.3: theirs comes out at 0.53 where the flow takes this noise to 0.32. In few steps the difference is
    smaller than DDIM's own error and may even lie on its other side, which is chance.
    """
    mean, std = 0.2, 0.3
    x_T, denoise = _noise().double(), gaussian(mean, std).denoiser(SCHEDULE)
    process = Process(SCHEDULE, "v", clip_x0=False)
    exact = flow(x_T, 999, -1, mean=mean, std=std, schedule=SCHEDULE)
    # Measured: ours 0.133, 0.0148, 0.0081, falling as 1 / steps; theirs 0.12, 0.10, 0.55.
    for num_steps, error_of_ours, least_error_of_theirs in ((30, 0.15, 0.1), (300, 0.02, 0.08), (600, 0.01, 0.5)):
        timesteps = timestep_array(1000, num_steps)
        ours = sample_ddim(denoise, x_T, timesteps, process=process, noise=NoiseSource([SEED]))
        theirs = _theirs(_ddim(num_steps), denoise, x_T)
        assert (ours - exact).abs().max() < error_of_ours
        assert (theirs - exact).abs().max() > least_error_of_theirs


def test_rescaled_guidance_agrees() -> None:
    conditional, unconditional = torch.randn(2, 3, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    denoise = guided(
        lambda x_t, t, label: torch.where((label == 9)[:, None, None, None], unconditional, conditional),
        torch.zeros(3, dtype=torch.int64),
        null_label=9,
        guidance=Guidance(scale=5.0, rescale=0.7, split_batch=True),
        schedule=SCHEDULE,
    )
    ours = denoise(torch.zeros(3, 4, 5, 5), torch.full((3,), 500))
    plain = unconditional + 5.0 * (conditional - unconditional)
    torch.testing.assert_close(ours, rescale_noise_cfg(plain, conditional, guidance_rescale=0.7), rtol=1e-5, atol=1e-5)


def test_timestep_arrays_agree_up_to_rounding() -> None:
    """They round where ours, in whole numbers, may lie one beside. One step of their "linspace" is t = 0, which no one wants."""
    for spacing in ("trailing", "linspace"):
        for num_steps in (2, 10, 37, 50, 999):
            theirs, ours = _ddim(num_steps, spacing=spacing).timesteps.numpy(), timestep_array(1000, num_steps, spacing)
            assert len(theirs) == len(ours)
            assert np.abs(theirs - ours).max() <= 1
