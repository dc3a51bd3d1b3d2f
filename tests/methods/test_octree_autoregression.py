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
from shapediff.methods.octree_choice import choose, fittest
from shapediff.methods.octree_sequence import TOKENIZERS, sequences_of
from shapediff.models import OctreeTransformerConfig, UNet3DConfig, octree_transformer
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


def test_decoding_with_a_cache_gives_the_same_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the cache has to grow, again and again."""
    monkeypatch.setattr(octree_transformer, "FIRST_ROOM", 3)
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
        assert_drawn_from(expected.detach(), found)


def shares(found: torch.Tensor) -> torch.Tensor:
    """How often each of the 256 grids of 2^3 was drawn."""
    return torch.bincount(((found > 0).long() << torch.arange(8)).sum(1), minlength=256).double() / len(found)


def assert_drawn_from(expected: torch.Tensor, found: torch.Tensor) -> None:
    """The mean of |share - p| is below sqrt(p / num) for each grid, so their sum is below the sum."""
    assert float((shares(found) - expected).abs().sum()) < float((expected / len(found)).sqrt().sum())


def test_a_mixture_is_the_product_of_its_classes() -> None:
    """p_unc^(1-s) (p_0^w p_1^(1-w))^s, normalised, over grids of one token; at its ends a class alone, to the last voxel."""
    method = OctreeAutoregressionConfig().build(resolution=2, num_classes=2)
    networks, grids, num = trained_like(method), every_grid(8), 3000
    log_p = [-method.nats(networks, grids, torch.full((256,), i)).detach().double() for i in range(3)]
    weights = torch.tensor([[0.3, 0.7, 0.0]]).expand(num, 3)
    for scale in (1.0, 2.0):
        expected = ((1 - scale) * log_p[2] + scale * (0.3 * log_p[0] + 0.7 * log_p[1])).softmax(0)
        with torch.inference_mode():
            found = method.sample(networks, weights, range(num), config=SampleConfig(guidance_scale=scale))
        assert_drawn_from(expected, found)
    with torch.inference_mode():
        whole = [method.sample(networks, label, range(9), config=SampleConfig()) for label in (
            torch.ones(9, dtype=torch.long), torch.tensor([[0.0, 1.0, 0.0]]).expand(9, 3)
        )]  # fmt: skip
    assert torch.equal(*whole)


@pytest.mark.parametrize("tokens", TOKENIZERS)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 1.0])
def test_what_is_kept_comes_out_exactly(tokens: str, share: float) -> None:
    """Voxels and whole regions, inside and outside, of grids with empty and full nodes of every depth."""
    resolution = 8 if tokens == "octree" else 4
    method = OctreeAutoregressionConfig(tokens=tokens).build(resolution=resolution, num_classes=2)  # type: ignore[arg-type]
    networks, generator = trained_like(method), torch.Generator().manual_seed(2)
    for x_0 in (*random_grids(8)[:, : resolution**3], torch.ones(resolution**3), -torch.ones(resolution**3)):
        keep = torch.rand(resolution**3 // 8, generator=generator).repeat_interleave(8) < share
        edit = Edit(x_0=x_0, keep=keep ^ (torch.rand(resolution**3, generator=generator) < 0.02), num_resamples=2)
        with torch.inference_mode():
            found = method.sample(networks, torch.tensor([0, 1]), [1, 2], config=SampleConfig(), edit=edit)
        assert edit.keep is not None and (found[:, edit.keep] == x_0[edit.keep]).all()
        assert share > 0.5 or not torch.equal(found[0], found[1])


@pytest.mark.parametrize("tokens", TOKENIZERS)
def test_weighed_completions_are_the_probability_with_what_is_kept(tokens: str) -> None:
    """Draws counted by their weights tend to p(x) for every x that agrees, at 2^3 where it is known: an importance sample.

    Weights are at most 1, so that each mean is off by sqrt(p / num) at most, in the mean; over a single token they are all
    the same.
    """
    method = OctreeAutoregressionConfig(tokens=tokens).build(resolution=2, num_classes=2)  # type: ignore[arg-type]
    networks, grids, num = trained_like(method), every_grid(8), 1500
    networks["transformer"].token.weight.data *= 30  # what came before says much of what comes
    keep = torch.tensor([False] * 5 + [True] * 3)
    agrees = (grids[:, keep] == grids[160, keep]).all(1)
    p = (-method.nats(networks, grids, torch.zeros(256, dtype=torch.long)).detach().double()).exp() * agrees
    allowed = method.tokenizer.agreeing(grids[160].numpy() > 0, keep.numpy())
    label, config = torch.zeros(num, dtype=torch.long), SampleConfig(guidance_scale=1.0)
    with torch.inference_mode():
        found, log_weight = method._decoded(networks, label, range(num), config, allowed, None)
    index, weight = ((found > 0).long() << torch.arange(8)).sum(1), log_weight.double().exp()
    means = torch.bincount(index, weights=weight, minlength=256) / num
    assert float((means - p).abs().sum()) < float((p / num).sqrt().sum())
    spread = float(weight.std() / weight.mean())
    assert spread > 5e-3 if tokens == "voxels" else spread < 1e-5


def test_the_fittest_is_drawn_by_its_weight() -> None:
    uniform = torch.linspace(0, 0.999, 1000)
    found = fittest(torch.tensor([[0.2, 0.5, 0.3]]).log().expand(1000, 3) - 700, uniform)
    assert (torch.bincount(found) / 1000).tolist() == pytest.approx([0.2, 0.5, 0.3], abs=2e-3)


def test_a_shape_depends_on_its_seed_and_label_alone() -> None:
    method = OctreeAutoregressionConfig().build(resolution=4, num_classes=2)
    networks, config = trained_like(method), SampleConfig(guidance_scale=2.0)
    kept = Edit(x_0=torch.ones(64), keep=torch.arange(64) < 9, num_resamples=3)
    labels = torch.tensor([[1.0, 0.0, 0.0], [0.4, 0.6, 0.0], [0.0, 0.0, 1.0]])
    for edit in (None, kept):
        with torch.inference_mode():
            together = method.sample(networks, labels, [5, 6, 7], config=config, edit=edit)
            alone = [method.sample(networks, labels[[i]], [5 + i], config=config, edit=edit)[0] for i in range(3)]
        assert torch.equal(together, torch.stack(alone)) and set(together.unique().tolist()) <= {-1.0, 1.0}


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
    bits = method.bits_per_voxel(networks, batch["voxels"], batch["label"], range(2))  # type: ignore[arg-type]
    assert float(bits.detach().max()) < 0.01
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
        with pytest.raises(ConfigError, match="completes shapes and mixes classes"):
            method.sample(networks, label, [0], config=config, edit=edit)
    with pytest.raises(ConfigError, match="no noise"):
        method.invert(networks, label, torch.zeros(1, 64), config=config)
