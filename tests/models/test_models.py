"""Both denoisers: shapes, what they may and may not depend on, and their start as nothing."""

from __future__ import annotations

import pytest
import torch

from shapediff.grid.morton import dense_to_morton, morton_decode
from shapediff.models import DiT3DConfig, ModelConfig, UNet3DConfig
from shapediff.models.dit3d import position_table
from shapediff.models.layers import SelfAttention, sinusoidal_embedding
from shapediff.models.unet3d import _cells_to_voxels, _voxels_to_cells

SMALL: dict[str, ModelConfig] = {
    "unet3d": UNet3DConfig(width=16, num_res_blocks=1, attention_levels=(1, 2)),
    "unet3d_patch_1": UNet3DConfig(
        width=8, width_multipliers=(1, 2), num_res_blocks=2, attention_levels=(), patch_size=1
    ),
    "dit3d": DiT3DConfig(hidden_size=48, depth=2, num_heads=2, patch_size=4),
}
NUM_CLASSES, RESOLUTION = 3, 16


def _build(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return SMALL[name].build(resolution=RESOLUTION, num_classes=NUM_CLASSES)


def _awake(network: torch.nn.Module) -> torch.nn.Module:
    """With every zero-initialised layer filled, so that all paths speak."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in network.parameters():
            if not p.any():
                p.copy_(0.05 * torch.randn(p.shape, generator=generator))
    return network.eval()


def _inputs(b: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    x_t = torch.randn(b, RESOLUTION**3, generator=generator)
    return x_t, torch.arange(b) * 100, torch.arange(b) % (NUM_CLASSES + 1)


@pytest.mark.parametrize("name", SMALL)
def test_output_is_like_the_input_and_starts_at_zero(name: str) -> None:
    x_t, t, label = _inputs(4)
    out = _build(name)(x_t, t, label)
    assert out.shape == x_t.shape and out.dtype == torch.float32
    assert not out.any()


@pytest.mark.parametrize("name", SMALL)
def test_every_parameter_is_used_and_timestep_and_label_matter(name: str) -> None:
    network = _awake(_build(name))
    x_t, t, label = _inputs(4)
    out = network(x_t, t, label)
    out.square().mean().backward()
    unused = [key for key, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    # Biases before a group norm of one group a channel pair do count; the null label is among the labels given.
    assert unused == []
    assert not torch.allclose(out, network(x_t, t + 1, label), atol=1e-6)
    assert not torch.allclose(out, network(x_t, t, (label + 1) % (NUM_CLASSES + 1)), atol=1e-6)


@pytest.mark.parametrize("name", SMALL)
def test_samples_do_not_mix(name: str) -> None:
    network = _awake(_build(name))
    x_t, t, label = _inputs(4)
    together = network(x_t, t, label)
    alone = torch.cat([network(x_t[i : i + 1], t[i : i + 1], label[i : i + 1]) for i in range(4)])
    # float32 sums of some thousand terms, in another order.
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SMALL)
def test_bfloat16_autocast_stays_close(name: str) -> None:
    network = _awake(_build(name))
    x_t, t, label = _inputs(2)
    with torch.no_grad():
        exact = network(x_t, t, label)
        with torch.autocast("cpu", torch.bfloat16):
            rough = network(x_t, t, label).float()
    # bfloat16 keeps 8 bits; a few dozen layers deep the errors add up to some per cent.
    assert (rough - exact).norm() < 0.05 * exact.norm()


def test_patches_become_channels_of_the_right_cell() -> None:
    dense = torch.arange(2 * 8**3, dtype=torch.float32).reshape(2, 8, 8, 8)
    cells = _voxels_to_cells(dense_to_morton(dense), 2)
    assert cells.shape == (2, 8, 4, 4, 4)
    for code, (x, y, z) in enumerate(morton_decode(torch.arange(8)).tolist()):
        assert torch.equal(cells[:, code], dense[:, x::2, y::2, z::2])
    assert torch.equal(_cells_to_voxels(cells), dense_to_morton(dense))


def test_attention_follows_its_tokens() -> None:
    torch.manual_seed(0)
    attention = SelfAttention(16, 4)
    x, order = torch.randn(2, 10, 16), torch.randperm(10)
    torch.testing.assert_close(attention(x)[:, order], attention(x[:, order]), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="divisible"):
        SelfAttention(16, 3)


def test_positions_differ_and_embedding_is_cos_and_sin() -> None:
    table = position_table(8, 48)
    assert table.shape == (512, 48)
    distances = torch.cdist(table, table) + 10 * torch.eye(512)
    assert distances.min() > 0.1
    embedding = sinusoidal_embedding(torch.tensor([3.0]), 4, max_period=100.0)
    expected = torch.tensor([3.0, 0.3]).cos().tolist() + torch.tensor([3.0, 0.3]).sin().tolist()
    torch.testing.assert_close(embedding[0], torch.tensor(expected))


def test_refuses_sizes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="not divisible by patch_size"):
        UNet3DConfig(width_multipliers=(1, 1, 1, 1, 1)).build(resolution=16, num_classes=1)
    with pytest.raises(ValueError, match="not divisible by patch_size"):
        DiT3DConfig(patch_size=8).build(resolution=4, num_classes=1)
    with pytest.raises(ValueError, match="multiple of 8"):
        UNet3DConfig(width=20)
    with pytest.raises(ValueError, match="attention_levels"):
        UNet3DConfig(attention_levels=(3,))
    with pytest.raises(ValueError, match="multiple of 6"):
        DiT3DConfig(hidden_size=100)
