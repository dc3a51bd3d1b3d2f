"""Presets and what they cost, computed without weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import hydra
import pytest
import torch
from omegaconf import OmegaConf
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from launch.config import register_defaults
from shapediff.config_io import named_to_dict
from shapediff.models import MODELS, PRESETS, DiT3DConfig, UNet3DConfig, describe
from shapediff.models.layers import pretended_gpu
from tests.models.tiny import TINY

CONF = Path(__file__).resolve().parents[2] / "conf"
DITS = {name: config for name, config in PRESETS.items() if isinstance(config, DiT3DConfig)}


def test_there_is_every_size() -> None:
    assert {f"unet3d_{size}" for size in ("small", "base", "large")} < PRESETS.keys()
    assert {f"dit3d_{size}{p}" for size in ("s", "b", "l", "xl") for p in (2, 4, 8)} < PRESETS.keys()


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("resolution", [32, 64])
def test_every_preset_builds_without_memory(name: str, resolution: int) -> None:
    cost = describe(PRESETS[name], resolution, num_classes=10)
    assert cost.tokens == PRESETS[name].num_tokens(resolution)
    assert min(cost.parameters, cost.forward_flops, cost.activation_bytes) > 0


@pytest.mark.parametrize(("name", "millions"), [("s", 33), ("b", 130), ("l", 458), ("xl", 675)])
def test_sizes_are_those_of_the_paper(name: str, millions: int) -> None:
    """Peebles and Xie 2023, table 4: DiT-*/2 on images, which counts 1,000 classes and other patches."""
    assert describe(PRESETS[f"dit3d_{name}2"], 32, num_classes=1000).parameters / 1e6 == pytest.approx(
        millions, rel=0.02
    )


@pytest.mark.parametrize("name", DITS)
def test_counts_of_a_dit_in_closed_form(name: str) -> None:
    """With d wide, n tokens, m of them heard in a block: 18 d^2 weights a block, 2 (12 n + 6) d^2 + 4 n m d FLOPs."""
    config, resolution, num_classes = DITS[name], 64, 7
    d, depth, channels, n = config.hidden_size, config.depth, config.patch_size**3, (64 // config.patch_size) ** 3
    cost = describe(config, resolution, num_classes=num_classes)
    block = 18 * d**2 + (3 + 1 + 5 + 6) * d + 2 * config.head_width
    ends = (
        (128 + 1) * d + (d + 1) * d + (num_classes + 1) * d + (channels + 1) * d + (d + 1) * 2 * d + (d + 1) * channels
    )
    assert cost.parameters == depth * block + ends
    heard = [min(config.window_of(i) ** 3 or n, n) for i in range(depth)]
    blocks = sum(2 * (12 * n + 6) * d**2 + 4 * n * m * d for m in heard)
    assert cost.forward_flops == blocks + 2 * (128 * d + d**2 + 2 * d**2 + 2 * n * channels * d)


@pytest.mark.parametrize("name", TINY)
def test_costs_are_those_of_the_network_itself(name: str) -> None:
    config, resolution = TINY[name], 16
    network = config.build(resolution=resolution, num_classes=3)
    cost = describe(config, resolution, num_classes=3)
    assert cost.parameters == sum(p.numel() for p in network.parameters())

    def inputs(b: int) -> tuple[torch.Tensor, ...]:
        return torch.randn(b, resolution**3), torch.zeros(b, dtype=torch.long), torch.zeros(b, dtype=torch.long)

    # The counter knows no fused attention of CPUs; in parts it counts the same products.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as flops, torch.no_grad(), pretended_gpu():
        network(*inputs(1))
    assert cost.forward_flops == flops.get_total_flops()

    for bf16 in (False, True):
        cost = describe(config, resolution, num_classes=3, autocast=bf16, on_gpu=False)
        two, three = (_kept(network, inputs(b), bf16) for b in (2, 3))
        # Fused attention keeps a few numbers more or less from one device to another.
        assert cost.activation_bytes == pytest.approx(three - two, rel=0.02)
        assert cost.cast_weight_bytes == pytest.approx(3 * two - 2 * three, rel=0.02, abs=2000)


def _kept(network: torch.nn.Module, inputs: tuple[torch.Tensor, ...], bf16: bool) -> int:
    """Bytes of the different storages that backward needs, the weights aside, by the real thing."""
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    own = {tensor.untyped_storage().data_ptr() for tensor in [*network.parameters(), *network.buffers()]}
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=bf16)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast:
        output = network(*inputs)
    assert output.requires_grad
    return sum(storage.nbytes() for address, storage in kept.items() if address not in own)


def test_norms_keep_32_bits_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What GroupNorm, SiLU and every second time AdaGN read, 4 bytes each, or on a CPU the norm alone, 2; 2 for a convolution."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    on_gpu, on_cpu = (describe(UNet3DConfig(), 32, autocast=True, on_gpu=on_gpu) for on_gpu in (True, False))
    assert on_gpu.activation_bytes / on_cpu.activation_bytes == pytest.approx((2.5 * 4 + 2) / (2 + 2), rel=0.1)
    for cost in (on_gpu, on_cpu):
        assert cost.cast_weight_bytes == pytest.approx(2 * cost.parameters, rel=0.02)


@pytest.mark.parametrize("name", TINY)
def test_recomputing_is_seen_in_the_plan(name: str) -> None:
    plain = describe(TINY[name], 16)
    thrifty = describe(replace(TINY[name], recompute_activations=True), 16)
    as_plain = {name: getattr(plain, name) for name in ("activation_bytes", "cast_weight_bytes")}
    assert replace(thrifty, **as_plain) == plain
    assert thrifty.activation_bytes < 0.8 * plain.activation_bytes


@pytest.mark.parametrize("name", [*PRESETS, *MODELS])
def test_every_preset_is_a_choice_on_the_command_line(name: str) -> None:
    """`model=NAME`; the bare names of the networks are files in conf/ that hold their defaults."""
    expected = PRESETS[name] if name in PRESETS else MODELS[name]()
    register_defaults()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        settings = hydra.compose("train", overrides=[f"model={name}"])
    assert OmegaConf.to_container(settings.model) == named_to_dict(MODELS, expected)


def test_the_table_in_the_docs_is_what_is_counted() -> None:
    lines = (Path(__file__).resolve().parents[2] / "docs" / "models.md").read_text().splitlines()
    rows = {line.split("`")[1]: [cell.strip() for cell in line.split("|")[2:-1]] for line in lines if " M |" in line}
    assert rows.keys() == PRESETS.keys()
    for name, row in rows.items():
        costs = [describe(PRESETS[name], resolution, autocast=True) for resolution in (32, 64)]
        expected = [f"{costs[0].parameters / 1e6:.1f} M"]
        for cost in costs:
            mib = cost.activation_bytes / 2**20
            expected += [f"{cost.tokens:,}", f"{cost.forward_flops / 1e9:,.1f}", f"{mib:,.0f}"]
        assert row == expected, name
