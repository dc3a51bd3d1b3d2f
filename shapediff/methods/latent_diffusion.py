"""Latent diffusion (Rombach et al. 2022): a denoiser of an autoencoder's latents, which are decoded to shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from shapediff.diffusion.editing import Edit
from shapediff.diffusion.random import NoiseSource
from shapediff.diffusion.samplers import OnStep
from shapediff.diffusion.schedule import NoiseScheduleConfig
from shapediff.errors import ConfigError
from shapediff.methods.base import Batch, LossOutput, Method, MethodConfig, SampleConfig
from shapediff.methods.shape_vae import reconstruction, signal_of, vae_in
from shapediff.methods.voxel_diffusion import VoxelDiffusion, VoxelDiffusionConfig
from shapediff.models import DenoiserConfig, ModelConfig, VAE3DConfig
from shapediff.models.vae3d import Gaussian


def _v_on_cosine() -> VoxelDiffusionConfig:
    return VoxelDiffusionConfig(schedule=NoiseScheduleConfig(name="cosine"), prediction="v")


@dataclass(frozen=True)
class LatentDiffusionConfig(MethodConfig):
    """Diffusion, as `diffusion` says, of latents scaled to mean 0 and standard deviation 1.

    `codec` is the export, or the run, of a ShapeVAE: training takes from it the weights, the sizes `autoencoder` and, over
    training shapes, the `latent_mean` and `latent_std` of each channel, and leaves all of them in the export.
    """

    codec: str | None = None
    diffusion: VoxelDiffusionConfig = field(default_factory=_v_on_cosine)
    autoencoder: VAE3DConfig = field(default_factory=VAE3DConfig)
    latent_mean: tuple[float, ...] = ()
    latent_std: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        sizes = {len(self.latent_mean), len(self.latent_std)}
        if sizes not in ({0}, {self.autoencoder.latent_channels}) or min(self.latent_std, default=1.0) <= 0:
            raise ValueError(
                f"latent_mean and latent_std, which must be positive, are one a channel of latent_channels="
                f"{self.autoencoder.latent_channels}; leave them out, training measures them"
            )

    takes: ClassVar[str] = (
        "method.codec=RUN, the run or the export of an autoencoder; train one with experiment=shape_vae"
    )

    @property
    def taken_from(self) -> str | None:
        return self.codec

    def with_taken(
        self, method: MethodConfig, model: ModelConfig, networks: Mapping[str, nn.Module], batches: Iterable[Batch]
    ) -> LatentDiffusionConfig:
        if isinstance(method, LatentDiffusionConfig):
            return replace(
                self,
                codec=None,
                autoencoder=method.autoencoder,
                latent_mean=method.latent_mean,
                latent_std=method.latent_std,
            )
        if not isinstance(model, VAE3DConfig):
            raise ConfigError("it is no autoencoder; train one with method=shape_vae model=vae3d")
        vae = vae_in(networks)
        with torch.no_grad():
            posteriors = [vae.encode(batch["voxels"]) for batch in batches]
        mean, log_variance = (
            rearrange(torch.cat(parts).double(), "b (cells c) -> (b cells) c", c=model.latent_channels)
            for parts in zip(*posteriors, strict=True)
        )
        # Of the draws that are diffused: a channel whose means say nothing has the variance of its draws all the same.
        std = (mean.var(0) + log_variance.exp().mean(0)).sqrt()
        return replace(
            self, codec=None, autoencoder=model, latent_mean=_rounded(mean.mean(0)), latent_std=_rounded(std)
        )

    def build(self, *, resolution: int, num_classes: int) -> LatentDiffusion:
        return LatentDiffusion(self, resolution=resolution, num_classes=num_classes)


class LatentDiffusion(Method):
    """Two networks: the "denoiser", which is trained, and the "vae", which is not."""

    has_autoencoder = True
    encodes = True
    frozen = ("vae",)
    sampling_settings = VoxelDiffusion.sampling_settings

    def __init__(self, config: LatentDiffusionConfig, *, resolution: int, num_classes: int) -> None:
        self.config = config
        self.resolution = resolution
        self.num_classes = num_classes
        side = config.autoencoder.latent_resolution(resolution)
        self.diffusion = VoxelDiffusion(config.diffusion, resolution=side, num_classes=num_classes, clip_x0=False)
        self.num_timesteps = self.diffusion.num_timesteps

    def build_networks(self, model: ModelConfig) -> dict[str, nn.Module]:
        patch = self.config.autoencoder.latent_patch
        if isinstance(model, DenoiserConfig) and model.patch_size != patch:
            raise ConfigError(
                f"model.patch_size={model.patch_size} does not fit latents of {patch**3} channels a cell; use {patch}"
            )
        vae = self.config.autoencoder.build(resolution=self.resolution, num_classes=0)
        return {**self.diffusion.build_networks(model), "vae": vae}

    def taken_weights(self, networks: Mapping[str, nn.Module]) -> dict[str, dict[str, Tensor]]:
        """Without what the autoencoder says of classes: it may have others, and diffusion has no use for it."""
        state = vae_in(networks).state_dict()
        return {"vae": {**state, "prior": state["prior"][-1:]}}

    def resolution_of(self, network: str) -> int:
        return self.resolution if network == "vae" else self.diffusion.resolution

    def loss(self, networks: Mapping[str, nn.Module], batch: Batch, seeds: Sequence[int]) -> LossOutput:
        """That of diffusion on z = mu + sigma eps, drawn anew each time a shape is seen."""
        latents = batch["latents"] if "latents" in batch else self.encode(networks, batch["voxels"])
        posterior = Gaussian(*latents.chunk(2, 1))
        device = latents.device
        noise = NoiseSource(seeds, device, draw_on=device)
        z = self._scaled(posterior.draw(noise.normal(*posterior.mean.shape[1:])))
        return self.diffusion.loss_of(networks, z, batch["label"], noise)

    def encode(self, networks: Mapping[str, nn.Module], voxels: Float[Tensor, "b voxels"]) -> Float[Tensor, "b n"]:
        """Mean and log variance of q(z | x), one after the other."""
        with torch.no_grad():
            return torch.cat(vae_in(networks).encode(voxels), 1)

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
        """An edit is one of latents, and then, to the voxel, of the shapes: see `_of_latents` and `_of_shapes`."""
        edit = edit or Edit()
        if edit.strength == 0:
            return edit.project(edit.given.expand(len(seeds), -1))
        inner = self._of_latents(edit, networks)
        z = self.diffusion.sample(networks, label, seeds, config=config, edit=inner, on_step=on_step)
        return _of_shapes(edit)(signal_of(vae_in(networks).decode(self._unscaled(z))))

    def reconstruct(
        self, networks: Mapping[str, nn.Module], voxels: Float[Tensor, "b voxels"]
    ) -> Float[Tensor, "b voxels"]:
        """The decoded mean of q(z | x)."""
        return reconstruction(networks, voxels)

    def invert(
        self,
        networks: Mapping[str, nn.Module],
        label: Int[Tensor, " b"] | Float[Tensor, "b labels"],
        voxels: Float[Tensor, "b voxels"],
        *,
        config: SampleConfig,
        on_step: OnStep | None = None,
    ) -> Float[Tensor, "b latents"]:
        z = self._scaled(vae_in(networks).encode(voxels).mean)
        return self.diffusion.invert(networks, label, z, config=config, on_step=on_step)

    def _of_latents(self, edit: Edit, networks: Mapping[str, nn.Module]) -> Edit:
        """The edit of latents: what is given is encoded, and a latent cell is kept where all of its voxels are."""
        x_0 = None if edit.x_0 is None else self._scaled(vae_in(networks).encode(edit.x_0[None]).mean)[0]
        keep = None if edit.keep is None else self._kept_latents(edit.keep)
        return replace(edit, x_0=x_0, keep=keep, mirror=None)

    def _kept_latents(self, keep: Bool[Tensor, " voxels"]) -> Bool[Tensor, " latents"]:
        # A cell's voxels are neighbours in Morton order.
        cells = keep.view(-1, self.config.autoencoder.downsampling**3).all(1)
        return cells.repeat_interleave(self.config.autoencoder.latent_channels)

    def _scaled(self, z: Float[Tensor, "b latents"]) -> Float[Tensor, "b latents"]:
        mean, std = self._statistics(z)
        return (z - mean) / std

    def _unscaled(self, z: Float[Tensor, "b latents"]) -> Float[Tensor, "b latents"]:
        mean, std = self._statistics(z)
        return z * std + mean

    def _statistics(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The mean and standard deviation of each latent."""
        channels = self.config.autoencoder.latent_channels
        mean, std = self.config.latent_mean or (0.0,) * channels, self.config.latent_std or (1.0,) * channels
        cells = z.shape[1] // channels
        return torch.tensor(mean, device=z.device).repeat(cells), torch.tensor(std, device=z.device).repeat(cells)


def _rounded(values: Tensor) -> tuple[float, ...]:
    """To four digits: what ranks compute differs in the last ones."""
    return tuple(float(f"{value:.4g}") for value in values.tolist())


def _of_shapes(edit: Edit) -> Callable[[Tensor], Tensor]:
    """What an edit still asks of decoded shapes: one half for both where they are to be symmetric, and kept voxels as given.

    The mean of both halves, which voxel diffusion takes at every step, would blur what decoding made of unlike halves.
    """

    def apply(x: Tensor) -> Tensor:
        if edit.mirror is not None:
            x = x[:, torch.minimum(edit.mirror, torch.arange(x.shape[1], device=x.device))]
        return x if edit.keep is None else torch.where(edit.keep, edit.given, x)

    return apply
