"""What a shape is asked to be: a class, a mixture of classes, or nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from shapediff.config_io import unknown_name
from shapediff.errors import ConfigError

Label = str | Mapping[str, float] | None
"""A class, a mixture of classes with weights above 0 (brought to the sum 1), or None: of no class."""


def label_weights(label: Label, classes: Sequence[str]) -> list[float]:
    """The weights of all classes and, last, of none. Raises ConfigError for a class that there is not, or no weight at all."""
    if label is None:
        return [0.0] * len(classes) + [1.0]
    mixture = {label: 1.0} if isinstance(label, str) else label
    for name, weight in mixture.items():
        if name not in classes:
            raise ConfigError(unknown_name("class", name, classes))
        if not 0 <= weight < math.inf:
            raise ConfigError(f"the weight {weight} of class {name!r} must be a number, 0 or more")
    total = math.fsum(mixture.values())
    if not total > 0:
        raise ConfigError(f"the weights of {label_text(label)!r} add up to {total}; give one class more than 0")
    return [mixture.get(name, 0.0) / total for name in classes] + [0.0]


def label_text(label: Label) -> str | None:
    """The label as people write it: chair, or chair:0.7,sofa:0.3."""
    if label is None or isinstance(label, str):
        return label
    used = {name: weight for name, weight in label.items() if weight}
    return next(iter(used)) if len(used) == 1 else ",".join(f"{name}:{weight:.4g}" for name, weight in used.items())


def shape_name(label: Label, number: int, edit: str | None = None) -> str:
    """What shape `number` of a label, or of an edit, is called, in the manifest and as a file."""
    if edit == "interpolate":
        return f"interpolate_{number:04d}"
    used = [label or "shape"] if not isinstance(label, Mapping) else _parts(label)
    return "_".join(["+".join(used), *([edit] if edit else []), f"{number:04d}"])


def _parts(mixture: Mapping[str, float]) -> list[str]:
    """chair0.7, sofa0.3: other weights are other shapes, and have other names."""
    used = {name: weight for name, weight in mixture.items() if weight}
    return (
        list(used) if len(used) == 1 else [f"{name}{str(weight).removesuffix('.0')}" for name, weight in used.items()]
    )
