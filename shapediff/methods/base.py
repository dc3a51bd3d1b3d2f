"""What every method is: networks to build, a loss to train them, a recipe to sample from them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NotRequired, TypedDict

from jaxtyping import Float, Int
from torch import Tensor, nn

from shapediff.diffusion.editing import Edit
from shapediff.diffusion.guidance import Guidance
from shapediff.diffusion.samplers import OnStep, build_sampler
from shapediff.diffusion.samplers.common import SPACINGS, Spacing
from shapediff.errors import ConfigError
from shapediff.models import ModelConfig

STEP_SETTINGS = frozenset(
    {"sampler", "num_steps", "guidance_interval", "guidance_rescale", "split_batch", "eta", "spacing"}
)
"""Fields of SampleConfig that steer a walk from noise to data."""
TOKEN_SETTINGS = frozenset({"temperature", "top_k", "top_p"})
"""Fields of SampleConfig that steer the choice of tokens."""
COMMON_SETTINGS = frozenset({"draws"})
"""Fields of SampleConfig that say what becomes of shapes, whatever made them."""
_OWNERS = {
    "diffusion models": STEP_SETTINGS,
    "autoregressive models": TOKEN_SETTINGS,
    "models that can be guided": frozenset({"guidance_scale"}),
}
_OPTIONS = {"num_steps": "--steps", "guidance_scale": "--guidance"}
"""What the commands call a field, where that is not its name."""


class Batch(TypedDict):
    """A batch of training: `voxels` (b, R^3) float32 in [-1, 1], Morton order, positive inside; `label` (b,) int64.

    Where the run caches them, `latents` (b, n), what `Method.encode` gave of the voxels, stand in their place.
    """

    voxels: Float[Tensor, "b voxels"]
    latents: NotRequired[Float[Tensor, "b n"]]
    label: Int[Tensor, " b"]


@dataclass(frozen=True)
class LossOutput:
    """What the trainer minimises and what it reports.

    `loss` is the scalar to minimise, the mean of `per_sample` (b,), detached, each sample's own weighted loss;
    `error` (b,) is the unweighted error, `t` (b,) the timestep and `label` (b,) the class of each sample, before any label was
    dropped, for curves by timestep and by class. `metrics` are other numbers (n,) by name, as many as there are, detached: their
    mean over all steps since the last line of metrics is reported beside the loss.
    """

    loss: Float[Tensor, ""]
    per_sample: Float[Tensor, " b"]
    error: Float[Tensor, " b"]
    t: Int[Tensor, " b"]
    label: Int[Tensor, " b"]
    metrics: Mapping[str, Float[Tensor, " n"]] = field(default_factory=dict)


Loss = Callable[[Mapping[str, nn.Module], Batch, Sequence[int]], LossOutput]


@dataclass(frozen=True)
class Turn:
    """One update within a step: `trains`, the networks that it changes (None: all), and the loss that it lowers.

    The other networks are constants in it: a gradient flows through them, and none to their weights.
    """

    loss: Loss
    trains: tuple[str, ...] | None = None


@dataclass(frozen=True)
class SampleConfig:
    """How to sample: the sampler and its number of steps, guidance, and the spacing of the timesteps.

    `guidance_scale` 1 is plain conditional sampling, 0 unconditional. `guidance_interval` (low, high) limits guidance to those
    noise levels sqrt(1 - abar), `guidance_rescale` in [0, 1] takes the contrast back that it adds, and `split_batch` halves the
    memory that it needs. `eta` in [0, 1] adds noise to DDIM. `temperature`, `top_k` (0: all) and `top_p` say how tokens are
    chosen by methods that have them. A method uses some of these (`Method.sampling_settings`) and refuses to be given the others.
    A shape that comes in several parts is drawn again, until one of `draws` is in one: else the one whose largest part is the
    largest share of it is kept.
    """

    sampler: str = "ddim"
    num_steps: int = 50
    guidance_scale: float = 3.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    guidance_rescale: float = 0.0
    split_batch: bool = False
    eta: float = 0.0
    spacing: Spacing = "trailing"
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    draws: int = 1

    def __post_init__(self) -> None:
        if self.spacing not in SPACINGS:
            raise ValueError(f"spacing {self.spacing!r} is unknown; use one of {', '.join(SPACINGS)}")
        if self.num_steps < 1:
            raise ValueError(f"num_steps={self.num_steps} must be at least 1")
        if not 0 <= self.temperature < float("inf") or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"temperature={self.temperature} must be 0 or more, top_k={self.top_k} not negative (0: all), "
                f"top_p={self.top_p} in (0, 1]"
            )
        if self.draws < 1:
            raise ValueError(f"draws={self.draws} must be at least 1")
        # These two check their own settings.
        build_sampler(self.sampler, eta=self.eta)
        _ = self.guidance

    def check_steps(self, num_timesteps: int) -> None:
        """Raise ConfigError where there are more steps than the `num_timesteps` of training."""
        if self.num_steps > num_timesteps:
            raise ConfigError(
                f"num_steps={self.num_steps} is more than the {num_timesteps} timesteps that the model is trained at; "
                f"use {num_timesteps} or fewer"
            )

    @property
    def guidance(self) -> Guidance:
        """The settings of guidance, together."""
        low, high = self.guidance_interval
        return Guidance(self.guidance_scale, (low, high), self.guidance_rescale, self.split_batch)


class Method(ABC):
    """The recipe of one generative family, bound to grids of `resolution` voxels a side and to `num_classes`."""

    num_timesteps: int
    """How many values `LossOutput.t` takes, from 0, and how many steps of sampling there are at most."""
    frozen: tuple[str, ...] = ()
    """The networks that are not trained: `MethodConfig.taken_from` says whose they are."""
    resolution: int

    has_autoencoder = False
    """Whether it can `reconstruct`."""
    encodes = False
    """Whether `loss` looks at shapes through `encode` alone, so that latents can be cached."""
    has_likelihood = False
    """Whether it can say `bits_per_voxel`."""
    sampling_settings: frozenset[str]
    """The fields of SampleConfig that `sample` uses; those of COMMON_SETTINGS are used by what calls it."""

    def check_sampling(self, config: SampleConfig, given: Collection[str] = ()) -> None:
        """Raise ConfigError for settings that this method cannot sample with, and for those `given` that would do nothing."""
        unused = sorted(set(given) - self.sampling_settings - COMMON_SETTINGS)
        if unused:
            raise ConfigError(_unused_message(unused, self.sampling_settings))
        if "num_steps" in self.sampling_settings:
            config.check_steps(self.num_timesteps)

    @abstractmethod
    def build_networks(self, model: ModelConfig) -> dict[str, nn.Module]:
        """Fresh networks by name. Weights come from torch's global generator: seed it before."""

    def build_training_networks(self) -> dict[str, nn.Module]:
        """Fresh networks that training alone needs: resumed with the others, and never exported. Mostly there are none."""
        return {}

    def turns(self, step: int) -> tuple[Turn, ...]:
        """The updates of step number `step` (from 0), in their order, all on one batch: mostly one, of all networks."""
        return (Turn(self.loss),)

    def resolution_of(self, network: str) -> int:
        """The side, in voxels, of the grids that this network sees."""
        return self.resolution

    def taken_weights(self, networks: Mapping[str, nn.Module]) -> dict[str, dict[str, Tensor]]:
        """State dicts for the `frozen` networks, out of those of `MethodConfig.taken_from`."""
        return {name: networks[name].state_dict() for name in self.frozen}

    @abstractmethod
    def loss(self, networks: Mapping[str, nn.Module], batch: Batch, seeds: Sequence[int]) -> LossOutput:
        """The training loss of a batch; every random draw of sample i comes from `seeds[i]` alone."""

    @abstractmethod
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
        """Signals (b, R^3) in [-1, 1], Morton order, on label's device; sample i depends on `seeds[i]` and `label[i]` alone.

        A label is a class, or a row of num_classes + 1 weights that sum to 1, the null label's last: a mixture. `edit` says what
        of the samples is given, in Morton order and on the same device.
        """

    @abstractmethod
    def invert(
        self,
        networks: Mapping[str, nn.Module],
        label: Int[Tensor, " b"] | Float[Tensor, "b labels"],
        voxels: Float[Tensor, "b voxels"],
        *,
        config: SampleConfig,
        on_step: OnStep | None = None,
    ) -> Float[Tensor, "b n"]:
        """The noise from which `sample` makes `voxels`, signals in Morton order, up to the error of its steps: `Edit.x_T`."""

    def reconstruct(
        self, networks: Mapping[str, nn.Module], voxels: Float[Tensor, "b voxels"]
    ) -> Float[Tensor, "b voxels"]:
        """What the method's autoencoder gives back of signals in Morton order, where it has one."""
        raise NotImplementedError

    def encode(self, networks: Mapping[str, nn.Module], voxels: Float[Tensor, "b voxels"]) -> Float[Tensor, "b n"]:
        """What `loss` takes as `Batch.latents`: all that it sees of shapes, by `frozen` networks, without any randomness."""
        raise NotImplementedError

    def bits_per_voxel(
        self,
        networks: Mapping[str, nn.Module],
        voxels: Float[Tensor, "b voxels"],
        label: Int[Tensor, " b"],
        seeds: Sequence[int],
    ) -> Float[Tensor, " b"]:
        """-log2 p(occupancy | label) / R^3 of signals in Morton order, or no less in expectation over draws from `seeds`."""
        raise NotImplementedError


