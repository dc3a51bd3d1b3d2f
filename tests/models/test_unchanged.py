"""Networks of the settings that older exports hold are the same networks, but for the order of sums."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch

from shapediff.config_io import named_from_dict
from shapediff.models import MODELS
from tests.models import frozen

NUM_CLASSES, RESOLUTION = 3, 16
OLD: dict[str, frozen.UNet3DConfig | frozen.DiT3DConfig] = {
    "unet3d": frozen.UNet3DConfig(width=16, num_res_blocks=1, attention_levels=(1, 2), dropout=0.1),
    "unet3d_patch_1": frozen.UNet3DConfig(width=8, width_multipliers=(1, 2), attention_levels=(), patch_size=1),
    "dit3d": frozen.DiT3DConfig(hidden_size=48, depth=2, num_heads=2, mlp_ratio=2.0),
}


def _pair(name: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    """(then, now) from one seed; now from what config.json held then."""
    config = OLD[name]
    torch.manual_seed(0)
    then = config.build(resolution=RESOLUTION, num_classes=NUM_CLASSES)
    data = {"name": name.split("_")[0], **asdict(config)}
    torch.manual_seed(0)
    now = named_from_dict(MODELS, data, path="model").build(resolution=RESOLUTION, num_classes=NUM_CLASSES)
    return then, now


@pytest.mark.parametrize("name", OLD)
def test_weights_start_the_same_under_the_same_names(name: str) -> None:
    then, now = (network.state_dict() for network in _pair(name))
    assert list(then) == list(now)
    assert all(torch.equal(then[key], now[key]) for key in then)


@pytest.mark.parametrize("name", OLD)
def test_outputs_and_gradients_are_the_same(name: str) -> None:
    then, now = _pair(name)
    with torch.no_grad():
        for p in then.parameters():
            p.normal_(std=0.05)
    now.load_state_dict(then.state_dict(), strict=True)
    x_t, t, label = torch.randn(2, RESOLUTION**3), torch.tensor([3, 900]), torch.tensor([0, NUM_CLASSES])
    outputs = []
    for network in (then, now):
        # Dropout aside: which numbers it drops goes by their place in memory.
        outputs.append(network.eval()(x_t, t, label))
        outputs[-1].square().mean().backward()
    assert outputs[0].any()
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-6)
    size = max(float(p.grad.abs().max()) for p in then.parameters())
    for p, q in zip(then.parameters(), now.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-3, atol=1e-5 * size)
