"""Inference: an export in, shapes out. Needs torch alone until meshes are asked for."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from shapediff.batching import MAX_ON_CPU, VOXELS_ON_CPU, fitting_batch_size, in_batches, power_of_two_below
from shapediff.checkpoint import Export, add_export, read_export
from shapediff.config_io import to_dict, unknown_name
from shapediff.data.sampler import sample_seed
from shapediff.diffusion.editing import Edit, slerp
from shapediff.diffusion.samplers import OnStep
from shapediff.errors import ConfigError
from shapediff.grid.morton import dense_to_morton, flip_permutation, morton_to_dense
from shapediff.hardware import default_device, fast_bf16
from shapediff.hub import locate
from shapediff.labels import Label, label_text, label_weights, shape_name
from shapediff.methods import SampleConfig
from shapediff.methods.base import COMMON_SETTINGS
from shapediff.models.convolution import ConvOfDoubled, packed
from shapediff.models.packed import packs
from shapediff.shapes import Shapes, joined

Precision = Literal["float32", "bf16"]
Axis = Literal["x", "y", "z"]
AXES: tuple[str, ...] = get_args(Axis)
NUM_RESAMPLES = 4
_NOT_OF_SAMPLING = {"seed", "batch_size", "precision", "on_step"}


class ShapePipeline:
    """Sample shapes from an export: `ShapePipeline.from_pretrained("runs/a")(8, label="chair")`."""

    def __init__(self, export: Export, *, source: str = "") -> None:
        self.config = export.config
        self._method = export.method
        self._networks: dict[Precision, dict[str, nn.Module]] = {"float32": export.networks}
        self._round_alike: dict[tuple[Any, ...], bool] = {}  # see `_alike`
        self._source = source
        self.device = torch.device("cpu")

    @classmethod
    def from_pretrained(cls, source: str | Path, *, revision: str | None = None) -> ShapePipeline:
        """Read an export on the CPU: its folder or a run's, a name that comes with shapediff, or a hub id "user/name".

        Only a hub id asks the network, for its `revision`, and only where it is not on this machine yet (see hub.locate).
        Raises CheckpointError where there is none.
        """
        folder = locate(source, revision=revision)
        return cls(read_export(folder), source=str(folder))

    def save_pretrained(self, directory: str | Path, *, license: str = "unknown") -> None:
        """Write config.json, model.safetensors and a model card, README.md, as the Hugging Face hub expects them.

        Other files in `directory` stay, and so does a README.md that is there. `license`: that of the weights, as the hub
        spells it ("apache-2.0"). Raises ConfigError for one that it could not be.
        """
        weights = {name: network.state_dict() for name, network in self._networks["float32"].items()}
        add_export(directory, self.config, weights, license=license)

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names, in the order of their labels."""
        return self.config.classes

    @property
    def sampling_settings(self) -> frozenset[str]:
        """The fields of SampleConfig that this model uses; a call that is given another one is refused."""
        return self._method.sampling_settings | COMMON_SETTINGS

    def to(self, device: torch.device | str | None = None) -> ShapePipeline:
        """Move the networks to `device` (the first GPU if there is one, else the CPU, by default); returns self."""
        self.device = torch.device(device) if device is not None else default_device()
        self._networks = {"float32": self._networks["float32"]}  # others are made for a device
        for network in self._networks["float32"].values():
            network.to(self.device)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Without networks that only this machine can hold."""
        return {**self.__dict__, "_networks": {"float32": self._networks["float32"]}, "_round_alike": {}}

    def __call__(self, num: int | Sequence[int], *, label: Label = None, seed: int = 0, **options: Any) -> Shapes:
        """Sample `num` shapes, or those of the numbers `num`; the arguments are those of `stream`, all batches in one answer."""
        return joined(self.stream(num, label=label, seed=seed, **options))

    def complete(
        self, voxels: Float[Tensor, "x y z"], keep: Bool[Tensor, "x y z"], num: int | Sequence[int] = 1, **options: Any
    ) -> Shapes:
        """`num` shapes that have `voxels` where `keep` is true; the arguments are those of `stream_completions`."""
        return joined(self.stream_completions(voxels, keep, num, **options))

    def vary(
        self, voxels: Float[Tensor, "x y z"], strength: float, num: int | Sequence[int] = 1, **options: Any
    ) -> Shapes:
        """`num` variations on `voxels`; the arguments are those of `stream_variations`."""
        return joined(self.stream_variations(voxels, strength, num, **options))

    def stream_completions(
        self,
        voxels: Float[Tensor, "x y z"],
        keep: Bool[Tensor, "x y z"],
        num: int | Sequence[int] = 1,
        *,
        label: Label = None,
        seed: int = 0,
        num_resamples: int = NUM_RESAMPLES,
        mirror: Axis | None = None,
        **options: Any,
    ) -> Iterator[Shapes]:
        """`num` shapes, or those of the numbers `num`, that have `voxels` exactly where `keep` is true, and elsewhere what fits.

        `voxels` is a signal in [-1, 1]; `num_resamples` is how often each part of the walk is made anew so that both
        fit (RePaint, Lugmayr et al. 2022): the cost grows by as much. With `mirror` what is kept also stands mirrored. Other
        arguments are those of `stream`. Raises ConfigError for grids of another size, and where what is kept contradicts its
        mirror image.
        """
        edit = self._edit(mirror, x_0=self._given(voxels), keep=self._mask(keep), num_resamples=num_resamples)
        told = {"name": "complete", "kept_voxels": int(keep.sum()), "num_resamples": num_resamples}
        yield from self._one_label(num, label, edit, told, seed=seed, mirror=mirror, **options)

    def stream_variations(
        self,
        voxels: Float[Tensor, "x y z"],
        strength: float,
        num: int | Sequence[int] = 1,
        *,
        label: Label = None,
        seed: int = 0,
        mirror: Axis | None = None,
        **options: Any,
    ) -> Iterator[Shapes]:
        """`num` variations on `voxels`, a signal in [-1, 1]: noised to `strength` and back (SDEdit, Meng et al. 2022).

        `strength` is the share of the steps that is walked, rounded up: 0 returns `voxels` exactly, 1 what sampling gives without
        them. Other arguments are those of `stream`. Raises ConfigError for grids of another size and strengths outside [0, 1].
        """
        edit = self._edit(mirror, x_0=self._given(voxels), strength=strength)
        told = {"name": "vary", "strength": strength}
        yield from self._one_label(num, label, edit, told, seed=seed, mirror=mirror, **options)

    def interpolate(
        self,
        a: int | Label | Float[Tensor, "x y z"],
        b: int | Label | Float[Tensor, "x y z"],
        steps: int = 8,
        *,
        label: Label = None,
        seed: int = 0,
        mirror: Axis | None = None,
        **options: Any,
    ) -> Shapes:
        """`steps` shapes on the way from a to b, both included; a and b are of one kind:

        Two seeds: their noise is blended by slerp, and the ends are the first shapes that these seeds give for `label`. Two
        labels: one noise, that of `seed`, guided by a mixture that turns from one to the other, and the ends are the first shapes
        of each label. Two signals in [-1, 1]: each is walked up to noise (DDIM inversion, Song et al. 2021, without guidance) and
        the noise is blended; the ends are the signals themselves, put there as they are, since the inversion comes back to them
        only up to the error of its steps, and not at all where what follows is guided.

        Other arguments are those of `stream`. Raises ConfigError for fewer than two steps, ends of different kinds, and signals
        with a sampler that draws noise on its way.
        """
        if steps < 2:
            raise ConfigError(
                f"--num {steps} is too few for an interpolation, which has 2 shapes or more, its ends included"
            )
        weight = torch.linspace(0, 1, steps)
        options = {"seed": seed, "mirror": mirror, **options}
        if isinstance(a, int) and isinstance(b, int):
            edit = self._edit(mirror, toward=(sample_seed(b, 0),) * steps, weight=weight)
            return self._along([label] * steps, sample_seed(a, 0), edit, [a, b], **options)
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            return self._between_voxels(a, b, weight, label, **options)
        if isinstance(a, str | Mapping) and isinstance(b, str | Mapping):
            if label not in (None, a, b):
                raise ConfigError(f"an interpolation between two classes takes no third one, found label={label!r}")
            labels = [self._between_labels(a, b, w) for w in weight.tolist()]
            ends = [label_text(a), label_text(b)]
            return self._along(labels, sample_seed(seed, 0), self._edit(mirror), ends, **options)
        raise ConfigError(
            f"the ends of an interpolation are two seeds, two classes or two grids, found {type(a).__name__} and "
            f"{type(b).__name__}"
        )

    @property
    def has_autoencoder(self) -> bool:
        """Whether `reconstruct` can be asked of it."""
        return self._method.has_autoencoder

    @torch.inference_mode()
    def reconstruct(
        self, voxels: Float[Tensor, "b x y z"], *, precision: Precision | None = None
    ) -> Float[Tensor, "b x y z"]:
        """What the model's autoencoder gives back of signals in [-1, 1]. Raises ConfigError where it has none."""
        if not self.has_autoencoder:
            raise ConfigError("this model has no autoencoder; use one of method=shape_vae or method=latent_diffusion")
        precision = precision or self._fast_precision()
        rows = self._rows(voxels)
        with self._autocast(precision):
            return morton_to_dense(self._method.reconstruct(self._networks_in(precision), rows).float().cpu())

    @property
    def has_likelihood(self) -> bool:
        """Whether `bits_per_voxel` can be asked of it."""
        return self._method.has_likelihood

    @torch.inference_mode()
    def bits_per_voxel(
        self,
        voxels: Float[Tensor, "b x y z"],
        labels: Sequence[str | None],
        *,
        seed: int = 0,
        numbers: Sequence[int] | None = None,
        precision: Precision | None = None,
    ) -> Float[Tensor, " b"]:
        """-log2 p(what of each grid is above 0 | its class) / R^3, exact or a bound. Raises ConfigError where it has none.

        A bound depends on noise: that of each grid follows from `seed` and its number (0, 1 ...), whatever else is asked with it.
        """
        if not self.has_likelihood:
            raise ConfigError(
                "this model cannot say how likely a shape is; use one of method=octree_autoregression or method=voxel_diffusion"
            )
        precision = precision or self._fast_precision()
        rows = self._rows(voxels)
        label = self._label_tensor(labels)
        seeds = [sample_seed(seed, i) for i in (range(len(rows)) if numbers is None else numbers)]
        with self._autocast(precision):
            return self._method.bits_per_voxel(self._networks_in(precision), rows, label, seeds).float().cpu()

    def _between_labels(self, a: Label, b: Label, weight: float) -> Label:
        pairs = zip(self.classes, label_weights(a, self.classes), label_weights(b, self.classes), strict=False)
        return {name: (1 - weight) * of_a + weight * of_b for name, of_a, of_b in pairs}

    def _between_voxels(
        self, a: Tensor, b: Tensor, weight: Tensor, label: Label, *, mirror: Axis | None, **options: Any
    ) -> Shapes:
        sampling = {name: value for name, value in options.items() if name not in _NOT_OF_SAMPLING}
        config = dataclasses.replace(self._sample_config(sampling, label), guidance_scale=1.0)
        if config.sampler == "ddpm" or config.eta > 0:
            raise ConfigError(
                f"sampler={config.sampler}, eta={config.eta:g} draws noise on its way and does not come back to "
                "the ends; use ddim with eta=0, dpm_solver or heun"
            )
        precision = options.get("precision") or self._fast_precision()
        ends = [self._invert(self._given(end), label, config, precision).cpu() for end in (a, b)]
        x_T = slerp(ends[0].expand(len(weight), -1), ends[1].expand(len(weight), -1), weight)
        edit, first = self._edit(mirror, x_T=x_T), sample_seed(options["seed"], 0)
        told = ["voxels", "voxels"]
        shapes = self._along([label] * len(weight), first, edit, told, mirror=mirror, **options)
        for place, end in ((0, a), (-1, b)):
            shapes.voxels[place] = morton_to_dense(self._edit(mirror).project(self._given(end)[None]))[0]
        return shapes

    def _along(self, labels: Sequence[Label], first: int, edit: Edit, ends: list[Any], **options: Any) -> Shapes:
        """The shapes of an interpolation, all from the noise of the seed `first`."""
        told, num = {"name": "interpolate", "ends": ends}, len(labels)
        if options.setdefault("draws", 1) > 1:
            raise ConfigError("draws is not for interpolations, where each shape follows from the ones beside it")
        return joined(self._run(labels, range(num), edit, told, seeds=[first] * num, **options))

    def _one_label(
        self, num: int | Sequence[int], label: Label, edit: Edit, told: dict[str, Any], **options: Any
    ) -> Iterator[Shapes]:
        numbers = range(num) if isinstance(num, int) else num
        return self._run([label] * len(numbers), numbers, edit, told, **options)

    def _given(self, voxels: Float[Tensor, "x y z"]) -> Float[Tensor, " voxels"]:
        """A signal that a user gives, checked, in Morton order."""
        size = (self.config.resolution,) * 3
        if tuple(voxels.shape) != size:
            raise ConfigError(
                f"the grid is {tuple(voxels.shape)}; this model makes {size}, so voxelize to that resolution"
            )
        if not bool((voxels.abs() <= 1).all()):
            raise ConfigError(
                "the grid holds values outside [-1, 1]; give a signal, positive inside: 2 * occupancy - 1"
            )
        return dense_to_morton(voxels.detach().float().cpu())

    def _mask(self, keep: Bool[Tensor, "x y z"]) -> Bool[Tensor, " voxels"]:
        if keep.dtype != torch.bool:
            raise ConfigError(f"keep is of {keep.dtype}; give booleans, true where voxels stay")
        return self._given(keep.float()) > 0

    def _edit(self, mirror: Axis | None, **fields: Any) -> Edit:
        if mirror is not None and mirror not in AXES:
            raise ConfigError(unknown_name("mirror axis", mirror, AXES))
        flip = None
        if mirror is not None:
            flip = torch.from_numpy(flip_permutation(self.config.resolution, AXES.index(mirror)).copy())
            if "keep" in fields:
                fields["x_0"], fields["keep"] = _kept_on_both_sides(fields["x_0"], fields["keep"], flip)
        try:
            return Edit(mirror=flip, **fields)
        except ValueError as error:
            raise ConfigError(str(error)) from error

    def stream(
        self,
        num: int | Sequence[int],
        *,
        label: Label = None,
        seed: int = 0,
        mirror: Axis | None = None,
        **options: Any,
    ) -> Iterator[Shapes]:
        """Sample shapes 0 to `num` - 1, or those of the numbers `num`, of class `label`, batch by batch.

        `label` may be None, of no class, or a mixture {"chair": 0.7, "sofa": 0.3}. Shape i depends on `seed`, i, the label and
        the settings, never on `num`, nor on `batch_size` but for rounding on GPUs. `mirror` makes every shape symmetric, to the
        voxel, along that axis. The other `options` are the fields of SampleConfig that the model uses (`sampling_settings`:
        guidance_scale, guidance_interval, guidance_rescale, split_batch, num_steps, sampler, eta, spacing, or guidance_scale,
        temperature, top_k, top_p, and draws; what is not given is as exported) and:
        `batch_size` is by default what the GPU's free memory holds; where memory runs out it is halved. A CPU computes as many
        together as come out to the last bit as each would alone: in bfloat16 up to 16, in float32 mostly one.
        `precision`: "bf16" runs the networks in bfloat16, by default where the device is faster at it.
        `on_step(done, all)` reports the steps of all batches together. Raises ConfigError for an unknown class or setting,
        and where memory runs out with one shape at a time.
        """
        yield from self._one_label(num, label, self._edit(mirror), {}, seed=seed, mirror=mirror, **options)

    def _run(
        self,
        labels: Sequence[Label],
        numbers: Sequence[int],
        edit: Edit,
        told: dict[str, Any],
        *,
        seed: int,
        seeds: Sequence[int] | None = None,
        mirror: Axis | None = None,
        batch_size: int | None = None,
        precision: Precision | None = None,
        on_step: OnStep | None = None,
        **sampling: Any,
    ) -> Iterator[Shapes]:
        """Sample one shape for each label and number; `told` is what the manifest says of the edit.

        `seeds` of the shapes are those of their numbers where not given.
        """
        if not labels or (batch_size is not None and batch_size < 1):
            raise ConfigError(f"num={len(labels)} and batch_size={batch_size} must be at least 1")
        config, precision = self._sample_config(sampling, labels[0]), precision or self._fast_precision()
        seeds = [sample_seed(seed, n) for n in numbers] if seeds is None else seeds
        settings = self._settings(seed, precision, config)
        settings |= {"edit": told} if told else {}
        settings |= {"mirror": mirror} if mirror else {}

        drawn, on_cpu = list(seeds), self.device.type == "cpu"

        def alike(most: int) -> int:
            return self._alike(most, labels[0], config, precision)

        def compute(part: Sequence[int], size: int) -> Float[Tensor, "b x y z"]:
            def draw(chosen: Sequence[int], seeds: Sequence[int], on_step: OnStep | None) -> Float[Tensor, "c x y z"]:
                done: list[Tensor] = []
                while (start := sum(map(len, done))) < len(chosen):
                    together = alike(min(size, len(chosen) - start)) if on_cpu else size
                    end = min(start + together, len(chosen))
                    taken = [*range(start, end), *[end - 1] * (start + together - end)]  # filled up with the last one
                    rows, own = [part[chosen[i]] for i in taken], [seeds[i] for i in taken]
                    label = self._label_tensor([labels[i] for i in rows])
                    counted = _counted(on_step, part[0] + start, end - start, len(labels))
                    voxels = self._sample(label, own, edit.rows(rows), config, precision, counted)
                    done.append(voxels[: end - start])
                return torch.cat(done)

            voxels, drawn[part[0] : part[-1] + 1] = _in_one_part(config.draws, [seeds[i] for i in part], draw, on_step)
            return voxels

        # Kernels may round differently for another batch size. A CPU takes those by which they do not, so that shape i is the
        # same to the last bit; a GPU gets full batches, the last one filled up, so that there it depends on batch_size alone.
        if on_cpu:
            size = alike(self._most_on_cpu(labels, batch_size))
        else:
            size = batch_size or self._fitting_batch_size(config, precision)
        for part, size, voxels in in_batches(range(len(labels)), size, compute):  # noqa: B020 (halved where memory ran out)
            yield Shapes(
                voxels=voxels,
                names=tuple(shape_name(labels[0], numbers[i], told.get("name")) for i in part),
                classes=tuple(label_text(labels[i]) for i in part),
                seeds=tuple(drawn[i] for i in part),
                settings=settings if on_cpu else {**settings, "batch_size": size},
            )

    def settings(self, *, seed: int = 0, precision: Precision | None = None, **sampling: Any) -> dict[str, Any]:
        """What the shapes of a call with these arguments depend on, beside their numbers, their class and the weights.

        Raises ConfigError for an unknown setting.
        """
        return self._settings(seed, precision or self._fast_precision(), self._sample_config(sampling))

    def _settings(self, seed: int, precision: Precision, config: SampleConfig) -> dict[str, Any]:
        used = {name: value for name, value in to_dict(config).items() if name in self.sampling_settings}
        return {"checkpoint": self._source, "seed": seed, "precision": precision, **used}

    def _fast_precision(self) -> Precision:
        return "bf16" if fast_bf16(self.device) else "float32"

    def _most_on_cpu(self, labels: Sequence[Label], batch_size: int | None) -> int:
        if len({self._label_tensor([label]).dtype for label in labels}) > 1:
            return 1  # mixtures of classes take another way through a network, and alone only they
        return max(
            1, min(len(labels), batch_size or MAX_ON_CPU, MAX_ON_CPU, VOXELS_ON_CPU // self.config.resolution**3)
        )

    def _alike(self, most: int, label: Label, config: SampleConfig, precision: Precision) -> int:
        """How many of `most` samples with labels like this a CPU computes together: a number by which each is what it would be
        alone, to the last bit.

        Which kernels run depends on sizes, not on numbers: a step of noise tells.
        """
        size = power_of_two_below(most, most)
        if size == 1 or "num_steps" not in self.sampling_settings:
            return 1
        scales = {config.guidance_scale} | ({1.0} if config.guidance_interval != (0.0, 1.0) else set())
        steps = (_one_step(config, guidance_scale=scale) for scale in scales)
        one = self._label_tensor([label])
        return size if all(self._rounds_alike(size, one, step, precision) for step in steps) else 1

    def _rounds_alike(self, size: int, label: Tensor, step: SampleConfig, precision: Precision) -> bool:
        key = size, label.dtype, step, precision, torch.get_num_threads()
        if key not in self._round_alike:
            together = self._sample(label.repeat_interleave(size, 0), range(size), Edit(), step, precision, None)
            alone = (self._sample(label, [i], Edit(), step, precision, None) for i in (0, size - 1))
            self._round_alike[key] = all(
                torch.equal(together[i], one[0]) for i, one in zip((0, -1), alone, strict=True)
            )
        return self._round_alike[key]

    def _fitting_batch_size(self, config: SampleConfig, precision: Precision) -> int:
        """As many samples as a GPU holds, by what one guided step of two needs."""
        config = _one_step(config)

        def compute(size: int) -> Tensor:
            label = torch.zeros(size, dtype=torch.long, device=self.device)
            return self._sample(label, [0] * size, Edit(), config, precision, on_step=None)

        return fitting_batch_size(self.device, compute)

    @torch.inference_mode()
    def _sample(
        self,
        label: Tensor,
        seeds: Sequence[int],
        edit: Edit,
        config: SampleConfig,
        precision: Precision,
        on_step: OnStep | None,
    ) -> Float[Tensor, "b x y z"]:
        networks, edit = self._networks_in(precision), edit.to(self.device)
        with self._autocast(precision):
            signal = self._method.sample(networks, label, seeds, config=config, edit=edit, on_step=on_step)
        return morton_to_dense(signal.float().cpu())

    @torch.inference_mode()
    def _invert(self, voxels: Tensor, label: Label, config: SampleConfig, precision: Precision) -> Float[Tensor, "1 n"]:
        networks, rows = self._networks_in(precision), voxels[None].to(self.device)
        with self._autocast(precision):
            return self._method.invert(networks, self._label_tensor([label]), rows, config=config)

    def _rows(self, voxels: Float[Tensor, "b x y z"]) -> Float[Tensor, "b n"]:
        return torch.stack([self._given(one) for one in voxels]).to(self.device)

    def _autocast(self, precision: Precision) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bf16")

    def _networks_in(self, precision: Precision) -> dict[str, nn.Module]:
        if precision not in self._networks:
            networks = self._networks["float32"].items()
            self._networks[precision] = {name: rounded(network, self.device) for name, network in networks}
        return self._networks[precision]

    def _sample_config(self, sampling: dict[str, Any], label: Label = "") -> SampleConfig:
        """The settings, checked; without a class there is nothing to guide by."""
        known = {field.name for field in dataclasses.fields(SampleConfig)}
        for name in sampling:
            if name not in known:
                raise ConfigError(unknown_name("sampling setting", name, known))
        try:
            config = dataclasses.replace(self.config.sampling, **sampling)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        self._method.check_sampling(config, sampling)
        return config if label is not None else dataclasses.replace(config, guidance_scale=1.0)

    def _label_tensor(self, labels: Sequence[Label]) -> Tensor:
        """(b,) classes, or (b, num_classes + 1) weights where one of them is a mixture."""
        weights = torch.tensor([label_weights(label, self.classes) for label in labels], device=self.device)
        is_plain = bool((weights.max(1).values == 1).all())
        return weights.argmax(1) if is_plain else weights


def rounded(network: nn.Module, device: torch.device) -> nn.Module:
    """A copy with weights as autocast to bfloat16 would round them: once, and not at every step."""
    network = copy.deepcopy(network)
    is_packed = device.type == "cpu" and packs()
    for layer in list(network.modules()):
        for name, part in layer.named_children():
            if is_packed and isinstance(part, nn.Conv3d):
                setattr(layer, name, packed(part))
            elif isinstance(part, nn.Linear | nn.Conv3d) and not isinstance(part, ConvOfDoubled):
                part.to(torch.bfloat16)  # a ConvOfDoubled sums weights before it rounds them
    return network


def _one_step(config: SampleConfig, **settings: Any) -> SampleConfig:
    """One step, guided if `config` guides at all."""
    return dataclasses.replace(config, num_steps=1, guidance_interval=(0.0, 1.0), **settings)


def _kept_on_both_sides(voxels: Tensor, keep: Tensor, flip: Tensor) -> tuple[Tensor, Tensor]:
    """(voxels, keep) with what is kept on one side kept on the other too. Raises ConfigError where both sides differ."""
    num_different = int((keep & keep[flip] & (voxels != voxels[flip])).sum()) // 2
    if num_different:
        raise ConfigError(
            f"what is kept is not symmetric: {num_different} pairs of voxels differ; keep one side only, or leave mirror out"
        )
    return torch.where(keep, voxels, voxels[flip]), keep | keep[flip]


def _in_one_part(
    num_draws: int,
    seeds: Sequence[int],
    draw: Callable[[Sequence[int], Sequence[int], OnStep | None], Float[Tensor, "c x y z"]],
    on_step: OnStep | None,
) -> tuple[Float[Tensor, "b x y z"], list[int]]:
    """(shapes, their seeds): of each the first of `num_draws` in one part, else the one whose largest part is most of it.

    `draw(chosen, seeds, on_step)` makes those of these places. Draws after the first have seeds of their own, out of the first.
    """
    voxels, kept = draw(range(len(seeds)), seeds, on_step), list(seeds)
    if num_draws == 1:
        return voxels, kept
    grids = list(voxels)
    from shapediff.geometry.export import largest_share

    shares = [largest_share(grid.numpy()) for grid in grids]
    for attempt in range(1, num_draws):
        again = [i for i, share in enumerate(shares) if share < 1]
        if not again:
            break
        others = [sample_seed(seeds[i], attempt) for i in again]
        for i, seed, grid in zip(again, others, draw(again, others, None), strict=True):
            if (share := largest_share(grid.numpy())) > shares[i]:
                grids[i], kept[i], shares[i] = grid, seed, share
    return torch.stack(grids), kept


def _counted(on_step: OnStep | None, start: int, count: int, num: int) -> OnStep | None:
    """`on_step` over all `num` shapes, for the `count` from number `start` on, which are computed together."""
    if on_step is None:
        return None
    return lambda done, steps: on_step(start * steps + count * done, num * steps)
