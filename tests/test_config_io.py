"""Configs through plain dictionaries: what goes out comes back, and what is wrong is named."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Literal

import pytest

from shapediff.config_io import from_dict, named_from_dict, named_to_dict, to_dict
from shapediff.errors import ConfigError
from shapediff.methods import METHODS
from shapediff.models import MODELS


@dataclass(frozen=True)
class Inner:
    kind: Literal["a", "b"] = "a"
    sizes: tuple[int, ...] = (1, 2)


@dataclass(frozen=True)
class Outer:
    rate: float = 0.5
    name: str = "x"
    limit: int | None = None
    pair: tuple[float, float] = (0.9, 0.99)
    inner: Inner = field(default_factory=Inner)
    weights: dict[str, int] | None = None

    def __post_init__(self) -> None:
        if self.rate < 0:
            raise ValueError("rate must not be negative")


def test_round_trip_through_json() -> None:
    config = Outer(rate=1.5, name="y", limit=3, pair=(0.1, 0.2), inner=Inner("b", (3,)), weights={"a": 2, "b": 0})
    assert from_dict(Outer, json.loads(json.dumps(to_dict(config)))) == config
    assert from_dict(Outer, {}) == Outer()
    assert from_dict(Outer, {"rate": 2}) == Outer(rate=2.0)


@pytest.mark.parametrize("table", [MODELS, METHODS])
def test_every_named_config_comes_back(table: dict[str, type]) -> None:
    for name, cls in table.items():
        plain = named_to_dict(table, cls())
        assert plain["name"] == name
        assert named_from_dict(table, json.loads(json.dumps(plain)), path="p") == cls()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"rte": 1}, r"'rte' is unknown; did you mean 'rate'\?.*inner"),
        ({"rate": "fast"}, "rate: expected float, found 'fast'"),
        ({"rate": True}, "rate: expected float"),
        ({"rate": float("nan")}, "rate: expected a finite number"),
        ({"rate": -1}, "rate must not be negative"),
        ({"limit": 1.5}, "limit: expected int"),
        ({"pair": [1]}, "pair: expected 2 values, found 1"),
        ({"inner": {"kind": "c"}}, "inner.kind 'c' is unknown"),
        ({"inner": {"sizes": 3}}, r"inner.sizes: expected a list such as \[1, 2\], found 3"),
        ({"inner": {"sizes": [1, "x"]}}, r"inner.sizes\[1\]: expected int"),
        ({"weights": {"a": "x"}}, "weights.a: expected int"),
        ({"weights": [1]}, "weights: expected names with values"),
        ({"inner": 3}, "inner: expected settings, found 3"),
    ],
)
def test_what_is_wrong_is_named(data: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_dict(Outer, data)


def test_a_file_can_never_name_code() -> None:
    for name in ("os.system", "shapediff.models.UNet3D", "", None):
        with pytest.raises(ConfigError, match="unknown"):
            named_from_dict(MODELS, {"name": name}, path="model")
    with pytest.raises(ConfigError, match="_target_"):
        named_from_dict(MODELS, {"name": "unet3d", "_target_": "os.system"}, path="model")
