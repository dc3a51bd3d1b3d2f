"""The ways to run a denoiser that change its cost and must not change its answer."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from shapediff.models import ModelConfig, UNet3DConfig
from shapediff.models.layers import attention
from tests.models import tiny

NUM_CLASSES, RESOLUTION = 3, 8
UNETS: dict[str, UNet3DConfig] = {
    "unet3d": replace(tiny.TINY["unet3d"], dropout=0.1),
    "unet3d_resample_in_blocks": replace(tiny.TINY["unet3d_resample_in_blocks"], num_res_blocks=1),
}
TINY: dict[str, ModelConfig] = {
    **UNETS,
    "dit3d": tiny.TINY["dit3d"],
    "dit3d_windows": replace(tiny.TINY["dit3d_windows"], window_size=2),
}


def _build(config: ModelConfig) -> nn.Module:
    """With random weights everywhere, those that start at zero too."""
    torch.manual_seed(0)
    network = config.build(resolution=RESOLUTION, num_classes=NUM_CLASSES)
    with torch.no_grad():
        for p in network.parameters():
            p.normal_(std=0.1)
    return network


def _inputs() -> tuple[Tensor, Tensor, Tensor]:
    x_t = torch.randn(2, RESOLUTION**3, generator=torch.Generator().manual_seed(2))
    return x_t, torch.tensor([3, 900]), torch.tensor([0, NUM_CLASSES])


def _step(network: nn.Module) -> tuple[Tensor, list[Tensor]]:
    """Output and gradients, dropout drawn from one seed."""
    torch.manual_seed(1)
    network.zero_grad()
    out = network(*_inputs())
    out.float().square().mean().backward()
    return out.detach(), [p.grad.clone() for p in network.parameters() if p.grad is not None]


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("name", TINY)
def test_recomputed_activations_give_the_same_bits(name: str, bf16: bool) -> None:
    results = []
    for recompute in (False, True):
        network = _build(replace(TINY[name], recompute_activations=recompute))
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            results.append(_step(network))
    (out, gradients), (again, same) = results
    assert torch.equal(out, again)
    assert all(torch.equal(g, h) for g, h in zip(gradients, same, strict=True))


@pytest.mark.parametrize("name", TINY)
def test_recomputing_keeps_less(name: str) -> None:
    kept = []
    for recompute in (False, True):
        network = _build(replace(TINY[name], recompute_activations=recompute))
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):
            network(*_inputs())
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 3


@pytest.mark.parametrize("name", UNETS)
def test_channels_last_on_a_cpu_is_a_matter_of_layout(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kept from the first convolution to the last, and the same function as with PyTorch's own layout and normalisation."""
    network, kept = _build(UNETS[name]).eval(), []
    for layer in network.modules():
        if isinstance(layer, torch.nn.Conv3d):
            layer.register_forward_pre_hook(
                lambda layer, args: kept.append(args[0].is_contiguous(memory_format=torch.channels_last_3d))
            )
    out, gradients = _step(network)
    assert len(kept) > 10 and all(kept)
    for module in ("convolution", "unet3d"):
        monkeypatch.setattr(f"shapediff.models.{module}.laid_out", torch.Tensor.contiguous)
    expected, others = _step(_build(UNETS[name]).eval())
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    for found, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(found, other, rtol=1e-4, atol=1e-5 * float(other.abs().max() + 1))


@pytest.mark.parametrize("tokens", [8, 1024])
def test_attention_is_the_equation(tokens: int) -> None:
    """Whatever way is taken: softmax(q k^T / sqrt(d)) v in float64, and its gradients."""
    values = [torch.randn(2, 3, tokens, 16, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        q, k, v, dy = (value.to(dtype).requires_grad_() for value in values)
        exact = [value.detach().double().requires_grad_() for value in (q, k, v)]
        out = attention(q, k, v)
        reference = (exact[0] @ exact[1].transpose(-1, -2) / 16**0.5).softmax(-1) @ exact[2]
        pairs = zip(
            [out, *torch.autograd.grad(out, [q, k, v], dy)],
            [reference, *torch.autograd.grad(reference, exact, dy.double())],
            strict=True,
        )
        for found, expected in pairs:
            assert (found.double() - expected).norm() <= tolerance * expected.norm()
        with torch.no_grad():
            torch.testing.assert_close(attention(q, k, v), out, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["dit3d", "dit3d_windows"])
def test_tokens_add_up_in_float32_under_autocast(name: str) -> None:
    network, dtypes = _build(TINY[name]), []
    for block in network.blocks:  # type: ignore[union-attr]
        block.register_forward_hook(lambda block, args, out: dtypes.append(out.dtype))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        network(*_inputs())
    assert dtypes == [torch.float32] * 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "recompute"),
    [("unet3d", False), ("unet3d_resample_in_blocks", True), ("dit3d", True), ("dit3d_windows", False)],
)
def test_compiles_as_one_graph(name: str, recompute: bool) -> None:
    """Traced whole, forward and backward; the backend that runs the graph as it is rounds as eager does."""
    network = _build(replace(TINY[name], recompute_activations=recompute)).eval()
    torch._dynamo.reset()
    assert torch._dynamo.explain(network)(*_inputs()).graph_break_count == 0
    out, gradients = _step(network)
    torch._dynamo.reset()
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    found, same = _step(compiled)
    torch.testing.assert_close(found, out, rtol=1e-5, atol=1e-5)
    for g, h in zip(gradients, same, strict=True):
        torch.testing.assert_close(h, g, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["unet3d", "dit3d_windows"])
def test_inductor_agrees(name: str) -> None:
    network = _build(TINY[name]).eval()
    torch._dynamo.reset()
    with torch.no_grad():
        expected = network(*_inputs())
        found = torch.compile(network, fullgraph=True)(*_inputs())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
