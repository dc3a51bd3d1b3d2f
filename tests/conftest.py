"""What the tests share."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # launch/ and data_tools/ are not installed

torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """A folder of real meshes and grids: SHAPEDIFF_TEST_DATA, or shared/data beside the repository."""
    path = Path(os.environ.get("SHAPEDIFF_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"no real data at {path}; set SHAPEDIFF_TEST_DATA to a folder that holds some")
    return path


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked gpu need one."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
