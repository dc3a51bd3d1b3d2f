"""From a cold start to .obj files: `python -m shapediff.sample` beside MONAI's DiffusionInferer with its DDIM, 50 steps each.

    python benchmarks/sampling.py [--num 4] [--threads 2] [--out FILE.md]

Each side is a process of its own, timed from its start to its end, that reads weights of the same UNet (widths, blocks and
attention), samples without guidance and writes meshes. Both networks are set to answer "inside" everywhere, so that the meshes
are alike, a whole cube, and the arithmetic is that of any other weights. Needs: pip install --no-deps monai.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parent))
from denoiser import RESOLUTION, Flat, ours

NUM_STEPS = 50
MONAI_SETTINGS = {"float32, as it comes": (), "bf16, channels_last": ("--fast",)}
# Weights that answer alike come out alike in any batch; others do not in float32, and are sampled one at a time.
OUR_SETTINGS = {"float32": ("--precision", "float32", "--batch-size", "1"), "as it comes (bf16)": ()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="also write what is printed here")
    parser.add_argument("--monai", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--fast", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.monai:
        _sample_by_monai(args.monai, args.num, fast=args.fast)
        return
    lines = _compare(args.num, args.threads)
    if args.out:
        args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _compare(num: int, threads: int) -> list[str]:
    lines: list[str] = []

    def say(line: str) -> None:
        lines.append(line)
        print(line, flush=True)

    say(f"`python {' '.join(sys.argv)}`\n")
    say(
        f"{num} shapes of {RESOLUTION}^3, DDIM {NUM_STEPS}, {threads} threads, torch {torch.__version__}, {platform.machine()}.\n"
    )
    say("| | seconds | times MONAI as it comes |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_weights(folder)
        commands = {
            f"MONAI DiffusionInferer, {setting}": [__file__, "--monai", str(folder), "--num", str(num), *more]
            for setting, more in MONAI_SETTINGS.items()
        }
        sample = ["-m", "shapediff.sample", "--checkpoint", str(folder), "--class", "cube", "--guidance", "1"]
        sample += ["--num", str(num), "--steps", str(NUM_STEPS), "--out"]
        commands |= {
            f"shapediff.sample, {setting}": [*sample, str(folder / f"ours-{i}"), *more]
            for i, (setting, more) in enumerate(OUR_SETTINGS.items())
        }
        first = None
        for who, command in commands.items():
            seconds = _time(command, threads)
            first = first or seconds
            say(f"| {who} | {seconds:.1f} | {first / seconds:.2f} |")
        assert len(list((folder / "ours-0").glob("*.obj"))) == len(list((folder / "monai").glob("*.obj"))) == num
    return lines


def _time(command: list[str], threads: int) -> float:
    started = time.perf_counter()
    root = str(Path(__file__).resolve().parents[1])
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": root}
    subprocess.run([sys.executable, *command], check=True, env=environment, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def _write_weights(folder: Path) -> None:
    """An export of ours and a file of MONAI's weights, both predicting x_0 = 1."""
    from shapediff.checkpoint import ExportConfig, write_export
    from shapediff.methods import VoxelDiffusionConfig

    torch.manual_seed(0)
    net, theirs = ours(), Flat()
    for last in (net.conv_out, theirs.net.out[-1].conv):
        torch.nn.init.zeros_(last.weight)
        torch.nn.init.ones_(last.bias)
    config = ExportConfig(
        resolution=RESOLUTION,
        field="occupancy",
        classes=("cube", "other"),
        method=VoxelDiffusionConfig(prediction="x0"),
        model=net.config,
    )
    write_export(folder / "export", config, {"denoiser": net.state_dict()}, dtype=torch.float32)
    save_file(theirs.net.state_dict(), folder / "monai.safetensors")


@torch.inference_mode()
def _sample_by_monai(folder: Path, num: int, *, fast: bool) -> None:
    """As its tutorials do it: one batch, then marching cubes and trimesh."""
    import trimesh
    from monai.inferers import DiffusionInferer
    from monai.networks.schedulers import DDIMScheduler
    from skimage.measure import marching_cubes

    net = Flat().net.eval()
    net.load_state_dict(load_file(folder / "monai.safetensors"))
    if fast:
        net.to(memory_format=torch.channels_last_3d)
    scheduler = DDIMScheduler(num_train_timesteps=1000, prediction_type="sample")
    scheduler.set_timesteps(num_inference_steps=NUM_STEPS)
    noise = torch.randn(num, 1, *(RESOLUTION,) * 3)
    labelled = _Labelled(net, torch.zeros(num, dtype=torch.long))
    with torch.autocast("cpu", torch.bfloat16) if fast else nullcontext():
        voxels = DiffusionInferer(scheduler).sample(noise, labelled, scheduler, verbose=False)
    (folder / "monai").mkdir(exist_ok=True)
    for i, signal in enumerate(voxels[:, 0].float().numpy()):
        padded = torch.nn.functional.pad(torch.from_numpy(signal), [1] * 6, value=-1.0).numpy()
        vertices, faces, *_ = marching_cubes(padded, 0.0)
        trimesh.Trimesh(vertices, faces).export(folder / "monai" / f"{i}.obj")


class _Labelled(torch.nn.Module):
    """The network with its class given, which the inferer does not pass on."""

    def __init__(self, net: torch.nn.Module, label: torch.Tensor) -> None:
        super().__init__()
        self.net, self.label = net, label

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor, context: None = None) -> torch.Tensor:
        return self.net(x, timesteps=timesteps, class_labels=self.label)


if __name__ == "__main__":
    main()
