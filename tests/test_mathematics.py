"""docs/mathematics.md and its translation: every name exists, every example runs, and both say the same formulas."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import pytest
import torch

from shapediff.diffusion.schedule import NoiseScheduleConfig

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGES = ("mathematics.md", "mathematics.zh.md")


def text(page: str) -> str:
    return (DOCS / page).read_text(encoding="utf-8")


def names(page: str) -> list[str]:
    return re.findall(r"\[`(shapediff[\w.]+)`\]", text(page))


def examples(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text(page), re.DOTALL)


def resolve(name: str) -> object:
    """What a dotted name stands for: the longest part of it that is a module, then attributes."""
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found: object = import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[cut:]:
            found = getattr(found, attribute)
        return found
    raise ModuleNotFoundError(name)


@pytest.mark.parametrize("page", PAGES)
def test_every_name_exists(page: str) -> None:
    assert len(names(page)) > 20
    for name in names(page):
        assert callable(resolve(name)), name


def test_a_name_that_does_not_exist_is_found() -> None:
    with pytest.raises(AttributeError):
        resolve("shapediff.diffusion.gaussian.no_such_function")


@pytest.mark.parametrize("number", range(len(examples(PAGES[0]))))
def test_examples_run(number: int) -> None:
    torch.manual_seed(0)
    exec(compile(examples(PAGES[0])[number], f"example {number}", "exec"), {})


@pytest.mark.parametrize("page", PAGES)
def test_the_cosine_curve_of_the_page_is_that_of_the_code(page: str) -> None:
    """With t from 0, as the page counts: all but the last entry, whose beta the page says is cut."""
    (row,) = (line for line in text(page).splitlines() if line.startswith("| cosine |"))
    match = re.search(r"= f\(t(\+\d+)?\)/f\(0\)", row)
    assert match and "0.999" in row
    schedule = NoiseScheduleConfig("cosine").build()
    t = torch.arange(1001, dtype=torch.float64)
    f = torch.cos(torch.pi / 2 * (t / 1000 + 0.008) / 1.008) ** 2
    expected = f[int(match[1] or 0) :][:1000] / f[0]
    torch.testing.assert_close(schedule.alphas_cumprod[:-1], expected[:-1], rtol=1e-9, atol=0)
    assert float(schedule.betas[-1]) == pytest.approx(0.999, rel=1e-9)


def test_the_translation_has_the_same_functions_examples_and_displayed_formulas() -> None:
    one, other = PAGES
    assert names(one) == names(other) and examples(one) == examples(other)
    displayed = [re.findall(r"^\$\$(.*?)\$\$$", text(page), re.DOTALL | re.MULTILINE) for page in PAGES]
    without_words = [[re.sub(r"\\text\{.*?\}", "", formula) for formula in formulas] for formulas in displayed]
    assert without_words[0] == without_words[1] and len(displayed[0]) > 8
