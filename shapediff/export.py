"""Export a run from its saved states: `python -m shapediff.export RUN [--out DIR]`. Needs neither DeepSpeed nor a GPU."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from shapediff.engine.exporting import export_run
from shapediff.errors import ShapediffError


def parser() -> argparse.ArgumentParser:
    """The command line of exporting."""
    p = argparse.ArgumentParser(prog="python -m shapediff.export", description=__doc__)
    p.add_argument("run", type=Path, metavar="RUN", help="the folder of a run, also one that is still going on")
    p.add_argument("--out", type=Path, help="folder to write (default: RUN/export)")
    p.add_argument("--step", type=int, help="the state of that step (default: the newest that is intact)")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    args = parser().parse_args(arguments)
    try:
        print(f"exported to {export_run(args.run, args.out, step=args.step)}")
        return 0
    except ShapediffError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
