"""Both denoisers: shapes, what they may and may not depend on, and their start as nothing."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from shapediff.grid.morton import dense_to_morton, morton_decode, patches
from shapediff.models import DiT3DConfig, ModelConfig, UNet3DConfig
from shapediff.models.convolution import Cells
from shapediff.models.layers import SelfAttention, sinusoidal_embedding
from shapediff.models.positions import position_table

SMALL: dict[str, ModelConfig] = {
    "unet3d": UNet3DConfig(width=16, num_res_blocks=1, attention_levels=(1, 2)),
    "unet3d_patch_1": UNet3DConfig(
        width=8, width_multipliers=(1, 2), num_res_blocks=2, attention_levels=(), patch_size=1
    ),
    "unet3d_resample_in_blocks": UNet3DConfig(
        width=16, width_multipliers=(1, 2), num_res_blocks=1, attention_levels=(1,), resample_in_blocks=True
    ),
    "dit3d": DiT3DConfig(hidden_size=48, depth=2, num_heads=2, patch_size=4),
    "dit3d_windows": DiT3DConfig(
        hidden_size=40,
        depth=2,
        num_heads=2,
        patch_size=2,
        positions="rope",
        window_size=4,
        global_every=2,
        bottleneck=6,
    ),
    "dit3d_refined": DiT3DConfig(hidden_size=48, depth=2, num_heads=2, patch_size=4, refine_width=16),
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
def test_gradients_reach_every_parameter_after_two_steps(name: str) -> None:
    """From the start at nothing: the first step moves the output layer alone, the second the ends of branches, then all."""
    network = _build(name)
    x_t, t, label = _inputs(4)
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    reached = []
    for _ in range(3):
        optimizer.zero_grad()
        (network(x_t, t, label) - x_t).square().mean().backward()
        reached.append({key for key, p in network.named_parameters() if p.grad is not None and p.grad.any()})
        optimizer.step()
    assert all("conv_out." in key or "patch_out." in key for key in reached[0])
    assert reached[2] == {key for key, _ in network.named_parameters()}


@pytest.mark.parametrize(
    ("name", "resolution"),
    [*product(SMALL, (16, 32)), ("unet3d_patch_1", 4), ("dit3d", 4), ("dit3d_windows", 2), ("dit3d_windows", 8)],
)
def test_any_power_of_two_and_several_output_channels(name: str, resolution: int) -> None:
    """Windows larger than the grid, and grids of a few cells, are no exception."""
    network = _awake(SMALL[name].build(resolution=resolution, num_classes=1, out_channels=2))
    out = network(torch.randn(1, resolution**3), torch.tensor([5]), torch.tensor([1]))
    assert out.shape == (1, 2 * resolution**3) and out.isfinite().all() and out.any()


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


@pytest.mark.parametrize("name", SMALL)
def test_bfloat16_autocast_bears_large_inputs(name: str) -> None:
    """Norms and the softmax over normalised queries and keys keep what is 10,000 times too large within bounds."""
    network = _awake(_build(name))
    x_t, t, label = _inputs(2)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert network(1e4 * x_t, t, label).isfinite().all()


def test_patches_become_channels_of_the_right_cell() -> None:
    dense = torch.arange(2 * 8**3, dtype=torch.float32).reshape(2, 8, 8, 8)
    grid = Cells(4, 2)
    cells = grid.split(dense_to_morton(dense))
    assert cells.shape == (2, 8, 4, 4, 4)
    for code, (x, y, z) in enumerate(morton_decode(torch.arange(8)).tolist()):
        assert torch.equal(cells[:, code], dense[:, x::2, y::2, z::2])
    assert torch.equal(grid.join(cells, 1), dense_to_morton(dense))
    tokens = patches(dense_to_morton(dense), 4)  # each a run of 8 cells
    assert torch.equal(grid.placed(tokens.unflatten(2, (8, 8)).flatten(1, 2)), cells)


def test_attention_follows_its_tokens() -> None:
    torch.manual_seed(0)
    attention = SelfAttention(16, 4)
    x, order = torch.randn(2, 10, 16), torch.randperm(10)
    torch.testing.assert_close(attention(x)[:, order], attention(x[:, order]), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="divisible"):
        SelfAttention(16, 3)


@pytest.mark.parametrize("width", [48, 64])  # 64 leaves 4 channels over
def test_positions_differ_and_embedding_is_cos_and_sin(width: int) -> None:
    table = position_table(8, width)
    assert table.shape == (512, width)
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
    with pytest.raises(ValueError, match="dropout"):
        UNet3DConfig(dropout=1.0)
    with pytest.raises(ValueError, match="not divisible by num_heads"):
        DiT3DConfig(hidden_size=100)
    with pytest.raises(ValueError, match="odd or below 6"):
        DiT3DConfig(hidden_size=8, num_heads=2, positions="rope")
    with pytest.raises(ValueError, match="'none' is unknown"):
        DiT3DConfig(positions="none")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="power of two"):
        DiT3DConfig(window_size=3)
    with pytest.raises(ValueError, match="must be positive"):
        DiT3DConfig(global_every=0)
    with pytest.raises(ValueError, match=r"cells of 2\^3 voxels: patch_size=1"):
        DiT3DConfig(patch_size=1, refine_width=8)
