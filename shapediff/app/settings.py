"""What a visitor asks for, checked: whatever is posted, only these types and ranges come through."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from shapediff.config_io import unknown_name
from shapediff.diffusion.samplers import SAMPLERS
from shapediff.errors import ConfigError

MAX_SHAPES, MAX_STEPS, MAX_GUIDANCE, MAX_SEED = 16, 250, 20.0, 2**31 - 1
MAX_NAME = 200
"""No name of a class, checkpoint or format is longer; what is longer is not even compared."""

SAMPLING_FIELDS = ("guidance_scale", "num_steps", "sampler")
SIDES = ("bottom", "top", "left", "right", "back", "front")
NO_CLASS = "any"
"""How the page calls sampling without a class."""


@dataclass(frozen=True)
class Settings:
    """How to sample: `label` is a class, a mixture of classes {name: share}, or None for no class."""

    label: str | dict[str, float] | None
    num: int
    seed: int
    guidance_scale: float
    num_steps: int
    sampler: str
    mirror: str | None = None
    uses: Collection[str] = SAMPLING_FIELDS

    def options(self) -> dict[str, Any]:
        """The settings that every method of the pipeline takes by these names, of sampling those that the model `uses`."""
        sampling = {name: getattr(self, name) for name in SAMPLING_FIELDS if name in self.uses}
        return {"seed": self.seed, **sampling, **({"mirror": self.mirror} if self.mirror else {})}


def settings(
    classes: Collection[str],
    uses: Collection[str] = SAMPLING_FIELDS,
    *,
    label: Any,
    num: Any,
    seed: Any,
    guidance: Any,
    steps: Any,
    sampler: Any,
    mirror: Any,
) -> Settings:
    """The settings from the values of a form, for a model that `uses` these of sampling: the form has them all.

    Raises ConfigError, saying what is wrong with which, for people to read.
    """
    return Settings(
        label=None if label == NO_CLASS else one_of("class", label, classes),
        num=whole("number of shapes", num, 1, MAX_SHAPES),
        seed=whole("seed", seed, 0, MAX_SEED),
        guidance_scale=number("guidance", guidance, 0.0, MAX_GUIDANCE),
        num_steps=whole("steps", steps, 1, MAX_STEPS),
        sampler=one_of("sampler", sampler, SAMPLERS),
        mirror="x" if mirror is True else None,
        uses=uses,
    )


def mixture(classes: Collection[str], first: Any, second: Any, share: Any) -> str | dict[str, float]:
    """`share` in [0, 1] of class `second` in class `first`, as the pipeline takes it; one class where that is all of it."""
    first, second = one_of("first class", first, classes), one_of("second class", second, classes)
    share = number("share of the second class", share, 0.0, 1.0)
    if first == second or share == 0:
        return first
    return second if share == 1 else {first: 1 - share, second: share}


def number(name: str, value: Any, low: float, high: float) -> float:
    """A finite number in [low, high]."""
    if not _lies_in(value, low, high):
        raise ConfigError(f"{name}: use a number from {low:g} to {high:g}, not {_shown(value)}")
    return float(value)


def whole(name: str, value: Any, low: int, high: int) -> int:
    """A whole number in [low, high]; JavaScript may send it as 4.0."""
    if not _lies_in(value, low, high) or value != int(value):
        raise ConfigError(f"{name}: use a whole number from {low} to {high}, not {_shown(value)}")
    return int(value)


def one_of(name: str, value: Any, known: Collection[str]) -> str:
    """A name that is among the known ones."""
    if not isinstance(value, str) or len(value) > MAX_NAME:
        raise ConfigError(f"{name}: choose one of {', '.join(known)}, not {_shown(value)}")
    if value not in known:
        raise ConfigError(unknown_name(name, value, known))
    return value


def _lies_in(value: Any, low: float, high: float) -> bool:
    """Whether it is a number and in [low, high], as NaN is not. Compared before anything is computed: it may be 10**400."""
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def _shown(value: Any) -> str:
    if isinstance(value, int) and value.bit_length() > 64:  # Python refuses to write out the largest
        return "a number that large"
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
