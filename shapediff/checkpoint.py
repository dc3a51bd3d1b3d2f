"""Exports: the folder that people share and that sampling reads.

`model.safetensors` (the EMA weights) + `config.json` (short type names, never import paths) + `README.md` (a model card).
Read strictly, without pickle, and never trusted.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from shapediff.config_io import from_dict, named_from_dict, named_to_dict, to_dict
from shapediff.errors import CheckpointError, ConfigError
from shapediff.files import replaced_directory, replaced_file, write_json, write_text
from shapediff.methods import METHODS, Method, MethodConfig, SampleConfig
from shapediff.models import MODELS, ModelConfig

FORMAT_VERSION = 1
CONFIG_FILE, WEIGHTS_FILE, CARD_FILE = "config.json", "model.safetensors", "README.md"
EXPORT_FOLDER = "export"
DEFAULT_TRUNCATION = 3.0
MAX_CONFIG_BYTES = 1 << 20

Field = Literal["occupancy", "tsdf"]


@dataclass(frozen=True)
class ExportConfig:
    """Everything that sampling must know beside the weights.

    `field` is what the signal was made of, a TSDF in a band of `truncation_voxels`;
    `training` holds facts for people (steps, samples seen, data set), never read back.
    """

    resolution: int
    field: Field
    classes: tuple[str, ...]
    method: MethodConfig
    model: ModelConfig
    sampling: SampleConfig = dataclasses.field(default_factory=SampleConfig)
    training: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    truncation_voxels: float = DEFAULT_TRUNCATION

    def build_method(self) -> Method:
        """The method, bound to this resolution and these classes."""
        return self.method.build(resolution=self.resolution, num_classes=len(self.classes))


def grid_settings(field: Field) -> tuple[str, ...]:
    """The fields of ExportConfig that say what a signal of `field` is: where one differs, weights mean nothing."""
    return ("resolution", "field", *(("truncation_voxels",) if field == "tsdf" else ()))


@dataclass(frozen=True)
class Export:
    """An export that was read: its config, its method, and its networks with their weights, float32 on the CPU."""

    config: ExportConfig
    method: Method
    networks: dict[str, nn.Module]


def write_export(
    directory: str | Path, config: ExportConfig, weights: Mapping[str, Mapping[str, Tensor]], *, dtype: torch.dtype
) -> None:
    """Write `weights` (network name -> state dict) and `config` to `directory`, replacing it at once when all is written.

    `dtype` (float32 or bfloat16) is what floating-point weights are stored in.
    """
    tensors = _flat(weights, dtype)
    with replaced_directory(directory) as partial:
        save_file(tensors, partial / WEIGHTS_FILE)
        write_json(partial / CONFIG_FILE, config_to_dict(config))
        write_text(partial / CARD_FILE, model_card(config, tensors))


def add_export(
    directory: str | Path, config: ExportConfig, weights: Mapping[str, Mapping[str, Tensor]], *, license: str
) -> None:
    """Write an export, float32, among what else `directory` holds: a git repository, a card that someone has written.

    `license` is that of the weights, for a card where there is none yet. Raises ConfigError for one that it could not be.
    """
    directory, tensors = Path(directory), _flat(weights, torch.float32)
    card = model_card(config, tensors, license=license)
    with replaced_file(directory / WEIGHTS_FILE) as partial:
        save_file(tensors, partial)
    write_json(directory / CONFIG_FILE, config_to_dict(config))
    if not (directory / CARD_FILE).exists():
        write_text(directory / CARD_FILE, card)


def _flat(weights: Mapping[str, Mapping[str, Tensor]], dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        f"{network}.{key}": value.detach().to("cpu", dtype if value.is_floating_point() else value.dtype).contiguous()
        for network, state in weights.items()
        for key, value in state.items()
    }


def read_export(path: str | Path) -> Export:
    """Read an export, given its folder or the folder of the run that holds it.

    Raises CheckpointError if there is none, if it is damaged, or if weights and config do not fit each other.
    """
    directory = find_export(path)
    config = read_config(directory / CONFIG_FILE)
    try:
        method, expected = config.build_method(), tensor_shapes(config)
    except (ValueError, RuntimeError) as error:
        raise CheckpointError(f"{directory / CONFIG_FILE}: {error}") from error
    weights = _read_weights(directory / WEIGHTS_FILE, expected)
    with _Unfilled():
        networks = method.build_networks(config.model)
    for name, network in networks.items():
        prefix = f"{name}."
        state = {key.removeprefix(prefix): value.float() for key, value in weights.items() if key.startswith(prefix)}
        network.load_state_dict(state, strict=True)
        network.eval().requires_grad_(False)
    return Export(config, method, networks)


def tensor_shapes(config: ExportConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of an export's weights, "network.key" each. Raises ValueError where the network cannot be built."""
    method = config.build_method()
    with torch.device("meta"), _Unfilled():
        networks = method.build_networks(config.model)
    return {
        f"{name}.{key}": tuple(value.shape)
        for name, network in networks.items()
        for key, value in network.state_dict().items()
    }


