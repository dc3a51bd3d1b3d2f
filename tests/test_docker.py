"""The Dockerfile cannot be built here; these hold what goes wrong most: what it installs and what it copies."""

from __future__ import annotations

import re
from fnmatch import fnmatch

from tests.conftest import ROOT

DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")


def instructions(name: str) -> list[str]:
    return re.findall(rf"^{name} +(.*)$", DOCKERFILE, re.MULTILINE)


def test_it_installs_the_packages_that_setup_looks_for() -> None:
    setup = (ROOT / "tools" / "setup.sh").read_text(encoding="utf-8")
    needed = {*re.findall(r"need_library \S+ (\S+)", setup), "g++"}
    assert len(needed) == 6
    (line,) = [line for line in instructions("RUN") if "apt-get install" in line]
    assert needed <= set(line.split())


def test_what_it_copies_is_there_and_not_left_out() -> None:
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    for line in instructions("COPY"):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists()
            assert not any(fnmatch(part, pattern) for pattern in ignored for part in source.split("/") if part != ".")
    for needed in ("shapediff/data", "shapediff/pretrained", "conf/data", "data_tools", "launch"):
        top = needed.split("/")[0]
        assert not any(fnmatch(top, pattern) for pattern in ignored)


def test_it_ends_as_a_user_without_rights() -> None:
    assert instructions("USER") == ["shapediff"]
    assert DOCKERFILE.index("\nUSER ") > DOCKERFILE.rindex("\nRUN ")
