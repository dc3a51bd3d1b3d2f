"""From a cold start to files on disk, part by part: `python -m shapediff.sample --class chair --guidance 3 --num 8`.

    python benchmarks/cold_start.py --checkpoint RUN [--num 8] [--threads 2] [--repeats 3] [--cpu] [--out FILE.md] [-- more ...]

The command is run as users run it, and once more with a clock around its parts; of several repeats the least of each counts.
Files of the operating system's cache are warm; Python, torch and all the rest start anew each time. --cpu counts the seconds that
processors work in place of those that pass: with one thread the same, and on a machine that does other things the fairer ones.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
IMPORT_LIMIT, SHAPE_LIMIT = 2.0, 1.0


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        _run_with_clocks(float(sys.argv[2]), sys.argv[3:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--class", dest="label", default="chair")
    parser.add_argument("--num", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cpu", action="store_true", help="seconds of the processor")
    parser.add_argument("--out", type=Path, help="also write what is printed here")
    parser.add_argument("more", nargs="*", help="more arguments of shapediff.sample")
    args = parser.parse_args()
    asked = [
        "--checkpoint",
        args.checkpoint,
        "--class",
        args.label,
        "--guidance",
        "3",
        "--num",
        str(args.num),
        *args.more,
    ]
    os.environ["CLOCK"] = "process_time" if args.cpu else "perf_counter"
    whole = min(_run(["-m", "shapediff.sample", *asked], args.threads)[0] for _ in range(args.repeats))
    runs = [_run([__file__, "--child", "START", *asked], args.threads)[1] for _ in range(args.repeats)]
    parts = {name: min(run[name] for run in runs) for name in runs[0]}
    lines = _table(args, whole, parts)
    print("\n".join(lines))
    if args.out:
        args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _table(args: argparse.Namespace, whole: float, parts: dict[str, float]) -> list[str]:
    denoiser = parts["the denoiser"]
    rest = (whole - denoiser) / args.num
    import torch

    return [
        f"`python {' '.join(sys.argv)}`\n",
        f"{args.num} shapes, {args.threads} threads, torch {torch.__version__}, {platform.machine()}; "
        f"the least of {args.repeats} runs.\n",
        f"| part | {'processor seconds' if args.cpu else 'seconds'} |",
        "|---|---|",
        *(f"| {name} | {seconds:.2f} |" for name, seconds in parts.items()),
        f"| **the whole command** | **{whole:.2f}** |",
        "",
        f"- import: {parts['import shapediff.sample']:.2f} s of {IMPORT_LIMIT:g} s allowed",
        f"- all but the denoiser: {rest:.2f} s a shape of {SHAPE_LIMIT:g} s allowed",
        f"- the denoiser: {denoiser / args.num:.2f} s a shape",
    ]


def _run(command: list[str], threads: int) -> tuple[float, dict[str, float]]:
    """(seconds from start to end, what a child with clocks says)."""
    with tempfile.TemporaryDirectory() as folder:
        clocks = Path(folder) / "clocks.json"
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT), "CLOCKS": str(clocks)}
        started, worked = time.time(), _children()
        filled = [str(started) if word == "START" else word for word in command]
        subprocess.run(
            [sys.executable, *filled, "--out", str(Path(folder) / "out")],
            check=True, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        seconds = _children() - worked if os.environ["CLOCK"] == "process_time" else time.time() - started
        return seconds, json.loads(clocks.read_text()) if clocks.exists() else {}


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _run_with_clocks(started: float, arguments: list[str]) -> None:
    now: Callable[[], float] = getattr(time, os.environ["CLOCK"])
    seconds: dict[str, list[float]] = defaultdict(list)
    seconds["Python itself"].append(now() if now is time.process_time else time.time() - started)
    begun = now()
    from shapediff import gallery, pipeline, sample
    from shapediff.methods import VoxelDiffusion

    imported = now()
    seconds["import shapediff.sample"].append(imported - begun)

    def clock(owner: Any, name: str, part: str) -> None:
        function: Callable[..., Any] = getattr(owner, name)

        @wraps(function)
        def timed(*args: Any, **options: Any) -> Any:
            before = now()
            try:
                return function(*args, **options)
            finally:
                seconds[part].append(now() - before)

        setattr(owner, name, timed)

    clock(sample, "_request", "hashes of the checkpoint")
    clock(pipeline, "read_export", "reading the checkpoint")
    clock(VoxelDiffusion, "sample", "the denoiser")
    clock(pipeline.Shapes, "_save_one", "a mesh and its file")
    clock(gallery.Gallery, "add", "its line")
    clock(gallery.Gallery, "merge", "the manifest")

    assert sample.main(arguments) == 0
    all_of_it = now() - begun
    first, *further = seconds.pop("a mesh and its file")
    seconds["the first mesh, with what it imports"], seconds["all further meshes"] = [first], further
    parts = {name: sum(values) for name, values in seconds.items()}
    parts["anything else"] = all_of_it - sum(parts.values()) + parts["Python itself"]
    Path(os.environ["CLOCKS"]).write_text(json.dumps(parts))


if __name__ == "__main__":
    main()
