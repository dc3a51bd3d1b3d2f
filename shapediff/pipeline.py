"""Inference: an export in, shapes out. Needs torch alone until meshes are asked for."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from shapediff.checkpoint import Export, find_export, read_export
from shapediff.config_io import to_dict, unknown_name
from shapediff.data.sampler import sample_seed
from shapediff.diffusion.editing import Edit, slerp
from shapediff.diffusion.samplers import OnStep
from shapediff.errors import ConfigError, MeshError
from shapediff.files import write_json
from shapediff.grid.morton import dense_to_morton, flip_permutation, morton_to_dense
from shapediff.hardware import default_device, fast_bf16
from shapediff.methods import SampleConfig

if TYPE_CHECKING:
    import trimesh

MANIFEST_FILE = "manifest.json"
MESH_FORMATS = ("obj", "stl", "ply", "glb")

Precision = Literal["float32", "bf16"]
Axis = Literal["x", "y", "z"]
Label = str | Mapping[str, float] | None
"""A class, a mixture of classes with weights above 0 (brought to the sum 1), or None: of no class."""

AXES: tuple[str, ...] = get_args(Axis)
NUM_RESAMPLES = 4


@dataclass(frozen=True)
class Shapes:
    """Generated shapes.

    `voxels` (num, R, R, R) float32 on the CPU is the signal in [-1, 1], positive inside, index order (x, y, z).
    `names`, `classes` (None where unconditional) and `seeds` have one entry a shape; `settings` says how they were made.
    """

    voxels: Float[Tensor, "num x y z"]
    names: tuple[str, ...]
    classes: tuple[str | None, ...]
    seeds: tuple[int, ...]
    settings: dict[str, Any]

    def __len__(self) -> int:
        return len(self.voxels)

    def mesh(self, i: int) -> trimesh.Trimesh:
        """Shape i as a closed mesh in the unit cube, y up. Raises MeshError where the shape is empty."""
        from shapediff.geometry.export import remove_floaters
        from shapediff.geometry.isosurface import voxels_to_mesh

        return voxels_to_mesh(remove_floaters(self.voxels[i].numpy()))

    def meshes(self) -> list[trimesh.Trimesh]:
        """Every shape as a closed mesh. Raises MeshError where one is empty."""
        return [self.mesh(i) for i in range(len(self))]

    def save(self, directory: str | Path, format: str = "obj") -> list[Path | None]:
        """Write one mesh a shape and `manifest.json` (seed, settings, counts a shape); returns the paths in order.

        An empty shape has no mesh: its path is None and its line in the manifest gives the reason. A manifest that is there
        keeps its other lines, so several calls may share a directory. Raises ConfigError for an unknown format.
        """
        if format not in MESH_FORMATS:
            raise ConfigError(unknown_name("mesh format", format, MESH_FORMATS))
        directory = Path(directory)
        lines = [self._save_one(i, directory, format) for i in range(len(self))]
        _merge_manifest(directory / MANIFEST_FILE, lines)
        return [directory / line["file"] if line["file"] else None for line in lines]

    def _save_one(self, i: int, directory: Path, format: str) -> dict[str, Any]:
        from shapediff.geometry.export import write_mesh

        line = {"name": self.names[i], "class": self.classes[i], "seed": self.seeds[i], "settings": self.settings}
        try:
            mesh = self.mesh(i)
        except MeshError as error:
            return {**line, "file": None, "reason": str(error)}
        file = f"{self.names[i]}.{format}"
        write_mesh(mesh, directory / file)
        facts = {"faces": len(mesh.faces), "volume": float(mesh.volume), "watertight": bool(mesh.is_watertight)}
        return {**line, "file": file, **facts}


@dataclass(frozen=True)
class _Run:
    """The settings of one call, checked."""

    config: SampleConfig
    precision: Precision


class ShapePipeline:
    """Sample shapes from an export: `ShapePipeline.from_pretrained("runs/a")(8, label="chair")`."""

    def __init__(self, export: Export, *, source: str = "") -> None:
        self.config = export.config
        self._method = export.method
        self._networks: dict[Precision, dict[str, nn.Module]] = {"float32": export.networks}
        self._source = source
        self.device = torch.device("cpu")

    @classmethod
    def from_pretrained(cls, path: str | Path) -> ShapePipeline:
        """Read the export in `path` (its folder, or a run's), on the CPU. Raises CheckpointError where there is none."""
        return cls(read_export(path), source=str(find_export(path)))

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names, in the order of their labels."""
        return self.config.classes

    def to(self, device: torch.device | str | None = None) -> ShapePipeline:
        """Move the networks to `device` (the first GPU if there is one, else the CPU, by default); returns self."""
        self.device = torch.device(device) if device is not None else default_device()
        for networks in self._networks.values():
            for network in networks.values():
                network.to(self.device)
        return self

    def __call__(self, num: int, *, label: Label = None, seed: int = 0, **options: Any) -> Shapes:
        """Sample `num` shapes; the arguments are those of `stream`, all batches in one answer."""
        return _joined(self.stream(num, label=label, seed=seed, **options))

    def complete(
        self,
        voxels: Float[Tensor, "x y z"],
        keep: Bool[Tensor, "x y z"],
        num: int = 1,
        *,
        label: Label = None,
        seed: int = 0,
        num_resamples: int = NUM_RESAMPLES,
        mirror: Axis | None = None,
        **options: Any,
    ) -> Shapes:
        """`num` shapes that have `voxels`, a signal in [-1, 1], exactly where `keep` is true, and what fits it elsewhere.

        `num_resamples` is how often each part of the walk is made anew so that both fit (RePaint, Lugmayr et al. 2022): the cost
        grows by as much. With `mirror` what is kept also stands mirrored. Other arguments are those of `stream`. Raises
        ConfigError for grids of another size, and where what is kept contradicts its mirror image.
        """
        edit = self._edit(mirror, x_0=self._given(voxels), keep=self._mask(keep), num_resamples=num_resamples)
        told = {"name": "complete", "kept_voxels": int(keep.sum()), "num_resamples": num_resamples}
        return self._one_label(num, label, seed, edit, told, {"mirror": mirror, **options})

    def vary(
        self,
        voxels: Float[Tensor, "x y z"],
        strength: float,
        num: int = 1,
        *,
        label: Label = None,
        seed: int = 0,
        mirror: Axis | None = None,
        **options: Any,
    ) -> Shapes:
        """`num` variations on `voxels`, a signal in [-1, 1]: noised to `strength` and back (SDEdit, Meng et al. 2022).

        `strength` is the share of the steps that is walked, rounded up: 0 returns `voxels` exactly, 1 what sampling gives without
        them. Other arguments are those of `stream`. Raises ConfigError for grids of another size and strengths outside [0, 1].
        """
        edit = self._edit(mirror, x_0=self._given(voxels), strength=strength)
        return self._one_label(
            num, label, seed, edit, {"name": "vary", "strength": strength}, {"mirror": mirror, **options}
        )

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
            raise ConfigError(f"steps={steps}; an interpolation has 2 or more, its ends included")
        weight = torch.linspace(0, 1, steps)
        told: dict[str, Any] = {"name": "interpolate"}
        if isinstance(a, int) and isinstance(b, int):
            toward = (sample_seed(b, 0),) * steps
            edit = self._edit(mirror, toward=toward, weight=weight)
            seeds = [sample_seed(a, 0)] * steps
            return _joined(
                self._run([label] * steps, seeds, edit, {**told, "ends": [a, b]}, seed=seed, mirror=mirror, **options)
            )
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            return self._between_voxels(a, b, weight, label, seed, mirror, options)
        if isinstance(a, str | Mapping) and isinstance(b, str | Mapping):
            if label not in (None, a, b):
                raise ConfigError(f"an interpolation between two classes takes no third one, found label={label!r}")
            labels = [self._between_labels(a, b, w) for w in weight.tolist()]
            seeds = [sample_seed(seed, 0)] * steps
            ends = [_label_text(a), _label_text(b)]
            return _joined(
                self._run(
                    labels, seeds, self._edit(mirror), {**told, "ends": ends}, seed=seed, mirror=mirror, **options
                )
            )
        raise ConfigError(
            f"the ends of an interpolation are two seeds, two classes or two grids, found {type(a).__name__} and "
            f"{type(b).__name__}"
        )

    def _between_labels(self, a: Label, b: Label, weight: float) -> Label:
        pairs = zip(self.classes, self._weights(a), self._weights(b), strict=False)
        return {name: (1 - weight) * of_a + weight * of_b for name, of_a, of_b in pairs}

    def _between_voxels(
        self,
        a: Tensor,
        b: Tensor,
        weight: Tensor,
        label: Label,
        seed: int,
        mirror: Axis | None,
        options: dict[str, Any],
    ) -> Shapes:
        run = self._settings(label, **{**options, "guidance_scale": 1.0})
        if run.config.sampler == "ddpm" or run.config.eta > 0:
            raise ConfigError(
                f"sampler={run.config.sampler}, eta={run.config.eta:g} draws noise on its way and does not come back to "
                "the ends; use ddim with eta=0, dpm_solver or heun"
            )
        seeds = [sample_seed(seed, 0)] * len(weight)
        ends = [self._invert(self._given(end), label, run).cpu() for end in (a, b)]
        x_T = slerp(ends[0].expand(len(weight), -1), ends[1].expand(len(weight), -1), weight)
        edit = self._edit(mirror, x_T=x_T)
        told = {"name": "interpolate", "ends": ["voxels", "voxels"]}
        shapes = _joined(self._run([label] * len(weight), seeds, edit, told, seed=seed, mirror=mirror, **options))
        for place, end in ((0, a), (-1, b)):
            shapes.voxels[place] = morton_to_dense(self._edit(mirror).project(self._given(end)[None]))[0]
        return shapes

    def _one_label(
        self, num: int, label: Label, seed: int, edit: Edit, told: dict[str, Any], options: dict[str, Any]
    ) -> Shapes:
        seeds = [sample_seed(seed, n) for n in range(num)]
        return _joined(self._run([label] * num, seeds, edit, told, seed=seed, **options))

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
        num: int,
        *,
        label: Label = None,
        seed: int = 0,
        mirror: Axis | None = None,
        **options: Any,
    ) -> Iterator[Shapes]:
        """Sample `num` shapes of class `label` (None: of no class; {"chair": 0.7, "sofa": 0.3}: of a mixture), batch by batch.

        Shape i depends on `seed`, i, the label and the settings, never on `num`, nor on `batch_size` (8) but for rounding on
        GPUs. `mirror` makes every shape symmetric, to the voxel, along that axis. The other `options` are the fields of
        SampleConfig (guidance_scale, guidance_interval, guidance_rescale, split_batch, num_steps, sampler, eta, spacing; what is
        not given is as exported) and:
        `precision`: "bf16" runs the networks in bfloat16, by default where the device is faster at it.
        `on_step(done, all)` reports the steps of all batches together. Raises ConfigError for an unknown class or setting.
        """
        self._checked_counts(num, options.get("batch_size", 8))
        seeds = [sample_seed(seed, n) for n in range(num)]
        yield from self._run([label] * num, seeds, self._edit(mirror), {}, seed=seed, mirror=mirror, **options)

    def _run(
        self,
        labels: Sequence[Label],
        seeds: Sequence[int],
        edit: Edit,
        told: dict[str, Any],
        *,
        seed: int,
        mirror: Axis | None = None,
        batch_size: int = 8,
        precision: Precision | None = None,
        on_step: OnStep | None = None,
        **sampling: Any,
    ) -> Iterator[Shapes]:
        """Sample one shape for each label and seed; `told` is what the manifest says of the edit."""
        run, num = self._settings(labels[0] if labels else None, precision=precision, **sampling), len(seeds)
        self._checked_counts(num, batch_size)
        settings = {"checkpoint": self._source, "seed": seed, "precision": run.precision, **to_dict(run.config)}
        settings |= {"edit": told} if told else {}
        settings |= {"mirror": mirror} if mirror else {}
        # Kernels may round differently for another batch size. One shape at a time costs a CPU little and makes shape i the same
        # to the last bit; a GPU gets full batches, the last one filled up, so that there it depends on batch_size alone.
        size = 1 if self.device.type == "cpu" else batch_size
        for start in range(0, num, batch_size):
            numbers = range(start, min(start + batch_size, num))
            parts = []
            for at in range(start, numbers.stop, size):
                rows = list(range(at, min(at + size, numbers.stop)))
                filled = [*rows, *[rows[-1]] * (size - len(rows))]
                parts.append(
                    self._sample(
                        self._label_tensor([labels[i] for i in filled]),
                        [seeds[i] for i in filled],
                        edit.rows(filled),
                        run,
                        _counted(on_step, at, num, size),
                    )[: len(rows)]
                )
            yield Shapes(
                voxels=torch.cat(parts),
                names=tuple(f"{_file_name(labels[0], told)}_{n:04d}" for n in numbers),
                classes=tuple(_label_text(labels[n]) for n in numbers),
                seeds=tuple(seeds[n] for n in numbers),
                settings=settings,
            )

    @torch.inference_mode()
    def _sample(
        self, label: Tensor, seeds: Sequence[int], edit: Edit, run: _Run, on_step: OnStep | None
    ) -> Float[Tensor, "b x y z"]:
        networks, edit = self._networks_in(run.precision), edit.to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=run.precision == "bf16"):
            signal = self._method.sample(networks, label, seeds, config=run.config, edit=edit, on_step=on_step)
        return morton_to_dense(signal.float().cpu())

    @torch.inference_mode()
    def _invert(self, voxels: Tensor, label: Label, run: _Run) -> Float[Tensor, "1 n"]:
        networks, rows = self._networks_in(run.precision), voxels[None].to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=run.precision == "bf16"):
            return self._method.invert(networks, self._label_tensor([label]), rows, config=run.config)

    def _networks_in(self, precision: Precision) -> dict[str, nn.Module]:
        """The networks, in bf16 with weights as autocast would round them: once here, and not at every step."""
        if precision not in self._networks:
            rounded = copy.deepcopy(self._networks["float32"])
            for layer in itertools.chain.from_iterable(network.modules() for network in rounded.values()):
                if isinstance(layer, nn.Linear | nn.Conv3d):
                    layer.to(torch.bfloat16)
                if isinstance(layer, nn.Conv3d) and self.device.type == "cpu":  # as the activations are there
                    layer.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
            self._networks[precision] = rounded
        return self._networks[precision]

    def _sample_config(self, sampling: dict[str, Any]) -> SampleConfig:
        known = {field.name for field in dataclasses.fields(SampleConfig)}
        for name in sampling:
            if name not in known:
                raise ConfigError(unknown_name("sampling setting", name, known))
        try:
            config = dataclasses.replace(self.config.sampling, **sampling)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        config.check_steps(self._method.num_timesteps)
        return config

    def _settings(
        self,
        label: Label,
        *,
        precision: Precision | None = None,
        on_step: Any = None,
        batch_size: int = 8,
        **sampling: Any,
    ) -> _Run:
        """The settings of a run, checked; without a class there is nothing to guide by."""
        config = self._sample_config(sampling)
        if label is None:
            config = dataclasses.replace(config, guidance_scale=1.0)
        return _Run(config, precision or ("bf16" if fast_bf16(self.device) else "float32"))

    def _label_tensor(self, labels: Sequence[Label]) -> Tensor:
        """(b,) classes, or (b, num_classes + 1) weights where one of them is a mixture."""
        weights = torch.tensor([self._weights(label) for label in labels], device=self.device)
        is_plain = bool((weights.max(1).values == 1).all())
        return weights.argmax(1) if is_plain else weights

    def _weights(self, label: Label) -> list[float]:
        """The weights of all classes and, last, of none. Raises ConfigError for a class that there is not."""
        if label is None:
            return [0.0] * len(self.classes) + [1.0]
        mixture = {label: 1.0} if isinstance(label, str) else label
        for name, weight in mixture.items():
            if name not in self.classes:
                raise ConfigError(unknown_name("class", name, self.classes))
            if not 0 <= weight < math.inf:
                raise ConfigError(f"the weight {weight} of class {name!r} must be a number, 0 or more")
        total = math.fsum(mixture.values())
        if not total > 0:
            raise ConfigError(f"the weights of {_label_text(label)!r} add up to {total}; give one class more than 0")
        return [mixture.get(name, 0.0) / total for name in self.classes] + [0.0]

    @staticmethod
    def _checked_counts(num: int, batch_size: int) -> int:
        if num < 1 or batch_size < 1:
            raise ConfigError(f"num={num} and batch_size={batch_size} must be at least 1")
        return batch_size


def _joined(batches: Iterable[Shapes]) -> Shapes:
    """All batches as one."""
    batches = list(batches)
    return Shapes(
        voxels=torch.cat([shapes.voxels for shapes in batches]),
        names=tuple(name for shapes in batches for name in shapes.names),
        classes=tuple(name for shapes in batches for name in shapes.classes),
        seeds=tuple(seed for shapes in batches for seed in shapes.seeds),
        settings=batches[0].settings,
    )


def _label_text(label: Label) -> str | None:
    """The label as people write it: chair, or chair:0.7,sofa:0.3."""
    if label is None or isinstance(label, str):
        return label
    used = {name: weight for name, weight in label.items() if weight}
    return next(iter(used)) if len(used) == 1 else ",".join(f"{name}:{weight:.4g}" for name, weight in used.items())


def _file_name(label: Label, told: Mapping[str, Any]) -> str:
    """What files of these shapes begin with: the class, or classes, and the edit."""
    if told.get("name") == "interpolate":
        return "interpolate"
    used = [label or "shape"] if not isinstance(label, Mapping) else [name for name, weight in label.items() if weight]
    return "_".join(["+".join(used), *([told["name"]] if told else [])])


def _kept_on_both_sides(voxels: Tensor, keep: Tensor, flip: Tensor) -> tuple[Tensor, Tensor]:
    """(voxels, keep) with what is kept on one side kept on the other too. Raises ConfigError where both sides differ."""
    num_different = int((keep & keep[flip] & (voxels != voxels[flip])).sum()) // 2
    if num_different:
        raise ConfigError(
            f"what is kept is not symmetric: {num_different} pairs of voxels differ; keep one side only, or leave mirror out"
        )
    return torch.where(keep, voxels, voxels[flip]), keep | keep[flip]


def _counted(on_step: OnStep | None, start: int, num: int, size: int) -> OnStep | None:
    """`on_step` over all shapes: this part begins with shape `start` of `num` and computes `size` together."""
    if on_step is None:
        return None
    return lambda done, steps: on_step(start // size * steps + done, math.ceil(num / size) * steps)


def _merge_manifest(path: Path, lines: list[dict[str, Any]]) -> None:
    import json

    known = json.loads(path.read_text(encoding="utf-8"))["shapes"] if path.exists() else []
    written = {line["name"]: line for line in [*known, *lines]}
    write_json(path, {"shapes": list(written.values())})
