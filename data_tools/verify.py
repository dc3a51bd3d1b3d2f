"""Check each hash and shape of a data set, status 1 if one is damaged: python data_tools/verify.py DATASET"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":
    # The repository in place of this folder, whose inspect.py must not come before the standard library's.
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import argparse
from pathlib import Path

from rich.markup import escape

from data_tools import _cli
from shapediff.data.report import printable
from shapediff.data.verification import verify_dataset

_MAX_LISTED = 20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset", type=Path)
    args = parser.parse_args()
    report = verify_dataset(args.dataset)
    for damage in report.damaged:
        _cli.console.print(
            f"[bold red]{damage.file}[/]: {escape(printable(damage.reason))}", soft_wrap=True, highlight=False
        )
        for shape in damage.shapes[:_MAX_LISTED]:
            _cli.console.print(f"    {escape(printable(shape))}", soft_wrap=True, highlight=False)
        if len(damage.shapes) > _MAX_LISTED:
            _cli.console.print(f"    and {len(damage.shapes) - _MAX_LISTED} more")
    verdict = (
        f"[bold red]{len(report.damaged)} damaged[/]: prepare the data set again" if report.damaged else "all whole"
    )
    _cli.console.print(f"{report.num_shapes} shapes in {report.num_shards} shards, {verdict}")
    return 1 if report.damaged else 0


if __name__ == "__main__":
    _cli.run(main)
