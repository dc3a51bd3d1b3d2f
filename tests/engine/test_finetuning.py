"""Starting from an export: which weights are kept, which rows of labels go where, and what is refused."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shapediff.checkpoint import ExportConfig, read_export, write_export
from shapediff.engine.config import LoopConfig, TrainConfig
from shapediff.engine.finetuning import check_started_from, exported_weights, initial_weights, rows_of_classes
from shapediff.errors import CheckpointError
from shapediff.methods import VoxelDiffusionConfig
from shapediff.models import DiT3DConfig, UNet3DConfig

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
    """An export of random weights."""
    config = replace(CONFIG, model=MODELS[request.param])
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
        ({"resolution": 16}, "resolution: 8 there, 16 here"),
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
