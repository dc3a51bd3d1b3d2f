"""Voxel diffusion: a denoiser trained on the grid itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from shapediff.diffusion.bound import prior_bits, sampled_bits
from shapediff.diffusion.editing import Edit, sample_edited
from shapediff.diffusion.gaussian import PREDICTIONS, Prediction, denoised, q_sample, training_target
from shapediff.diffusion.guidance import Denoise, guided
from shapediff.diffusion.loss import (
    VLB_WEIGHT,
    WEIGHTINGS,
    Weighting,
    check_class_dropout,
    drop_labels,
    loss_weight,
    squared_error,
)
from shapediff.diffusion.random import NoiseSource
from shapediff.diffusion.samplers import OnStep, Process, build_sampler, ddim_inversion, timestep_array
from shapediff.diffusion.schedule import NoiseScheduleConfig
from shapediff.diffusion.variance import VARIANCES, Variance, split_output
from shapediff.errors import ConfigError
from shapediff.methods.base import STEP_SETTINGS, Batch, LossOutput, Method, MethodConfig, SampleConfig
from shapediff.models import DenoiserConfig, ModelConfig

BOUND_DRAWS = 8
"""Timesteps at which the bound of a shape is measured."""


@dataclass(frozen=True)
class VoxelDiffusionConfig(MethodConfig):
    """L = E || target - net(x_t, t, y) ||^2, y replaced by the null label with probability `class_dropout`.

    `variance` "learned" doubles the denoiser's output channels to learn the variance of a DDPM step beside its mean; other
    samplers have no use for it.
    """

    schedule: NoiseScheduleConfig = field(default_factory=NoiseScheduleConfig)
    prediction: Prediction = "epsilon"
    weighting: Weighting = "uniform"
    min_snr_gamma: float = 5.0
    class_dropout: float = 0.1
    variance: Variance = "fixed"

    def __post_init__(self) -> None:
        if self.prediction not in PREDICTIONS:
            raise ValueError(f"prediction {self.prediction!r} is unknown; use one of {', '.join(PREDICTIONS)}")
        if self.weighting not in WEIGHTINGS:
            raise ValueError(f"weighting {self.weighting!r} is unknown; use one of {', '.join(WEIGHTINGS)}")
        if self.variance not in VARIANCES:
            raise ValueError(f"variance {self.variance!r} is unknown; use one of {', '.join(VARIANCES)}")
        if self.variance == "learned" and self.schedule.num_timesteps < 2:
            raise ConfigError(
                "variance=learned needs schedule.num_timesteps of at least 2: one step has nothing to learn"
            )
        check_class_dropout(self.class_dropout)
        if self.min_snr_gamma <= 0:
            raise ValueError(f"min_snr_gamma={self.min_snr_gamma} must be positive")
        if self.schedule.zero_terminal_snr:
            self._check_pure_noise()

    def _check_pure_noise(self) -> None:
        """What can be learnt at the last timestep, where x_t is eps itself and says nothing of x_0."""
        if self.prediction == "epsilon":
            raise ConfigError(
                "prediction=epsilon does not go with schedule.zero_terminal_snr=true: at the last timestep x_t is eps itself, "
                "and x_0 cannot be had from it; use prediction=v or x0, or zero_terminal_snr=false"
            )
        if self.weighting == "min_snr":
            raise ConfigError(
                "weighting=min_snr does not go with schedule.zero_terminal_snr=true: it gives the last timestep, the first one "
                "of sampling, weight 0, so it would never be learnt; use weighting=uniform, or zero_terminal_snr=false"
            )

    def build(self, *, resolution: int, num_classes: int) -> VoxelDiffusion:
        return VoxelDiffusion(self, resolution=resolution, num_classes=num_classes)


class VoxelDiffusion(Method):
    """One network, "denoiser", which sees the Morton-ordered signal itself, in [-1, 1] unless `clip_x0` is false."""

    sampling_settings = STEP_SETTINGS | {"guidance_scale"}
    has_likelihood = True

    def __init__(
        self, config: VoxelDiffusionConfig, *, resolution: int, num_classes: int, clip_x0: bool = True
    ) -> None:
        self.config = config
        self.resolution = resolution
        self.num_classes = num_classes
        self.schedule = config.schedule.build()
        self.num_timesteps = self.schedule.num_timesteps
        self._clip_x0 = clip_x0
        self._learns_variance = config.variance == "learned"

    def build_networks(self, model: ModelConfig) -> dict[str, nn.Module]:
        if not isinstance(model, DenoiserConfig):
            raise ConfigError("diffusion trains a denoiser: model=unet3d or model=dit3d")
        out_channels = 2 if self._learns_variance else 1
        denoiser = model.build(resolution=self.resolution, num_classes=self.num_classes, out_channels=out_channels)
        return {"denoiser": denoiser}

    def loss(self, networks: Mapping[str, nn.Module], batch: Batch, seeds: Sequence[int]) -> LossOutput:
        device = batch["voxels"].device
        return self.loss_of(networks, batch["voxels"], batch["label"], NoiseSource(seeds, device, draw_on=device))

    def loss_of(self, networks: Mapping[str, nn.Module], x_0: Tensor, label: Tensor, noise: NoiseSource) -> LossOutput:
        """`loss` of x_0 (b, n), whatever it is, with draws from `noise`."""
        config, labels = self.config, label
        t = noise.integers(self.schedule.num_timesteps)
        label = drop_labels(labels, noise.uniform(), null_label=self.num_classes, rate=config.class_dropout)
        eps = noise.normal(*x_0.shape[1:])
        x_t = q_sample(x_0, eps, t, schedule=self.schedule)
        output, fraction = self._output(networks, x_t, t, label)
        target = training_target(x_0, eps, t, prediction=config.prediction, schedule=self.schedule)
        error = squared_error(output, target)
        weight = loss_weight(
            t,
            schedule=self.schedule,
            prediction=config.prediction,
            weighting=config.weighting,
            gamma=config.min_snr_gamma,
        )
        per_sample = weight * error
        if fraction is not None:
            per_sample = per_sample + VLB_WEIGHT * self._bound(output, fraction, x_0, x_t, t)
        return LossOutput(
            loss=per_sample.mean(),
            per_sample=per_sample.detach(),
            error=error.detach(),
            t=t,
            label=labels,
        )

    def _output(
        self, networks: Mapping[str, nn.Module], x_t: Tensor, t: Tensor, label: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """What the denoiser says of x_t, and of the variance where it learns that."""
        output = networks["denoiser"](x_t, t, label)
        return split_output(output.float()) if self._learns_variance else (output, None)

    def _bound(self, output: Tensor, fraction: Tensor, x_0: Tensor, x_t: Tensor, t: Tensor) -> Float[Tensor, " b"]:
        """L_vlb, from which the variance learns and the mean does not (Nichol and Dhariwal 2021, sec. 3.1).

        As in their code, and in bits as there, x_0_hat is not clamped here, so that the variance covers the whole error.
        """
        prediction, schedule = self.config.prediction, self.schedule
        x_0_hat = denoised(output.detach(), x_t, t, prediction=prediction, schedule=schedule).x_0
        return sampled_bits(x_0, x_0_hat, fraction, t, schedule=schedule)

    def bits_per_voxel(
        self,
        networks: Mapping[str, nn.Module],
        voxels: Float[Tensor, "b voxels"],
        label: Int[Tensor, " b"],
        seeds: Sequence[int],
    ) -> Float[Tensor, " b"]:
        """The variational bound of the whole chain, unbiased: its terms at one random timestep of each of `BOUND_DRAWS` parts."""
        schedule, total = self.schedule, self.num_timesteps
        x_0, noise = torch.where(voxels > 0, 1.0, -1.0), NoiseSource(seeds, voxels.device)
        bits = prior_bits(x_0, total - 1, schedule=schedule)
        for part in range(BOUND_DRAWS):
            t = ((part + noise.uniform()) * total / BOUND_DRAWS).long().clamp(max=total - 1)
            x_t = q_sample(x_0, noise.normal(*x_0.shape[1:]), t, schedule=schedule)
            output, fraction = self._output(networks, x_t, t, label)
            x_0_hat = denoised(output, x_t, t, prediction=self.config.prediction, schedule=schedule).x_0.clamp(-1, 1)
            bits = bits + sampled_bits(x_0, x_0_hat, fraction, t, schedule=schedule) / BOUND_DRAWS
        return bits

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
        noise = edit.noise(seeds, label.device)
        x_0 = sample_edited(
            build_sampler(config.sampler, eta=config.eta),
            self._guided(networks, label, config),
            noise.normal(self.resolution**3) if edit.x_T is None else edit.x_T,
            timestep_array(self.schedule.num_timesteps, config.num_steps, config.spacing),
            process=self._process,
            noise=noise,
            edit=edit,
            on_step=on_step,
        )
        return x_0.clamp(-1, 1) if self._clip_x0 else x_0

    def invert(
        self,
        networks: Mapping[str, nn.Module],
        label: Int[Tensor, " b"] | Float[Tensor, "b labels"],
        voxels: Float[Tensor, "b voxels"],
        *,
        config: SampleConfig,
        on_step: OnStep | None = None,
    ) -> Float[Tensor, "b voxels"]:
        return ddim_inversion(
            self._guided(networks, label, config),
            voxels,
            timestep_array(self.schedule.num_timesteps, config.num_steps, config.spacing),
            process=self._process,
            on_step=on_step,
        )

    def _guided(self, networks: Mapping[str, nn.Module], label: Tensor, config: SampleConfig) -> Denoise:
        denoiser, guidance = networks["denoiser"], config.guidance
        return guided(denoiser, label, null_label=self.num_classes, guidance=guidance, schedule=self.schedule)

    @property
    def _process(self) -> Process:
        return Process(self.schedule, self.config.prediction, clip_x0=self._clip_x0, variance=self.config.variance)
