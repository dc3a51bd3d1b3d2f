"""Starting from an export: which weights are kept, which rows of labels go where, and what is refused."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shapediff.checkpoint import ExportConfig, read_export, write_export
from shapediff.engine.config import LoopConfig, TrainConfig
from shapediff.engine.finetuning import (
    at_resolution,
    check_same_run,
    check_started_from,
    exported_weights,
    initial_weights,
    rows_of_classes,
)
from shapediff.errors import CheckpointError, ConfigError
from shapediff.grid.morton import dense_to_morton, morton_to_dense
from shapediff.methods import LatentDiffusionConfig, MethodConfig, ShapeVAEConfig, VoxelDiffusionConfig, WganGpConfig
from shapediff.models import DiT3DConfig, ModelConfig, UNet3DConfig, VAE3DConfig, VoxelGeneratorConfig

MODELS = {
    "unet3d": UNet3DConfig(width=8, width_multipliers=(1, 2), num_res_blocks=1, attention_levels=(1,)),
    "dit3d": DiT3DConfig(hidden_size=24, depth=2, num_heads=2),
}
CONFIG = ExportConfig(
    resolution=8,
    field="occupancy",
    classes=("bed", "car", "mug"),
    method=VoxelDiffusionConfig(),
    model=MODELS["unet3d"],
)


@pytest.fixture(params=MODELS)
def export(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return exported(tmp_path, replace(CONFIG, model=MODELS[request.param]))


def exported(tmp_path: Path, config: ExportConfig) -> Path:
    """An export of random weights."""
    torch.manual_seed(0)
    networks = config.build_method().build_networks(config.model)
    for network in networks.values():
        for p in network.parameters():
            torch.nn.init.normal_(p, std=0.1)
    write_export(
        tmp_path / "export", config, {name: n.state_dict() for name, n in networks.items()}, dtype=torch.float32
    )
    return tmp_path


def test_rows_go_by_name_and_new_ones_start_as_the_null_row() -> None:
    rows = torch.arange(4.0)[:, None]
    assert rows_of_classes(rows, ("a", "b", "c"), ("c", "new", "a"))[:, 0].tolist() == [2, 3, 0, 3]
    assert torch.equal(rows_of_classes(rows, ("a", "b", "c"), ("a", "b", "c")), rows)


def test_all_but_the_rows_is_kept_bit_for_bit(export: Path) -> None:
    there = read_export(export)
    here = replace(there.config, classes=("mug", "boat", "bed", "cup"))
    (weights,) = exported_weights(str(export), here).values()
    before = there.networks["denoiser"].state_dict()
    assert weights.keys() == before.keys()
    (rows,) = (key for key in before if before[key].shape != weights[key].shape)
    assert all(torch.equal(weights[key], before[key]) for key in before if key != rows)
    bed, _, mug, null = before[rows]
    assert torch.equal(weights[rows], torch.stack([mug, null, bed, null, null]))


def test_a_known_class_gives_what_it_gave_and_a_new_one_the_unconditional(export: Path) -> None:
    there = read_export(export)
    here = replace(there.config, classes=("new", "mug"))
    network = here.build_method().build_networks(here.model)["denoiser"]
    network.load_state_dict(exported_weights(str(export), here)["denoiser"])
    network.eval()
    x_t, t = torch.randn(3, 8**3), torch.tensor([10, 500, 900])
    before, after = torch.tensor([2, 3, 3]), torch.tensor([1, 0, 2])  # mug; new, which was no class; no class
    with torch.inference_mode():
        assert torch.equal(network(x_t, t, after), there.networks["denoiser"](x_t, t, before))


@pytest.mark.parametrize(
    ("method", "model"),
    [
        *((VoxelDiffusionConfig(), model) for model in MODELS.values()),
        (ShapeVAEConfig(), VAE3DConfig(width=8)),
    ],
)
def test_at_another_resolution_all_but_what_there_is_of_a_cell_is_kept(
    method: MethodConfig, model: ModelConfig, tmp_path: Path
) -> None:
    path = exported(tmp_path, replace(CONFIG, method=method, model=model))
    ((name, network),) = read_export(path).networks.items()
    before = network.state_dict()
    here = replace(CONFIG, method=method, model=model, resolution=16)
    larger = exported_weights(str(path), here)[name]
    here.build_method().build_networks(model)[name].load_state_dict(larger)
    changed = {key for key in before if before[key].shape != larger[key].shape}
    assert changed == {key for key in before if key.endswith((".table", "prior"))}
    assert all(torch.equal(before[key], larger[key]) for key in before.keys() - changed)
    back = exported(tmp_path / "larger", here)
    smaller = exported_weights(str(back), replace(here, resolution=8))[name]
    assert {key: value.shape for key, value in smaller.items()} == {key: value.shape for key, value in before.items()}


def test_positions_of_another_resolution_are_where_they_were() -> None:
    """A table that is linear in place stays so, half a cell inside the cube; halving takes means of 2^3."""
    model = MODELS["unet3d"]
    place = (torch.arange(4.0) + 0.5) / 4
    table = torch.stack(torch.meshgrid(place, place, place, indexing="ij"))
    finer = at_resolution("down.0.position.table", table, (3, 8, 8, 8), model=model)
    assert torch.allclose(finer[0, 1:-1, 3, 5], (torch.arange(1, 7) + 0.5) / 8)
    assert torch.allclose(finer[2, 3, 5, 1:-1], (torch.arange(1, 7) + 0.5) / 8)
    coarser = at_resolution("down.0.position.table", table, (3, 2, 2, 2), model=model)
    assert torch.allclose(coarser, torch.nn.functional.avg_pool3d(table, 2))


def test_latents_of_another_resolution_have_the_prior_of_the_cell_they_were_in() -> None:
    """Seen as cells in space, not in Morton order: 2^3 cells of 8 numbers to 4^3, and back."""
    model, num_classes = VAE3DConfig(latent_channels=8), 3
    prior = torch.randn(num_classes, 2 * 2**3 * 8)
    finer = at_resolution("prior", prior, (num_classes, 2 * 4**3 * 8), model=model)
    for half, finer_half in zip(prior.chunk(2, 1), finer.chunk(2, 1), strict=True):
        cells, finer_cells = (part.unflatten(1, (-1, 8)).movedim(2, 1) for part in (half, finer_half))
        grid = morton_to_dense(cells.flatten(0, 1))
        doubled = grid.repeat_interleave(2, 1).repeat_interleave(2, 2).repeat_interleave(2, 3)
        assert torch.equal(finer_cells.flatten(0, 1), dense_to_morton(doubled))
    assert torch.allclose(at_resolution("prior", finer, tuple(prior.shape), model=model), prior)


def test_what_has_a_size_of_its_own_stays_at_its_resolution(tmp_path: Path) -> None:
    config = replace(CONFIG, method=WganGpConfig(), model=VoxelGeneratorConfig(width=8))
    path = exported(tmp_path, config)
    with pytest.raises(CheckpointError, match=r"generator\.start\.weight cannot be taken from 8\^3 to 16\^3"):
        exported_weights(str(path), replace(config, resolution=16))


def test_a_vae_keeps_the_priors_of_classes(tmp_path: Path) -> None:
    config = replace(CONFIG, method=ShapeVAEConfig(), model=VAE3DConfig(width=8))
    path = exported(tmp_path, config)
    before = read_export(path).networks["vae"].state_dict()["prior"]
    after = exported_weights(str(path), replace(config, classes=("mug", "boat")))["vae"]["prior"]
    assert torch.equal(after, before[[2, 3, 3]])


def test_diffusion_of_latents_starts_from_its_denoiser_alone(tmp_path: Path) -> None:
    """The autoencoder is taken, not trained: it is none of what the run starts from."""
    autoencoder = VAE3DConfig(width=8)
    method = LatentDiffusionConfig(autoencoder=autoencoder, latent_mean=(0.0,) * 8, latent_std=(1.0,) * 8)
    config = replace(CONFIG, method=method, model=UNet3DConfig(width=8, width_multipliers=(1,), attention_levels=()))
    path = exported(tmp_path, config)
    before = read_export(path).networks["denoiser"].state_dict()
    weights = exported_weights(str(path), config)
    assert weights.keys() == {"denoiser"}
    assert all(torch.equal(weights["denoiser"][key], before[key]) for key in before)


def test_what_trains_otherwise_may_differ(export: Path) -> None:
    config = read_export(export).config
    here = replace(
        config,
        model=replace(config.model, recompute_activations=True),
        method=VoxelDiffusionConfig(weighting="min_snr", class_dropout=0.2),
    )
    assert exported_weights(str(export), here)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"field": "tsdf"}, "field: occupancy there, tsdf here"),
        (
            {"field": "tsdf", "truncation_voxels": 1.5},
            "field: occupancy there, tsdf here\n  truncation_voxels: 3.0 there, 1.5 here",
        ),
        ({"model": replace(MODELS["unet3d"], width=16)}, "model.width: 8 there, 16 here"),
        ({"model": MODELS["dit3d"]}, "model: UNet3DConfig there, DiT3DConfig here"),
        ({"method": VoxelDiffusionConfig(prediction="v")}, "method.prediction: epsilon there, v here"),
    ],
)
@pytest.mark.parametrize("export", ["unet3d"], indirect=True)
def test_what_does_not_fit_is_named(export: Path, changed: dict[str, object], message: str) -> None:
    with pytest.raises(CheckpointError, match=f"init_from=.* does not fit this run:\n  {message}\n"):
        exported_weights(str(export), replace(CONFIG, **changed))  # type: ignore[arg-type]


def test_there_must_be_an_export(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no export at"):
        exported_weights(str(tmp_path), CONFIG)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"method": VoxelDiffusionConfig(prediction="x0")}, "method.prediction: epsilon there, x0 here"),
        ({"resolution": 16}, "resolution: 8 there, 16 here"),
        ({"classes": ("car", "bed", "mug")}, r"classes: \('bed', 'car', 'mug'\) there, \('car', 'bed', 'mug'\) here"),
    ],
)
def test_a_run_does_not_go_on_as_another(changed: dict[str, object], message: str) -> None:
    """None of these changes the shape of a weight."""
    with pytest.raises(ConfigError, match=f"started with other settings:\n  {message}\n"):
        check_same_run("runs/a", CONFIG, replace(CONFIG, **changed))  # type: ignore[arg-type]


def test_a_run_goes_on_where_what_was_measured_differs_in_the_last_digits() -> None:
    def config(mean: float, std: float) -> ExportConfig:
        method = LatentDiffusionConfig(latent_mean=(mean,) * 8, latent_std=(std,) * 8)
        return replace(CONFIG, method=method)

    check_same_run("runs/a", config(0.0, 1.2), config(1e-4, 1.2001))
    with pytest.raises(ConfigError, match=r"method\.latent_std"):
        check_same_run("runs/a", config(0.0, 1.2), config(0.0, 1.25))


@pytest.mark.parametrize("export", ["unet3d"], indirect=True)
def test_a_run_that_has_a_state_goes_on_from_it(export: Path, tmp_path: Path) -> None:
    run = TrainConfig(run_dir=str(tmp_path / "run"), train=LoopConfig(init_from=str(export)))
    assert initial_weights(replace(run, train=LoopConfig()), CONFIG) == {}
    assert initial_weights(run, CONFIG).keys() == {"denoiser"}
    (tmp_path / "run" / "state" / "step-00000004.partial").mkdir(parents=True)  # was never finished
    assert initial_weights(run, CONFIG)
    check_started_from(run)
    (tmp_path / "run" / "state" / "step-00000002").mkdir()
    shutil.rmtree(export / "export")
    assert initial_weights(run, CONFIG) == {}
    with pytest.raises(CheckpointError, match=r"no state of .* can be read; remove its folder state/"):
        check_started_from(run)