def find_export(path: str | Path) -> Path:
    """The export folder at `path` or at `path`/export. Raises CheckpointError, saying what is there, if there is none."""
    path = Path(path)
    for directory in (path, path / EXPORT_FOLDER):
        if (directory / CONFIG_FILE).is_file() and (directory / WEIGHTS_FILE).is_file():
            return directory
    if not path.exists():
        raise CheckpointError(f"no checkpoint at {path}: there is no such file or folder")
    found = ", ".join(sorted(p.name for p in path.iterdir())[:10]) if path.is_dir() else "a file"
    raise CheckpointError(
        f"no export at {path} (found: {found or 'nothing'}); expected {CONFIG_FILE} and {WEIGHTS_FILE} there or in "
        f"{path / EXPORT_FOLDER}, which the last step of training writes"
    )


def config_to_dict(config: ExportConfig) -> dict[str, Any]:
    """What config.json holds."""
    return {
        "format": "shapediff",
        "format_version": FORMAT_VERSION,
        "resolution": config.resolution,
        "field": config.field,
        "truncation_voxels": config.truncation_voxels,
        "classes": list(config.classes),
        "method": named_to_dict(METHODS, config.method),
        "model": named_to_dict(MODELS, config.model),
        "sampling": to_dict(config.sampling),
        "training": dict(config.training),
    }


def read_config(path: Path) -> ExportConfig:
    """The config in a file that config.json is written like. Raises CheckpointError where it is none."""
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise CheckpointError(f"{path} is larger than {MAX_CONFIG_BYTES} bytes: not a shapediff config")
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(data, dict) or data.get("format") != "shapediff" or data.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(f"{path} is not a shapediff export of format version {FORMAT_VERSION}")
    try:
        return _config_from_dict(data)
    except (ConfigError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def _config_from_dict(data: Mapping[str, Any]) -> ExportConfig:
    known = {field.name for field in dataclasses.fields(_Basics)}
    basics = from_dict(_Basics, {key: value for key, value in data.items() if key in known})
    return ExportConfig(
        resolution=basics.resolution,
        field=basics.field,
        classes=basics.classes,
        method=named_from_dict(METHODS, data["method"], path="method"),
        model=named_from_dict(MODELS, data["model"], path="model"),
        sampling=from_dict(SampleConfig, data["sampling"], path="sampling"),
        training=data.get("training", {}),
        truncation_voxels=basics.truncation_voxels,
    )


@dataclass(frozen=True)
class _Basics:
    resolution: int
    field: Field
    classes: tuple[str, ...]
    truncation_voxels: float = DEFAULT_TRUNCATION  # exports of earlier versions do not say

    def __post_init__(self) -> None:
        if not 0 <= self.truncation_voxels <= self.resolution:
            raise ValueError(f"truncation_voxels={self.truncation_voxels} must lie between 0 and the resolution")
        if not 2 <= self.resolution <= 1024 or self.resolution & (self.resolution - 1):
            raise ValueError(f"resolution={self.resolution} is not a power of two between 2 and 1024")
        if not self.classes or len(set(self.classes)) != len(self.classes):
            raise ValueError("classes must be a list of different names")
        for name in self.classes:  # they become names of files
            if not name.isprintable() or set(name) & set("/\\") or name.startswith(".") or len(name) > 100:
                raise ValueError(f"classes: {name!r} cannot be the name of a file")


_FILLS = (nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_, Tensor.normal_, Tensor.uniform_)


class _Unfilled(TorchFunctionMode):
    """Weights that are about to be read need no random numbers; on the meta device these would import a compiler first."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _FILLS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def _read_weights(path: Path, expected: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The tensors of the file, once its header has shown the expected names and shapes: a wrong file is never loaded."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            found = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 (not a dict)
        different = sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
        if different:
            key = different[0]
            raise CheckpointError(
                f"{path} does not fit its {CONFIG_FILE}: {len(different)} tensors differ, the first is {key} "
                f"(config says {expected.get(key, 'none')}, file holds {found.get(key, 'none')})"
            )
        return load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged or incomplete: {error}") from error


def model_card(config: ExportConfig, tensors: Mapping[str, Tensor], *, license: str = "unknown") -> str:
    """What people read of a model, and, in YAML at its top, what the hub reads of it."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", license):
        raise ConfigError(f"license={license!r}; use a name of the Hugging Face hub's list, such as apache-2.0")
    num_parameters = sum(value.numel() for value in tensors.values())
    facts = "\n".join(f"- {key.replace('_', ' ')}: {value}" for key, value in config.training.items())
    first = config.classes[0]
    is_guided = "guidance_scale" in config.build_method().sampling_settings
    guidance = f" --guidance {config.sampling.guidance_scale:g}" if is_guided else ""
    return f"""---
license: {license}
library_name: shapediff
pipeline_tag: text-to-3d
tags:
- 3d
- diffusion
- mesh-generation
- shapediff
- voxels
---

# A shapediff model

Generates {config.resolution}^3 {config.field} grids of: {", ".join(config.classes)}.
{num_parameters / 1e6:.1f} million parameters ({named_to_dict(MODELS, config.model)["name"]}).

    python -m shapediff.sample --checkpoint THIS_FOLDER --class {first}{guidance}

    import shapediff

    pipeline = shapediff.ShapePipeline.from_pretrained("THIS_FOLDER")   # or its id on the hub: "user/name"
    pipeline(4, label={json.dumps(first, ensure_ascii=False)}).save("samples", format="glb")

## Training
{facts or "- not recorded"}
"""
