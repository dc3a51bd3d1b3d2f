"""What is posted is anything: only types and ranges that are meant come through, and an error says which."""

from __future__ import annotations

from typing import Any

import pytest

from shapediff.app.settings import MAX_SHAPES, MAX_STEPS, NO_CLASS, Settings, mixture, settings
from shapediff.errors import ConfigError

CLASSES = ("chair", "sofa")
FORM: dict[str, Any] = {
    "label": "chair",
    "num": 4,
    "seed": 0,
    "guidance": 3.0,
    "steps": 50,
    "sampler": "ddim",
    "mirror": False,
}


def test_what_is_meant_comes_through() -> None:
    expected = Settings(label="chair", num=4, seed=0, guidance_scale=3.0, num_steps=50, sampler="ddim")
    assert settings(CLASSES, **FORM) == expected
    assert settings(CLASSES, **{**FORM, "num": 4.0, "steps": 50.0}) == expected  # JavaScript has no whole numbers
    assert settings(CLASSES, **{**FORM, "label": NO_CLASS}).label is None
    assert settings(CLASSES, **{**FORM, "mirror": True}).options()["mirror"] == "x"
    assert "mirror" not in expected.options()


NOT_WHOLE = [-1, 2.5, float("nan"), float("inf"), True, None, "4", [4], {"a": 1}, 10**400]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("num", value) for value in [0, MAX_SHAPES + 1, *NOT_WHOLE]),
        *(("steps", value) for value in [0, MAX_STEPS + 1, *NOT_WHOLE]),
        *(("seed", value) for value in [2**31, *NOT_WHOLE]),
        *(("guidance", value) for value in [-0.1, 20.1, float("nan"), float("-inf"), True, None, "3", 10**400]),
        *(("label", value) for value in ["chiar", "../../etc", "", None, 3, ["chair"], {"chair": 1}, "a" * 10**6]),
        *(("sampler", value) for value in ["euler", "__class__", None, 1]),
    ],
)
def test_what_is_not_meant_is_refused_by_name(field: str, value: Any) -> None:
    names = {"num": "number of shapes", "label": "class"}
    with pytest.raises(ConfigError, match=names.get(field, field)) as error:
        settings(CLASSES, **{**FORM, field: value})
    assert len(str(error.value)) < 200


def test_a_number_that_python_will_not_write_out_is_refused_too() -> None:
    with pytest.raises(ConfigError, match="a number that large"):
        settings(CLASSES, **{**FORM, "seed": 10**5000})


def test_a_mixture_at_its_ends_is_one_class() -> None:
    assert mixture(CLASSES, "chair", "sofa", 0.25) == {"chair": 0.75, "sofa": 0.25}
    assert mixture(CLASSES, "chair", "sofa", 0) == "chair"
    assert mixture(CLASSES, "chair", "sofa", 1) == "sofa"
    assert mixture(CLASSES, "chair", "chair", 0.5) == "chair"
    with pytest.raises(ConfigError, match="share"):
        mixture(CLASSES, "chair", "sofa", float("nan"))
