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

from shapediff.checkpoint import Export, find_export, read_export
from shapediff.config_io import to_dict, unknown_name
from shapediff.data.sampler import sample_seed
from shapediff.diffusion.samplers import OnStep
from shapediff.errors import ConfigError, MeshError
from shapediff.files import write_json
from shapediff.grid.morton import morton_to_dense
from shapediff.hardware import default_device, fast_bf16
from shapediff.methods import SampleConfig

if TYPE_CHECKING:
    import trimesh

MANIFEST_FILE = "manifest.json"
MESH_FORMATS = ("obj", "stl", "ply", "glb")

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

    def __call__(self, num: int, *, label: str | None = None, seed: int = 0, **options: Any) -> Shapes:
        """Sample `num` shapes; the arguments are those of `stream`, all batches in one answer."""
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
        num: int,
        *,
        label: str | None = None,
        seed: int = 0,
        batch_size: int = 8,
        precision: Precision | None = None,
        on_step: OnStep | None = None,
        **sampling: Any,
    ) -> Iterator[Shapes]:
        """Sample `num` shapes of class `label` (None: of no class), batch by batch.

        Shape i depends on `seed`, i, the label and the settings, never on `num`, nor on `batch_size` but for
        rounding on GPUs. `sampling` takes the fields of SampleConfig (guidance_scale, guidance_interval, guidance_rescale,
        split_batch, num_steps, sampler, eta, spacing); what is not given is as exported.
        `precision`: "bf16" runs the networks in bfloat16, by default where the device is faster at it.
        `on_step(done, all)` reports the steps of all batches together. Raises ConfigError for an unknown class or setting.
        """
        config = self._sample_config(sampling)
        batch_size = self._checked_counts(num, batch_size)
        index, guidance = self._label(label, config)
        config = dataclasses.replace(config, guidance_scale=guidance)
        precision = precision or ("bf16" if fast_bf16(self.device) else "float32")
        settings = {"checkpoint": self._source, "seed": seed, "precision": precision, **to_dict(config)}
        # Kernels may round differently for another batch size. One shape at a time costs a CPU little and makes shape i the same
        # to the last bit; a GPU gets full batches, the last one filled up, so that there it depends on batch_size alone.
        size = 1 if self.device.type == "cpu" else batch_size
        for start in range(0, num, batch_size):
            numbers = range(start, min(start + batch_size, num))
            seeds = [sample_seed(seed, n) for n in numbers]
            parts = [
                self._sample(
                    index, seeds[at : at + size], size, config, precision, _counted(on_step, start + at, num, size)
                )
                for at in range(0, len(seeds), size)
            ]
            yield Shapes(
                voxels=torch.cat(parts),
                names=tuple(f"{label or 'shape'}_{n:04d}" for n in numbers),
                classes=(label,) * len(numbers),
                seeds=tuple(seeds),
                settings=settings,
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
        self._method.check_sampling(config)
        return config

    def _label(self, label: str | None, config: SampleConfig) -> tuple[int, float]:
        """The label's row and the guidance scale: without a class, the null label's alone."""
        if label is None:
            return len(self.classes), 1.0
        if label not in self.classes:
            raise ConfigError(unknown_name("class", label, self.classes))
        return self.classes.index(label), config.guidance_scale

    @staticmethod
    def _checked_counts(num: int, batch_size: int) -> int:
        if num < 1 or batch_size < 1:
            raise ConfigError(f"num={num} and batch_size={batch_size} must be at least 1")
        return batch_size


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
