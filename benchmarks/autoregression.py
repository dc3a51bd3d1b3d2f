"""Drawing a shape token by token: with a cache of keys and values, with one that is copied at each step, and without any.

    python benchmarks/autoregression.py [--resolution 32] [--model octree_small] [--threads 1] [--device cpu] [--out FILE.md]

All sides walk the tokens of the same procedural chair, which the network is made to choose, guided (two rows a shape), so that
the lengths are those of real shapes whatever the weights. Without a cache every step sees the whole sequence again; every eighth
step is measured, and counts eight times. Each time is the least of `--repeats`, on a CPU in seconds of the process: what it
computes, whatever else the machine does. The last rows are the sampler itself, `OctreeAutoregression.sample`, with all that it
does beside the network.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from shapediff.data.shapes import make_shape
from shapediff.diffusion.editing import Edit
from shapediff.geometry.voxelize import voxelize
from shapediff.grid.morton import dense_to_morton
from shapediff.methods import OctreeAutoregression, OctreeAutoregressionConfig, SampleConfig
from shapediff.methods.octree_sequence import Sequences, sequences_of
from shapediff.models import PRESETS, OctreeTransformerConfig
from shapediff.models.octree_transformer import Cache, Nodes, OctreeTransformer

NUM_CLASSES = 12
STRIDE = 8


class CopiedCache(Cache):
    """The plain way: everything is copied whenever an element is added."""

    def __init__(self) -> None:
        self._pairs: list[tuple[torch.Tensor, torch.Tensor]] = []

    def extend(self, block: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if block == len(self._pairs):
            self._pairs.append((k, v))
        else:
            before_k, before_v = self._pairs[block]
            self._pairs[block] = torch.cat([before_k, k], 2), torch.cat([before_v, v], 2)
        return self._pairs[block]


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resolution", type=int, default=32)
    parser.add_argument("--model", default="octree_small")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="also write what is printed here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    lines: list[str] = []

    def say(line: str) -> None:
        lines.append(line)
        print(line, flush=True)

    torch.manual_seed(0)
    method = OctreeAutoregressionConfig().build(resolution=args.resolution, num_classes=NUM_CLASSES)
    model = PRESETS[args.model]
    assert isinstance(model, OctreeTransformerConfig)
    network = model.build(resolution=args.resolution, num_classes=NUM_CLASSES).to(args.device).eval()
    chair = _chair(args.resolution).to(args.device)
    sequence = sequences_of(chair, method.tokenizer)
    num = sequence.tokens.shape[1]
    where = torch.cuda.get_device_name() if args.device.startswith("cuda") else platform.machine()
    say(f"`python {' '.join(sys.argv)}`\n")
    say(
        f"A chair of {args.resolution}^3 in {num} tokens, {args.model}, guided, float32, {args.threads} threads, "
        f"torch {torch.__version__}, {where}.\n"
    )
    say("| | seconds a shape | tokens a second | times without a cache |\n|---|---|---|---|")
    labels = torch.tensor([0, NUM_CLASSES], device=args.device)
    without = STRIDE * _least(lambda: _uncached(network, sequence, labels), 1, args.device)
    say(f"| without a cache | {without:.2f} | {num / without:.0f} | 1.0 |")
    for name, cache in (("cache, copied at each step", CopiedCache), ("cache with room to grow", Cache)):
        seconds = _least(lambda cache=cache: _cached(network, sequence, labels, cache()), args.repeats, args.device)
        say(f"| {name} | {seconds:.2f} | {num / seconds:.0f} | {without / seconds:.1f} |")
    for together in (1, 8):
        seconds = _least(lambda n=together: _sampled(method, network, chair, n), args.repeats, args.device) / together
        say(f"| the sampler, {together} together | {seconds:.2f} | {num / seconds:.0f} | {without / seconds:.1f} |")
    if args.out:
        args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _chair(resolution: int) -> torch.Tensor:
    mesh = make_shape("chair", seed=0).mesh
    return dense_to_morton(torch.from_numpy(2.0 * voxelize(mesh, resolution=resolution) - 1))[None].float()


def _at(nodes: Nodes, start: int, end: int) -> Nodes:
    return nodes.map(lambda value: value[:, start:end].repeat(2, *[1] * (value.ndim - 1)))


def _cached(network: OctreeTransformer, s: Sequences, labels: torch.Tensor, cache: Cache) -> None:
    for i in range(s.tokens.shape[1]):
        network(s.before[:, i : i + 1].repeat(2, 1), _at(s.sources, i, i + 1), _at(s.nodes, i, i + 1), labels, cache)


def _uncached(network: OctreeTransformer, s: Sequences, labels: torch.Tensor) -> None:
    for i in range(STRIDE // 2, s.tokens.shape[1], STRIDE):
        network(s.before[:, : i + 1].repeat(2, 1), _at(s.sources, 0, i + 1), _at(s.nodes, 0, i + 1), labels)


def _sampled(method: OctreeAutoregression, network: OctreeTransformer, chair: torch.Tensor, num: int) -> None:
    """`num` shapes together, all of whose voxels are given."""
    edit = Edit(x_0=chair[0], keep=torch.ones(chair.shape[1], dtype=torch.bool))
    labels = torch.zeros(num, dtype=torch.long, device=chair.device)
    found = method.sample({"transformer": network}, labels, range(num), config=SampleConfig(), edit=edit)
    assert torch.equal(found, chair.expand(num, -1).sign())


def _least(work: Callable[[], None], repeats: int, device: str) -> float:
    times, clock = [], time.process_time if device == "cpu" else time.perf_counter
    for _ in range(repeats):
        started = clock()
        work()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        times.append(clock() - started)
    return min(times)


if __name__ == "__main__":
    main()
