"""A small 3D classifier: whether a shape looks like its class, and features in which sets of shapes are compared.

It is trained on the same data, always in the same way, and kept beside the data set, so that all models on that data are judged
by one set of weights. Its figures are comparable between runs that used the same file, and between no others.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float32, Int64
from safetensors.torch import load_file, save
from torch import Tensor, nn

from shapediff.evaluation.points import Grids
from shapediff.files import replaced_file
from shapediff.hardware import fast_bf16

VERSION = 1
"""Counted up with any change that makes other weights or other features."""

WIDTHS = (16, 32, 48, 64)
NUM_SEEN, BATCH_SIZE, PEAK_RATE, SEED = 16_000, 32, 2e-3, 0
NUM_FEATURES = sum(WIDTHS[1:])
MIN_SIDE, MAX_SIDE = 16, 32
"""Finer grids are pooled to this by the mean first, coarser ones repeated: four halvings need 16."""


class ShapeClassifier(nn.Module):
    """Four stages of convolutions, each half as fine as the one before, and a linear layer on the means of
    the channels of the last three.

    Those means, in units of their spread over the training set, are the features: the earlier stages see surfaces, the last one
    sees what a thing is. None of them sees a few stray voxels; the number of parts does.
    """

    feature_mean: Tensor
    feature_scale: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        widths = (1, *WIDTHS)
        self.stages = nn.ModuleList(_stage(before, after) for before, after in zip(widths, WIDTHS, strict=False))
        self.head = nn.Linear(NUM_FEATURES, num_classes)
        self.register_buffer("feature_mean", torch.zeros(NUM_FEATURES))
        self.register_buffer("feature_scale", torch.ones(NUM_FEATURES))

    def pooled(self, signal: Float[Tensor, "b 1 x y z"]) -> Float[Tensor, "b d"]:
        """The means, before they are scaled."""
        means = []
        for stage in self.stages:
            signal = stage(signal)
            means.append(signal.float().mean((2, 3, 4)))
        return torch.cat(means[1:], 1)

    def forward(self, signal: Float[Tensor, "b 1 x y z"]) -> Float[Tensor, "b classes"]:
        return self.head(self.pooled(signal))


def _stage(before: int, after: int) -> nn.Module:
    finer, same = nn.Conv3d(before, after, 3, stride=2, padding=1), nn.Conv3d(after, after, 3, padding=1)
    first = [finer, nn.GroupNorm(4, after), nn.SiLU()]
    # The finest stage would take most of the time.
    return nn.Sequential(*first) if before == 1 else nn.Sequential(*first, same, nn.GroupNorm(4, after), nn.SiLU())


class Judge:
    """A trained classifier."""

    def __init__(self, net: ShapeClassifier) -> None:
        self._net = net.eval()

    @torch.inference_mode()
    def judge(self, grids: Grids) -> tuple[Float32[np.ndarray, "n d"], Int64[np.ndarray, " n"]]:
        """(features (n, d), the most likely label of each), in float32."""
        parts = [self._net.pooled(as_signal(grids[i : i + 256])) for i in range(0, len(grids), 256)]
        pooled = torch.cat(parts) if parts else torch.zeros(0, NUM_FEATURES)
        features = (pooled - self._net.feature_mean) / self._net.feature_scale
        return features.numpy(), self._net.head(pooled).argmax(1).numpy()


def trained_classifier(
    grids: Grids,
    labels: Int64[np.ndarray, " n"],
    num_classes: int,
    *,
    path: Path,
    num_seen: int = NUM_SEEN,
) -> Judge:
    """The classifier in the file `path`, trained on these shapes and written there first if there is none."""
    if not path.exists():
        weights = train(grids, labels, num_classes, num_seen=num_seen).state_dict()
        with replaced_file(path) as partial:
            partial.write_bytes(save({name: value.contiguous() for name, value in weights.items()}))
    net = ShapeClassifier(num_classes)
    net.load_state_dict(load_file(path))
    return Judge(net)


def fingerprint(grids: Grids, labels: Int64[np.ndarray, " n"]) -> str:
    """What the weights follow from: the training shapes, their labels and this file's version."""
    digest = hashlib.sha256(f"classifier {VERSION} {grids.shape}".encode())
    digest.update(np.packbits(grids).tobytes())
    digest.update(labels.astype("<i8").tobytes())
    return digest.hexdigest()[:16]


def train(
    grids: Grids, labels: Int64[np.ndarray, " n"], num_classes: int, *, num_seen: int = NUM_SEEN
) -> ShapeClassifier:
    """Train on `num_seen` shapes, some mirrored in x: AdamW under a cosine, in bf16 where that is fast."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        net = ShapeClassifier(num_classes).to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    draw = np.random.default_rng(SEED)
    num_steps = math.ceil(num_seen / BATCH_SIZE)
    optimizer = torch.optim.AdamW(net.parameters(), lr=PEAK_RATE, weight_decay=0.01)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    device = torch.device("cpu")
    for _ in range(num_steps):
        rows = draw.integers(len(grids), size=BATCH_SIZE)
        signal = as_signal(_mirrored(grids[rows], draw))
        with torch.autocast(device.type, torch.bfloat16, enabled=fast_bf16(device)):
            loss = F.cross_entropy(net(signal).float(), torch.from_numpy(labels[rows]), label_smoothing=0.05)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        rate.step()
    _set_units(net.eval(), grids)
    return net


def as_signal(grids: Grids) -> Float[Tensor, "n 1 r r r"]:
    """-1 outside, 1 inside, at MIN_SIDE to MAX_SIDE voxels a side."""
    signal = torch.from_numpy(np.ascontiguousarray(grids))[:, None].float() * 2 - 1
    side = signal.shape[-1]
    if side > MAX_SIDE:
        signal = F.avg_pool3d(signal, side // MAX_SIDE)
    elif side < MIN_SIDE:
        signal = F.interpolate(signal, scale_factor=MIN_SIDE // side)
    return signal.contiguous(memory_format=torch.channels_last_3d)


def _mirrored(grids: Grids, draw: np.random.Generator) -> Bool[np.ndarray, "n r r r"]:
    flips = draw.random(len(grids)) < 0.5
    return np.where(flips[:, None, None, None], grids[:, ::-1], grids)


@torch.inference_mode()
def _set_units(net: ShapeClassifier, grids: Grids) -> None:
    chosen = np.random.default_rng(SEED).permutation(len(grids))[:2048]
    pooled = torch.cat(
        [net.pooled(as_signal(grids[rows])) for rows in np.array_split(chosen, max(1, len(chosen) // 128))]
    )
    net.feature_mean.copy_(pooled.mean(0))
    net.feature_scale.copy_(pooled.std(0, unbiased=False).clamp(min=1e-6))
