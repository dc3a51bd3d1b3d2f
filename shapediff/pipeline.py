"""Inference: an export in, shapes out. Needs torch alone until meshes are asked for."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from shapediff.batching import fitting_batch_size, in_batches
from shapediff.checkpoint import Export, add_export, read_export
from shapediff.config_io import to_dict, unknown_name
from shapediff.data.sampler import sample_seed
from shapediff.diffusion.samplers import OnStep
from shapediff.errors import ConfigError, MeshError
from shapediff.gallery import file_facts, merge_manifest
from shapediff.geometry.printable import MeshOptions
from shapediff.grid.morton import morton_to_dense
from shapediff.hardware import default_device, fast_bf16
from shapediff.hub import locate
from shapediff.methods import SampleConfig

if TYPE_CHECKING:
    import trimesh

MESH_FORMATS = ("obj", "stl", "ply", "glb", "3mf")
VOXEL_FORMATS = ("npz", "binvox", "vox", "schem")

Precision = Literal["float32", "bf16"]


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

    def mesh(self, i: int, options: MeshOptions | None = None) -> trimesh.Trimesh:
        """Shape i as a closed manifold mesh; `options` say how, see MeshOptions. Raises MeshError where the shape is empty."""
        from shapediff.geometry.printable import printable_mesh

        return printable_mesh(self.voxels[i].numpy(), options)

    def meshes(self, options: MeshOptions | None = None) -> list[trimesh.Trimesh]:
        """Every shape as a closed manifold mesh. Raises MeshError where one is empty."""
        return [self.mesh(i, options) for i in range(len(self))]

    def save(self, directory: str | Path, format: str = "obj", options: MeshOptions | None = None) -> list[Path | None]:
        """Write one file a shape, a mesh or voxels, and `manifest.json`; returns the paths in order.

        The manifest has a line a shape: seed, settings, and what was measured on the mesh (see MeshReport) or counted in the
        voxels. An empty shape has no file: its path is None and its line gives the reason. A manifest that is there keeps its
        other lines, so several calls may share a directory. Raises ConfigError for an unknown format, or a .glb with z up.
        """
        directory = Path(directory)
        lines = list(self.write(directory, format, options))
        merge_manifest(directory, lines)
        return [directory / line["file"] if line["file"] else None for line in lines]

    def write(
        self, directory: Path, format: str = "obj", options: MeshOptions | None = None
    ) -> Iterator[dict[str, Any]]:
        """`save` without the manifest: gives each shape's line of it as soon as its file is in place."""
        options = options or MeshOptions()
        check_format(format, options)
        return (self._save_one(i, directory, format, options) for i in range(len(self)))

    def _save_one(self, i: int, directory: Path, format: str, options: MeshOptions) -> dict[str, Any]:
        line = {"name": self.names[i], "class": self.classes[i], "seed": self.seeds[i], "settings": self.settings}
        file = f"{self.names[i]}.{format}"
        write = self._write_mesh if format in MESH_FORMATS else self._write_voxels
        try:
            facts = write(i, directory / file, options)
        except MeshError as error:
            return {**line, "file": None, "reason": str(error)}
        return {**line, "file": file, **(file_facts(directory / file) or {}), **facts}

    def _write_mesh(self, i: int, path: Path, options: MeshOptions) -> dict[str, Any]:
        from shapediff.geometry.export import write_mesh
        from shapediff.geometry.report import check_mesh

        mesh = self.mesh(i, options)
        write_mesh(mesh, path, name=self.names[i], smooth_normals=options.surface == "smooth")
        return {**check_mesh(mesh).to_dict(), "mesh": dataclasses.asdict(options)}

    def _write_voxels(self, i: int, path: Path, options: MeshOptions) -> dict[str, Any]:
        from shapediff.geometry.printable import solid_voxels
        from shapediff.geometry.voxel_files import write_voxels

        inside = solid_voxels(self.voxels[i].numpy(), options)
        write_voxels(inside, path)
        return {"num_inside": int(inside.sum()), "resolution": len(inside)}


