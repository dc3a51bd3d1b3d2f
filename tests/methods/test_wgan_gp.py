"""WGAN-GP: the penalty and the distance in closed form, the turns, what is watched, and a batch learnt by heart."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.flop_counter import FlopCounterMode

from shapediff import evaluate as cli
from shapediff.checkpoint import ExportConfig, read_export, write_export
from shapediff.diffusion.editing import Edit
from shapediff.engine.config import TrainConfig
from shapediff.engine.costs import run_costs
from shapediff.engine.finetuning import exported_weights
from shapediff.errors import ConfigError
from shapediff.grid.morton import dense_to_morton
from shapediff.methods import SampleConfig, WganGp, WganGpConfig
from shapediff.methods.base import Batch, Turn
from shapediff.methods.wgan_gp import class_distances, covered, gradient_penalty
from shapediff.models import UNet3DConfig, VoxelCriticConfig, VoxelGeneratorConfig
from shapediff.models.voxel_gan import gradient_norm
from shapediff.pipeline import ShapePipeline
from tests.test_evaluate import CLASSES
from tests.test_evaluate import dataset as dataset  # a fixture

CRITIC = VoxelCriticConfig(width=8, width_multipliers=(1, 2))
GENERATOR = VoxelGeneratorConfig(width=8, width_multipliers=(1, 2))
CONFIG = WganGpConfig(critic=CRITIC, latent_size=8, num_critic_steps=2)


class LinearCritic(nn.Module):
    """D(x) = w . x, whose gradient is w everywhere."""

    def __init__(self, num_voxels: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.full((num_voxels,), 0.1))

    def forward(self, x: Tensor, label: Tensor, between: Tensor | None = None) -> tuple[Tensor, Tensor]:
        slope = x.new_empty(0) if between is None else gradient_norm(lambda point: point @ self.w, between)
        return x @ self.w, slope


class Everywhere(nn.Module):
    """A generator whose shapes are all the same."""

    def __init__(self, shape: Tensor) -> None:
        super().__init__()
        self.shape = nn.Parameter(shape)

    def forward(self, z: Tensor, label: Tensor) -> Tensor:
        return self.shape.expand(len(z), -1)


def batch_of(voxels: Tensor, label: list[int]) -> Batch:
    return {"voxels": voxels, "label": torch.tensor(label)}


def two_shapes(resolution: int = 8) -> Tensor:
    """A box in a corner and a plate."""
    shapes = -torch.ones(2, resolution, resolution, resolution)
    shapes[0, : resolution // 2, : resolution // 2, : resolution // 2] = 1
    shapes[1, :, : resolution // 4] = 1
    return dense_to_morton(shapes)


def networks_of(method: WganGp) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {**method.build_networks(GENERATOR), **method.build_training_networks()}


def test_the_penalty_of_a_linear_critic() -> None:
    """(|w| - 1)^2 wherever it is taken, and its gradient 2 (1 - 1 / |w|) w."""
    critic = LinearCritic(64).double()
    nn.init.normal_(critic.w)
    x = torch.randn(5, 64, dtype=torch.float64)
    _, slope = critic(x, torch.zeros(5), x)
    size = critic.w.norm()
    torch.testing.assert_close(slope, size.expand(5))
    gradient_penalty(slope).mean().backward()
    torch.testing.assert_close(critic.w.grad, (2 * (1 - 1 / size) * critic.w).detach())


def test_the_slope_of_the_network_is_that_of_its_scores() -> None:
    """Against central differences, sample by sample, each with its own label; x and shapes between see one another nowhere."""
    torch.manual_seed(0)
    critic = VoxelCriticConfig(width=8, width_multipliers=(1,)).build(resolution=4, num_classes=2)
    x, label = torch.randn(4, 64), torch.tensor([0, 2, 0, 2])
    scores, slope = critic(x, label, x[2:])
    assert torch.equal(scores, critic.score(x, label))
    step = 1e-2 * torch.eye(64)  # the critic is linear in pieces, and its scores are float32
    for i, expected in enumerate(slope.tolist()):
        point, same = x[2 + i], label[i].expand(64)
        difference = (critic.score(point + step, same) - critic.score(point - step, same)) / 2e-2
        assert difference.norm().item() == pytest.approx(expected, rel=0.02) and expected > 0.01


def test_a_slope_of_zero_has_no_nan_in_its_gradient() -> None:
    critic = LinearCritic(8)
    nn.init.zeros_(critic.w)
    _, slope = critic(torch.zeros(2, 8), torch.zeros(2), torch.ones(2, 8))
    gradient_penalty(slope).mean().backward()
    assert critic.w.grad is not None and bool(critic.w.grad.isfinite().all())


@pytest.mark.parametrize("weight", [1.0, 10.0, 1000.0])
def test_the_distance_of_two_points(weight: float) -> None:
    """All data at a, all shapes at b, d apart: W_1 = d. A linear critic lowers lambda (s - 1)^2 - d s by its slope s, so that
    s = 1 + d / (2 lambda) along a - b, and the critic sees d s: too much, and d itself where lambda is large.
    """
    a, b = torch.full((8,), 0.5), torch.full((8,), -0.25)
    d = float((a - b).norm())
    method = WganGpConfig(penalty_weight=weight, latent_size=2).build(resolution=2, num_classes=1)
    critic = LinearCritic(8)
    nn.init.normal_(critic.w, generator=torch.Generator().manual_seed(0))
    networks, batch = {"generator": Everywhere(b), "critic": critic}, batch_of(a.expand(3, -1), [0, 0, 0])
    optimizer = torch.optim.LBFGS(critic.parameters(), max_iter=200, line_search_fn="strong_wolfe", tolerance_grad=1e-9)

    def lowered() -> Tensor:
        optimizer.zero_grad()
        loss = method.loss(networks, batch, range(3)).loss
        loss.backward()
        return loss

    optimizer.step(lowered)
    output = method.loss(networks, batch, range(3))
    slope = 1 + d / (2 * weight)
    assert output.error.tolist() == pytest.approx([d * slope] * 3, rel=1e-3)
    assert output.metrics["critic_slope"].tolist() == pytest.approx([slope] * 3, rel=1e-3)
    assert float(output.loss.detach()) == pytest.approx(weight * (slope - 1) ** 2 - d * slope, rel=1e-3)
    # What the generator is told to do: go straight towards the data, by the critic's slope.
    loss = method.generator_loss(networks, batch, range(3)).loss
    (way,) = torch.autograd.grad(loss, networks["generator"].shape)  # type: ignore[arg-type]
    torch.testing.assert_close(-way, slope * (a - b) / d, rtol=1e-3, atol=1e-4)


def test_the_generator_comes_after_the_critic_has_had_its_steps() -> None:
    method = replace(CONFIG, num_critic_steps=3).build(resolution=8, num_classes=2)
    trained = [[turn.trains for turn in method.turns(step)] for step in range(6)]
    critic, both = [("critic",)], [("critic",), ("generator",)]
    assert trained == [critic, critic, both] * 2


def test_a_sample_s_loss_is_its_own_and_the_turns_draw_other_latents() -> None:
    method = CONFIG.build(resolution=8, num_classes=2)
    networks, x = networks_of(method), two_shapes()
    whole = method.loss(networks, batch_of(x, [0, 1]), [5, 6])
    alone = method.loss(networks, batch_of(x[1:], [1]), [6])
    torch.testing.assert_close(whole.per_sample[1:], alone.per_sample, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(whole.per_sample, 10 * whole.metrics["gradient_penalty"] - whole.error)
    assert not torch.allclose(
        whole.error, method.generator_loss(networks, batch_of(x, [0, 1]), [5, 6]).error, rtol=1e-5
    )


def test_what_is_watched_tells_copies_from_shapes_of_their_own() -> None:
    x = torch.cat([two_shapes(), two_shapes().flip(1)])
    label = torch.tensor([0, 1, 0, 1])
    copies = x[:2].repeat(2, 1)
    assert class_distances(copies, label).tolist() == [0, 0]
    boxes, plates = class_distances(x, label).tolist()
    assert boxes == 1 and plates == 1  # in opposite corners: nothing in common
    half = torch.where(torch.arange(512) < 32, 1.0, -1.0)
    assert class_distances(torch.stack([x[0], half]), torch.zeros(2)).tolist() == [0.5]  # the half of the box
    assert class_distances(x[:2], label[:2]).shape == (0,)
    assert covered(x, x).tolist() == [1, 1, 1, 1]
    assert covered(x, x[:1].expand(4, -1)).tolist() == [1, 0, 0, 0]
    assert class_distances(-torch.ones(2, 8), torch.zeros(2)).tolist() == [0]  # two empty ones are the same


def test_draws_of_one_distribution_cover_what_is_written() -> None:
    """1 - (1 - 1/n)^n where each shape is as likely: over all 4^4 draws of one of four, and in every text that says it."""
    x = 2 * torch.eye(4) - 1
    draws = torch.cartesian_prod(*[torch.arange(4)] * 4)
    mean = torch.stack([covered(x, x[drawn]).mean() for drawn in draws]).mean()
    assert mean.item() == pytest.approx(1 - (1 - 1 / 4) ** 4, abs=1e-6)  # float32
    expected = {n: f"{1 - (1 - 1 / n) ** n:.3f}" for n in (4, 16)}
    root = Path(__file__).resolve().parents[2]
    page = (root / "docs" / "training.md").read_text(encoding="utf-8")
    assert f"{expected[4]} at 4, {expected[16]} at 16" in page
    assert f"{expected[4]} at b = 4, {expected[16]} at 16" in str(covered.__doc__)
    recipe = (root / "conf" / "experiment" / "wgan.yaml").read_text(encoding="utf-8")
    assert f"({expected[16]} at most)" in recipe and "batch_size: 16," in recipe


def test_a_denoiser_is_no_generator() -> None:
    with pytest.raises(ConfigError, match="model=voxel_generator"):
        CONFIG.build(resolution=8, num_classes=1).build_networks(UNet3DConfig())


@pytest.mark.parametrize("name", ["num_steps", "guidance_scale", "top_k"])
def test_settings_without_meaning_are_refused(name: str) -> None:
    method = CONFIG.build(resolution=8, num_classes=1)
    method.check_sampling(SampleConfig())
    with pytest.raises(ConfigError, match=f"{name} .* would do nothing with this one; leave it out: it takes none"):
        method.check_sampling(SampleConfig(), [name])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_critic_steps": 0}, "num_critic_steps=0"),
        ({"penalty_weight": 0.0}, "must be positive"),
        ({"class_dropout": 1.5}, "class_dropout=1.5"),
    ],
)
def test_a_method_that_cannot_be_is_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WganGpConfig(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("config", [VoxelGeneratorConfig, VoxelCriticConfig])
@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"patch_size": 0}, "patch_size=0 must be a power of two"),
        ({"width_multipliers": ()}, "width_multipliers"),
        ({"width": 12}, "width=12 must be a multiple of 8"),
        ({"patch_size": 4}, "resolution=8 is not divisible by patch_size .* = 16"),
    ],
)
def test_networks_that_cannot_be_are_refused(config: type, sizes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**sizes).build(resolution=8, num_classes=1)


def test_a_plan_counts_the_arithmetic_of_both_turns() -> None:
    """Three times what forward takes, which with the penalty has a backward of its own: counted, within a tenth."""
    method = CONFIG.build(resolution=8, num_classes=1)
    networks, batch = networks_of(method), batch_of(two_shapes(), [0, 0])

    def counted(turn: Turn) -> float:
        for name, network in networks.items():
            network.requires_grad_(name in (turn.trains or ()))
        with FlopCounterMode(display=False) as flops:
            turn.loss(networks, batch, range(2)).loss.backward()
        return flops.get_total_flops() / 2

    critics, generators = map(counted, method.turns(1))
    config = TrainConfig(model=GENERATOR, method=CONFIG)
    costs = run_costs(config, resolution=8, num_classes=1, recompute=False, autocast=False, on_gpu=False)
    assert critics + generators / CONFIG.num_critic_steps == pytest.approx(costs.train_flops, rel=0.1)


def export(folder: Path, networks: dict[str, nn.Module], classes: tuple[str, ...]) -> ExportConfig:
    config = ExportConfig(8, "occupancy", classes, CONFIG, GENERATOR, SampleConfig(guidance_scale=1.0))
    write_export(folder, config, {"generator": networks["generator"].state_dict()}, dtype=torch.float32)
    return config


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export that knows one shape of each of two classes by heart: the average of a generator that circles around them."""
    method = replace(CONFIG, class_dropout=0.0).build(resolution=8, num_classes=2)
    networks, batch = networks_of(method), batch_of(two_shapes(), [0, 1])
    optimizers = {
        name: torch.optim.Adam(network.parameters(), lr=3e-3, betas=(0.0, 0.9)) for name, network in networks.items()
    }
    average = AveragedModel(networks["generator"], multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for step in range(140):
        for turn in method.turns(step):
            for name in turn.trains or ():
                optimizers[name].zero_grad()
                turn.loss(networks, batch, range(2 * step, 2 * step + 2)).loss.backward()
                optimizers[name].step()
        average.update_parameters(networks["generator"])
    networks["generator"] = average.module
    folder = tmp_path_factory.mktemp("learnt")
    export(folder / "export", networks, tuple(CLASSES))
    return folder


def test_one_batch_is_learnt_by_heart_and_comes_out_of_the_pipeline(learnt: Path) -> None:
    assert list(read_export(learnt).networks) == ["generator"]  # the critic stays behind
    assert "--guidance" not in (learnt / "export" / "README.md").read_text(encoding="utf-8")  # which would be refused
    pipeline = ShapePipeline.from_pretrained(learnt)
    for i, name in enumerate(CLASSES):
        shapes = pipeline(3, label=name, precision="float32").voxels
        assert torch.equal(dense_to_morton(shapes) > 0, (two_shapes()[i] > 0).expand(3, -1))
        assert float(shapes.abs().max()) <= 1


def test_it_goes_from_seed_to_seed_and_from_class_to_class(learnt: Path) -> None:
    pipeline, options = ShapePipeline.from_pretrained(learnt), {"precision": "float32"}
    a, b = CLASSES
    way = pipeline.interpolate(1, 2, 3, label=a, **options).voxels
    for end, seed in ((way[0], 1), (way[-1], 2)):
        torch.testing.assert_close(end, pipeline(1, label=a, seed=seed, **options).voxels[0])
    way = pipeline.interpolate(a, b, 3, seed=4, **options).voxels
    for end, label in ((way[0], a), (way[-1], b)):
        torch.testing.assert_close(end, pipeline(1, label=label, seed=4, **options).voxels[0])
    assert not torch.equal(way[1], way[0]) and not torch.equal(way[1], way[-1])
    shape = pipeline(4, label=a, seed=9, **options).voxels[2]
    assert torch.equal(shape, pipeline([2], label=a, seed=9, **options).voxels[0])
    assert pipeline(1).voxels.shape == (1, 8, 8, 8)  # of no class


def test_it_is_evaluated_by_the_same_command(
    learnt: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    data = str(request.getfixturevalue("dataset"))
    assert (
        cli.main(["--checkpoint", str(learnt), "--data", data, "--num", "4", "--points", "64", "--device", "cpu"]) == 0
    )
    assert "| 1-NNA CD, % |" in capsys.readouterr().out


def test_edits_of_given_shapes_are_refused(learnt: Path) -> None:
    method, label = CONFIG.build(resolution=8, num_classes=2), torch.tensor([0])
    networks = networks_of(method)
    for edit in (Edit(mirror=torch.arange(512)), Edit(x_0=torch.zeros(512), strength=0.5), Edit(x_T=torch.zeros(1, 8))):
        with pytest.raises(ConfigError, match="interpolates between seeds and classes"):
            method.sample(networks, label, [0], config=SampleConfig(), edit=edit)
    shape = torch.ones(8, 8, 8)
    with pytest.raises(ConfigError, match="no latent of a given shape"):
        ShapePipeline.from_pretrained(learnt).interpolate(shape, -shape, 3)


def test_a_run_may_start_from_an_export_with_another_critic_and_other_classes(tmp_path: Path) -> None:
    networks = networks_of(CONFIG.build(resolution=8, num_classes=2))
    config = export(tmp_path, networks, ("cup", "box"))
    method = replace(CONFIG, critic=VoxelCriticConfig(width=16), num_critic_steps=5)
    weights = exported_weights(str(tmp_path), replace(config, classes=("box", "lamp"), method=method))
    rows = networks["generator"].get_parameter("condition.label.weight")
    assert list(weights) == ["generator"]
    assert torch.equal(weights["generator"]["condition.label.weight"], rows[[1, 2, 2]])
