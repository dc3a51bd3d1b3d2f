"""Autoregression: probabilities that sum to one, exact likelihoods, decoding with and without a cache, the choice of tokens."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from shapediff.checkpoint import ExportConfig, write_export
from shapediff.diffusion.editing import Edit
from shapediff.errors import ConfigError
from shapediff.grid.morton import dense_to_morton
from shapediff.methods import OctreeAutoregression, OctreeAutoregressionConfig, SampleConfig
from shapediff.methods.octree_autoregression import choose
from shapediff.methods.octree_sequence import TOKENIZERS, sequences_of
from shapediff.models import OctreeTransformerConfig, UNet3DConfig
from shapediff.models.octree_transformer import Cache, Nodes
from shapediff.pipeline import ShapePipeline

TINY = OctreeTransformerConfig(hidden_size=24, depth=2, num_heads=2)


def trained_like(method: OctreeAutoregression) -> dict[str, torch.nn.Module]:
    """Networks whose every weight counts, as after training."""
    torch.manual_seed(0)
    networks = method.build_networks(TINY)
    for parameter in networks["transformer"].parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return networks


def every_grid(num_voxels: int) -> torch.Tensor:
    codes = np.arange(2**num_voxels)
    return torch.from_numpy((codes[:, None] >> np.arange(num_voxels)) & 1).float() * 2 - 1


def random_grids(resolution: int, num: int = 3) -> torch.Tensor:
    """Of different lengths: the share of voxels inside differs, in cubes of side 2."""
    generator = torch.Generator().manual_seed(1)
    share = torch.linspace(0.05, 0.9, num)[:, None]
    coarse = torch.rand(num, resolution**3 // 8, generator=generator) < share
    return torch.repeat_interleave(coarse, 8, 1).float() * 2 - 1


@pytest.mark.parametrize("tokens", TOKENIZERS)
def test_the_probabilities_of_all_grids_sum_to_one(tokens: str) -> None:
    method = OctreeAutoregressionConfig(tokens=tokens).build(resolution=2, num_classes=2)  # type: ignore[arg-type]
    grids = every_grid(8)
    for label in (0, 2):
        nats = method.nats(trained_like(method), grids, torch.full((256,), label)).detach().double()
        assert float((-nats).exp().sum()) == pytest.approx(1, abs=1e-5)
        assert float(nats.std()) > 0.1


@pytest.mark.parametrize("tokens", TOKENIZERS)
def test_a_network_that_knows_nothing_takes_a_bit_a_voxel(tokens: str) -> None:
    """Uniform over the tokens of a node: over 256 at 2^3, and over two for each voxel at any resolution."""
    resolution = 2 if tokens == "octree" else 8
    method = OctreeAutoregressionConfig(tokens=tokens).build(resolution=resolution, num_classes=2)  # type: ignore[arg-type]
    networks = method.build_networks(TINY)  # zero_init: logits are 0
    batch = {"voxels": random_grids(8)[:, : resolution**3], "label": torch.tensor([0, 1, 1])}
    found = method.loss(networks, batch, range(3))  # type: ignore[arg-type]
    assert found.error.tolist() == pytest.approx([1.0] * 3, abs=1e-6)
    assert float(found.loss.detach()) == pytest.approx(math.log(2) * resolution, abs=1e-5)


def test_sequences_of_a_batch_do_not_see_each_other() -> None:
    method = OctreeAutoregressionConfig().build(resolution=8, num_classes=2)
    networks, grids, label = trained_like(method), random_grids(8), torch.tensor([0, 1, 2])
    assert len(set(sequences_of(grids, method.tokenizer).lengths)) == 3
    alone = [method.nats(networks, grids[i : i + 1], label[i : i + 1]) for i in range(3)]
    assert torch.allclose(method.nats(networks, grids, label), torch.cat(alone), rtol=1e-5)


def test_what_comes_later_is_not_seen() -> None:
    """The logits of a node stay when the tokens after it, and their nodes, change."""
    method = OctreeAutoregressionConfig().build(resolution=8, num_classes=2)
    network, label = trained_like(method)["transformer"], torch.tensor([0])
    grid = random_grids(8)[1:2]
    other = grid.clone()
    other[0, -8:] *= -1  # the last cube of side 2
    one, two = (sequences_of(signal, method.tokenizer) for signal in (grid, other))
    logits = [network(s.before, s.sources, s.nodes, label)[0] for s in (one, two)]
    num = min(*one.lengths, *two.lengths)
    first = int((one.tokens[0, :num] != two.tokens[0, :num]).int().argmax())
    assert first > 0 and torch.allclose(logits[0][: first + 1], logits[1][: first + 1], atol=1e-5)
    assert not torch.allclose(logits[0][first + 1], logits[1][first + 1], atol=1e-3)


def test_decoding_with_a_cache_gives_the_same_logits() -> None:
    method = OctreeAutoregressionConfig().build(resolution=8, num_classes=2)
    network, label = trained_like(method)["transformer"], torch.tensor([1])
    s = sequences_of(random_grids(8)[1:2], method.tokenizer)
    packed = network(s.before, s.sources, s.nodes, label, lengths=s.lengths)
    whole, cache, parts = network(s.before, s.sources, s.nodes, label), Cache(), []

    def at(nodes: Nodes, i: int) -> Nodes:
        return nodes.map(lambda value: value[:, i : i + 1])

    for i in range(s.tokens.shape[1]):
        parts.append(network(s.before[:, i : i + 1], at(s.sources, i), at(s.nodes, i), label, cache))
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-4)
    assert torch.allclose(packed, whole, atol=1e-4)


@pytest.mark.parametrize("tokens", TOKENIZERS)
def test_samples_follow_the_likelihood(tokens: str) -> None:
    """At 2^3, where all 256 probabilities are known; with guidance the distribution is p_unc^(1-s) p_cond^s, one token long."""
    method = OctreeAutoregressionConfig(tokens=tokens).build(resolution=2, num_classes=2)  # type: ignore[arg-type]
    networks, grids, num = trained_like(method), every_grid(8), 3000
    log_p = [-method.nats(networks, grids, torch.full((256,), label)).double() for label in (0, 2)]
    scales = (1.0, 0.0, 2.0) if tokens == "octree" else (1.0,)
    for scale in scales:
        expected = (scale * log_p[0] + (1 - scale) * log_p[1]).softmax(0)
        with torch.inference_mode():
            found = method.sample(
                networks, torch.zeros(num, dtype=torch.long), range(num), config=SampleConfig(guidance_scale=scale)
            )
        index = ((found > 0).long() << torch.arange(8)).sum(1)
        counts = torch.bincount(index, minlength=256).double() / num
        # The mean of |counts - p| over all is below sqrt(p / num) each.
        assert float((counts - expected.detach()).abs().sum()) < float((expected.detach() / num).sqrt().sum())


def test_a_shape_depends_on_its_seed_and_label_alone() -> None:
    method = OctreeAutoregressionConfig().build(resolution=4, num_classes=2)
    networks, config = trained_like(method), SampleConfig(guidance_scale=2.0)
    with torch.inference_mode():
        together = method.sample(networks, torch.tensor([0, 1, 0]), [5, 6, 7], config=config)
        alone = method.sample(networks, torch.tensor([1]), [6], config=config)
    assert (together[1] == alone[0]).all() and set(together.unique().tolist()) <= {-1.0, 1.0}


def test_the_choice_of_tokens() -> None:
    logits = torch.tensor([[0.5, 0.2, 0.3]]).log()
    uniform = torch.linspace(0, 0.999, 1000)

    def shares(**settings: float) -> list[float]:
        tokens = choose(logits.expand(1000, 3), uniform, SampleConfig(**settings))  # type: ignore[arg-type]
        return (torch.bincount(tokens, minlength=3) / 1000).tolist()

    assert shares() == pytest.approx([0.5, 0.2, 0.3], abs=2e-3)
    assert shares(top_k=2) == pytest.approx([0.625, 0, 0.375], abs=2e-3)
    assert shares(top_p=0.5) == [1, 0, 0] and shares(top_p=0.51) == pytest.approx([0.625, 0, 0.375], abs=2e-3)
    assert shares(temperature=0) == [1, 0, 0]
    assert shares(temperature=0.5) == pytest.approx([25 / 38, 4 / 38, 9 / 38], abs=2e-3)


def test_a_denoiser_is_no_transformer() -> None:
    method = OctreeAutoregressionConfig().build(resolution=8, num_classes=1)
    with pytest.raises(ConfigError, match="model=octree_transformer"):
        method.build_networks(UNet3DConfig())


def test_one_batch_is_learnt_by_heart_and_comes_out_of_the_pipeline(tmp_path: Path) -> None:
    """Two classes of one shape each: the likeliest tokens of a class are its shape, also after an export."""
    config = OctreeAutoregressionConfig(class_dropout=0.0)
    method = config.build(resolution=8, num_classes=2)
    torch.manual_seed(0)
    model = OctreeTransformerConfig(hidden_size=48, depth=2, num_heads=4)
    networks, batch = method.build_networks(model), {"voxels": random_grids(8)[:2], "label": torch.tensor([0, 1])}
    optimizer = torch.optim.AdamW(networks["transformer"].parameters(), lr=5e-3)
    for _ in range(120):
        loss = method.loss(networks, batch, range(2)).loss  # type: ignore[arg-type]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    bits = method.loss(networks, batch, range(2)).error  # type: ignore[arg-type]
    assert float(bits.max()) < 0.01
    weights = {"transformer": networks["transformer"].state_dict()}
    exported = ExportConfig(8, "occupancy", ("box", "cup"), config, model, SampleConfig(guidance_scale=1.0))
    write_export(tmp_path / "export", exported, weights, dtype=torch.float32)
    pipeline = ShapePipeline.from_pretrained(tmp_path / "export")
    for i, name in enumerate(pipeline.classes):
        shape = pipeline(1, label=name, temperature=0.0, precision="float32").voxels
        assert torch.equal(dense_to_morton(shape), batch["voxels"][i : i + 1])


def test_what_it_cannot_do_is_said() -> None:
    method = OctreeAutoregressionConfig().build(resolution=4, num_classes=2)
    networks, label, config = trained_like(method), torch.tensor([0]), SampleConfig()
    for edit in (Edit(mirror=torch.arange(64)), Edit(x_0=torch.zeros(64), strength=0.5)):
        with pytest.raises(ConfigError, match="fresh shapes only"):
            method.sample(networks, label, [0], config=config, edit=edit)
    with pytest.raises(ConfigError, match="one class a shape"):
        method.sample(networks, torch.tensor([[0.5, 0.5, 0.0]]), [0], config=config)
    with pytest.raises(ConfigError, match="no noise"):
        method.invert(networks, label, torch.zeros(1, 64), config=config)