class ShapePipeline:
    """Sample shapes from an export: `ShapePipeline.from_pretrained("runs/a")(8, label="chair")`."""

    def __init__(self, export: Export, *, source: str = "") -> None:
        self.config = export.config
        self._method = export.method
        self._networks: dict[Precision, dict[str, nn.Module]] = {"float32": export.networks}
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

    def to(self, device: torch.device | str | None = None) -> ShapePipeline:
        """Move the networks to `device` (the first GPU if there is one, else the CPU, by default); returns self."""
        self.device = torch.device(device) if device is not None else default_device()
        for networks in self._networks.values():
            for network in networks.values():
                network.to(self.device)
        return self

    def __call__(self, num: int | Sequence[int], *, label: str | None = None, seed: int = 0, **options: Any) -> Shapes:
        """Sample `num` shapes, or those of the numbers `num`; the arguments are those of `stream`, all batches in one answer."""
        batches = list(self.stream(num, label=label, seed=seed, **options))
        return Shapes(
            voxels=torch.cat([shapes.voxels for shapes in batches]),
            names=tuple(name for shapes in batches for name in shapes.names),
            classes=tuple(name for shapes in batches for name in shapes.classes),
            seeds=tuple(seed for shapes in batches for seed in shapes.seeds),
            settings=batches[0].settings,
        )

    def stream(
        self,
        num: int | Sequence[int],
        *,
        label: str | None = None,
        seed: int = 0,
        batch_size: int | None = None,
        precision: Precision | None = None,
        on_step: OnStep | None = None,
        **sampling: Any,
    ) -> Iterator[Shapes]:
        """Sample shapes 0 to `num` - 1, or those of the numbers `num`, of class `label` (None: of no class), batch by batch.

        Shape i depends on `seed`, i, the label and the settings, never on `num`, nor on `batch_size` but for
        rounding on GPUs. `batch_size` is by default what the GPU's free memory holds; where memory runs out it is halved. A
        CPU computes shapes one at a time. `sampling` takes the fields of SampleConfig (guidance_scale, guidance_interval,
        guidance_rescale, split_batch, num_steps, sampler, eta, spacing); what is not given is as exported.
        `precision`: "bf16" runs the networks in bfloat16, by default where the device is faster at it.
        `on_step(done, all)` reports the steps of all batches together. Raises ConfigError for an unknown class or setting,
        and where memory runs out with one shape at a time.
        """
        numbers = range(num) if isinstance(num, int) else num
        self._check_counts(len(numbers), batch_size)
        config = self._sample_config(sampling)
        index, guidance = self._label(label, config)
        config = dataclasses.replace(config, guidance_scale=guidance)
        precision = precision or self._fast_precision()
        seeds = [sample_seed(seed, n) for n in numbers]

        def compute(part: Sequence[int], size: int) -> Float[Tensor, "b x y z"]:
            counted = _counted(on_step, part[0], len(seeds), size)
            return self._sample(index, [seeds[i] for i in part], size, config, precision, counted)

        # Kernels may round differently for another batch size. One shape at a time costs a CPU little and makes shape i the same
        # to the last bit; a GPU gets full batches, the last one filled up, so that there it depends on batch_size alone.
        size = 1 if self.device.type == "cpu" else batch_size or self._fitting_batch_size(config, precision)
        for part, size, voxels in in_batches(range(len(seeds)), size, compute):  # noqa: B020 (halved where memory ran out)
            yield Shapes(
                voxels=voxels,
                names=tuple(shape_name(label, numbers[i]) for i in part),
                classes=(label,) * len(part),
                seeds=tuple(seeds[i] for i in part),
                settings={**self._settings(seed, precision, config), "batch_size": size},
            )

    def settings(self, *, seed: int = 0, precision: Precision | None = None, **sampling: Any) -> dict[str, Any]:
        """What the shapes of a call with these arguments depend on, beside their numbers, their class and the weights.

        Raises ConfigError for an unknown setting.
        """
        return self._settings(seed, precision or self._fast_precision(), self._sample_config(sampling))

    def _settings(self, seed: int, precision: Precision, config: SampleConfig) -> dict[str, Any]:
        return {"checkpoint": self._source, "seed": seed, "precision": precision, **to_dict(config)}

    def _fast_precision(self) -> Precision:
        return "bf16" if fast_bf16(self.device) else "float32"

    def _fitting_batch_size(self, config: SampleConfig, precision: Precision) -> int:
        """As many samples as a GPU holds, by what one guided step of two needs."""
        config = dataclasses.replace(config, num_steps=1, guidance_interval=(0.0, 1.0))
        return fitting_batch_size(
            self.device, lambda size: self._sample(0, [0] * size, size, config, precision, on_step=None)
        )

    @torch.inference_mode()
    def _sample(
        self,
        index: int,
        seeds: Sequence[int],
        size: int,
        config: SampleConfig,
        precision: Precision,
        on_step: OnStep | None,
    ) -> Float[Tensor, "b x y z"]:
        filled = [*seeds, *[seeds[-1]] * (size - len(seeds))]
        label = torch.full((size,), index, device=self.device)
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bf16")
        with autocast:
            signal = self._method.sample(self._networks_in(precision), label, filled, config=config, on_step=on_step)
        return morton_to_dense(signal[: len(seeds)].float().cpu())

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

    def _label(self, label: str | None, config: SampleConfig) -> tuple[int, float]:
        """The label's row and the guidance scale: without a class, the null label's alone."""
        if label is None:
            return len(self.classes), 1.0
        if label not in self.classes:
            raise ConfigError(unknown_name("class", label, self.classes))
        return self.classes.index(label), config.guidance_scale

    @staticmethod
    def _check_counts(num: int, batch_size: int | None) -> None:
        if num < 1 or (batch_size is not None and batch_size < 1):
            raise ConfigError(f"num={num} and batch_size={batch_size} must be at least 1")


def shape_name(label: str | None, number: int) -> str:
    """What shape `number` of a class is called, in the manifest and as a file."""
    return f"{label or 'shape'}_{number:04d}"


def _counted(on_step: OnStep | None, start: int, num: int, size: int) -> OnStep | None:
    """`on_step` over all shapes: this part begins with shape `start` of `num` and computes `size` together."""
    if on_step is None:
        return None
    return lambda done, steps: on_step(start // size * steps + done, math.ceil(num / size) * steps)


def check_format(format: str, options: MeshOptions) -> None:
    """Raises ConfigError for a format that `Shapes.save` does not know, or a .glb with z up."""
    if format not in MESH_FORMATS + VOXEL_FORMATS:
        raise ConfigError(unknown_name("format", format, MESH_FORMATS + VOXEL_FORMATS))
    if format == "glb" and options.up == "z":
        raise ConfigError("a .glb is y up by its standard, and viewers turn it themselves; leave out up='z'")