class MethodConfig(ABC):
    """The settings of a method: a frozen dataclass that can build it."""

    @abstractmethod
    def build(self, *, resolution: int, num_classes: int) -> Method:
        """The method for grids of `resolution` voxels a side."""

    takes: ClassVar[str] = ""
    """Which setting says whose networks become the method's `frozen` ones, for people; empty where it takes none."""

    @property
    def taken_from(self) -> str | None:
        """The export or run that this setting names."""
        return None

    def with_taken(
        self, method: MethodConfig, model: ModelConfig, networks: Mapping[str, nn.Module], batches: Iterable[Batch]
    ) -> MethodConfig:
        """The settings once `networks` are taken, of an export with `method` and `model`; `batches` are of training shapes.

        Raises ConfigError for networks that it has no use for.
        """
        return self


def _unused_message(unused: Sequence[str], used: Collection[str]) -> str:
    names = ", ".join(f"{name} ({_option(name)})" for name in unused)
    owners = " and ".join(owner for owner, fields in _OWNERS.items() if fields & set(unused))
    takes = f"it takes {', '.join(sorted(used))}" if used else "it takes none"
    return f"{names} is for {owners} and would do nothing with this one; leave it out: {takes}"


def _option(name: str) -> str:
    return _OPTIONS.get(name, f"--{name.replace('_', '-')}")
