"""Where checkpoints come from: folders, names, the hub's cache. No test asks the network, and nothing does by default."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch

from shapediff import hub
from shapediff import sample as cli
from shapediff.checkpoint import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE, read_export
from shapediff.errors import CheckpointError, ConfigError
from shapediff.hub import default_checkpoint, locate
from shapediff.pipeline import ShapePipeline
from tests.test_checkpoint import export

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    export(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> str:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)


@pytest.mark.usefixtures("no_network")
def test_paths_never_ask_the_network(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model.parent)
    monkeypatch.setattr(hub, "PRETRAINED_FOLDER", model.parent / "none")
    (model.parent / "user").mkdir()
    for path in (
        "runs/none",
        "./user2/name",
        "user/none",
        Path("someone/name"),
        "a/b/c",
        "name",
        "../user2/name",
        "-a/b",
        "~/a",
    ):
        with pytest.raises(CheckpointError, match="no checkpoint at"):
            locate(path)
    shutil.copytree(model, model.parent / "user" / "name")
    assert locate("user/name") == Path("user/name")
    (model.parent / "run").mkdir()
    shutil.copytree(model, model.parent / "run" / "export")
    assert locate("run") == Path("run/export")


def test_a_hub_id_takes_three_files_and_nothing_else(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def download(hub_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.extend([hub_id, revision, sorted(allow_patterns)])
        return str(model)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    pipeline = ShapePipeline.from_pretrained("someone/chairs-32", revision="v1")
    assert asked == ["someone/chairs-32", "v1", [CARD_FILE, CONFIG_FILE, WEIGHTS_FILE]]
    assert pipeline.classes == ("chair", "椅子")


def test_the_cache_of_the_hub_works_offline(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    repository = cache / "models--someone--chairs"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    shutil.copytree(model, repository / "snapshots" / COMMIT)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert locate("someone/chairs") == repository / "snapshots" / COMMIT
    with pytest.raises(CheckpointError, match="no folder someone/tables, and the Hugging Face hub does not give it"):
        locate("someone/tables")


def test_without_huggingface_hub_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r"pip install 'shapediff\[hub\]'"):
        locate("someone/chairs")


@pytest.mark.usefixtures("no_network")
def test_what_comes_with_the_package_is_the_last_resort(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = model.parent / "pretrained"
    folder.mkdir()
    monkeypatch.setattr(hub, "PRETRAINED_FOLDER", folder)
    monkeypatch.chdir(model.parent)
    with pytest.raises(CheckpointError, match="none comes with this copy"):
        default_checkpoint()
    shutil.copytree(model, folder / "shapes32")
    assert ShapePipeline.from_pretrained("shapes32").classes == ("chair", "椅子")
    assert cli.main(["--num", "1", "--steps", "1"]) == 0
    assert str(folder / "shapes32") in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="there are: shapes32"):
        locate("shapes64")
    shutil.copytree(model, model.parent / "runs" / "mine" / "export")
    assert default_checkpoint() == Path("runs/mine/export")


def test_save_pretrained_is_read_back_and_leaves_what_is_there(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "repository"
    (out / ".git").mkdir(parents=True)
    (out / ".git" / "HEAD").write_text("ref")
    pipeline = ShapePipeline.from_pretrained(model)
    pipeline(1, num_steps=1, precision="bf16")  # makes rounded weights, which are not those to save
    pipeline.save_pretrained(out, license="apache-2.0")
    saved, first = read_export(out), read_export(model)
    assert saved.config == first.config
    found = saved.networks["denoiser"].state_dict()
    for key, value in first.networks["denoiser"].state_dict().items():
        assert torch.equal(found[key], value)
    assert (out / ".git" / "HEAD").read_text() == "ref"
    card = huggingface_hub.ModelCard.load(out / CARD_FILE)
    assert card.data.license == "apache-2.0"
    assert card.data.library_name == "shapediff"
    assert card.data.pipeline_tag == "text-to-3d"
    assert "shapediff" in card.data.tags
    (out / CARD_FILE).write_text("mine")
    pipeline.save_pretrained(out)
    assert (out / CARD_FILE).read_text() == "mine"
    with pytest.raises(ConfigError, match="license"):
        pipeline.save_pretrained(tmp_path / "other", license="mine\ntags: x")
    assert not (tmp_path / "other").exists()
