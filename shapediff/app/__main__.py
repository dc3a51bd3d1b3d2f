"""Generate and edit shapes in the browser: `python -m shapediff.app`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from shapediff.app.checkpoints import Checkpoints
from shapediff.errors import ShapediffError


def parser() -> argparse.ArgumentParser:
    """The command line of the page."""
    p = argparse.ArgumentParser(prog="python -m shapediff.app", description=__doc__)
    p.add_argument(
        "--checkpoints", type=Path, default=Path("runs"), help="a folder of runs and exports to offer (default runs/)"
    )
    p.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: a GPU if there is one)")
    p.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen at; the default is this machine alone, 0.0.0.0 lets the network in, without a password",
    )
    p.add_argument("--port", type=int, default=7860, help="default 7860")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = parser().parse_args(arguments)
    try:
        checkpoints = Checkpoints(args.checkpoints, device=args.device)
        found = checkpoints.names()
    except ShapediffError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        from shapediff.app.server import serve, studio_in_own_folder
    except ImportError as error:
        print(
            f"error: the page needs more packages ({error.name}): pip install 'shapediff[demo,mesh]'", file=sys.stderr
        )
        return 2
    with studio_in_own_folder(checkpoints) as studio:
        print(f"{len(found)} models under {args.checkpoints}; open http://{args.host}:{args.port} (Ctrl-C ends it)")
        serve(studio, host=args.host, port=args.port)
    return 0


if __name__ == "__main__":
    sys.exit(main())
