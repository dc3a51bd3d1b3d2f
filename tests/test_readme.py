"""README.md and its translation: the same commands, sections, tables and links, so that neither is left behind."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "README.zh-CN.md")


def text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def commands(page: str) -> list[str]:
    """The indented lines, without comments: these are translated."""
    lines = re.findall(r"^    (.*)$", text(page), re.MULTILINE)
    return [re.sub(r"\s+# .*", "", line) for line in lines]


def links(page: str) -> set[str]:
    return set(re.findall(r"\]\(([^)]+)\)", text(page)))


def test_both_have_the_same_commands_sections_and_rows() -> None:
    assert commands(PAGES[0]) == commands(PAGES[1]) and len(commands(PAGES[0])) > 25
    for pattern in (r"^## ", r"^\|"):
        counts = [len(re.findall(pattern, text(page), re.MULTILINE)) for page in PAGES]
        assert counts[0] == counts[1] > 8, pattern


def figures(line: str) -> list[str]:
    """The numbers of a line, in order of size: words may stand elsewhere. 7.5 M is 750 万 and left out."""
    return sorted(re.findall(r"\d[\d,.]*\d|\d", re.sub(r"[\d.,]+ (M\b|万)", "", line)))


def test_both_have_the_same_figures_and_names_in_code() -> None:
    tables = [[line for line in text(page).splitlines() if line.startswith("|")] for page in PAGES]
    for one, other in zip(*tables, strict=True):
        assert figures(one) == figures(other), one
    names = [set(re.findall(r"`[^`\n]+`", text(page))) for page in PAGES]
    assert names[0] == names[1]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere_and_to_the_other_page(page: str) -> None:
    assert links(PAGES[0]) - {PAGES[1]} == links(PAGES[1]) - {PAGES[0]}
    assert next(other for other in PAGES if other != page) in links(page)
    for link in links(page):
        assert link.startswith("http") or (ROOT / link).exists(), link
