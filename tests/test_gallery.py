"""Sampling at scale: many processes, stopped and gone on with, leave the files that one process leaves, byte for byte."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
import torch

from shapediff import progress, writing
from shapediff import sample as cli
from shapediff.batching import fitting_batch_size, in_batches, power_of_two_below
from shapediff.errors import ConfigError, DataError
from shapediff.gallery import PARTS_FOLDER, Gallery, merge_manifest, open_gallery, read_manifest
from shapediff.geometry.printable import MeshOptions
from shapediff.methods import SampleConfig
from shapediff.pipeline import ShapePipeline
from shapediff.progress import Stopped
from shapediff.ranks import Ranks, ranks_from
from tests.test_checkpoint import export

NUM = 5


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    export(path)
    return path


def command(model: Path, out: Path, *more: str) -> list[str]:
    settings = ["--checkpoint", str(model), "--out", str(out), "--steps", "2", "--device", "cpu"]
    return [*settings, "--class", "all", "--num", str(NUM), *more]


@pytest.fixture(scope="module")
def straight(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process leaves that nothing stops."""
    out = tmp_path_factory.mktemp("straight")
    assert cli.main(command(model, out)) == 0
    return out


def files(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The seeds of all shapes that are computed from here on, the step of noise aside that says how many may be together."""
    seeds: list[int] = []
    compute = ShapePipeline._sample

    def spy(
        self: ShapePipeline, index: int, those: Sequence[int], edit: object, config: SampleConfig, *rest: object
    ) -> torch.Tensor:
        seeds.extend(those if config.num_steps > 1 else ())
        return compute(self, index, those, edit, config, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(ShapePipeline, "_sample", spy)
    return seeds


def as_rank(monkeypatch: pytest.MonkeyPatch, rank: int, world_size: int) -> None:
    for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size}.items():
        monkeypatch.setenv(name, str(value))


@pytest.mark.parametrize("world_size", [2, 3])
def test_many_processes_make_what_one_makes(
    model: Path, straight: Path, tmp_path: Path, sampled: list[int], monkeypatch: pytest.MonkeyPatch, world_size: int
) -> None:
    for rank in reversed(range(world_size)):
        as_rank(monkeypatch, rank, world_size)
        before = len(sampled)
        assert cli.main([f"--local_rank={rank}", *command(model, tmp_path)]) == 0
        assert len(sampled) - before == len(range(rank, 2 * NUM, world_size))
    assert files(tmp_path) == files(straight)


def test_a_rank_that_is_lost_is_missed_and_made_up_for(
    model: Path, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    as_rank(monkeypatch, 0, 2)
    assert cli.main(command(model, tmp_path)) == 1
    assert f"{NUM} shapes of other ranks are missing" in capsys.readouterr().err
    assert len(read_manifest(tmp_path)) == NUM
    as_rank(monkeypatch, 0, 1)
    assert cli.main(command(model, tmp_path)) == 0
    assert files(tmp_path) == files(straight)


def test_the_bar_begins_with_what_is_there(straight: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [line["name"] for line in read_manifest(straight)]
    with progress.GalleryProgress(Gallery(straight), names, shown=True):
        pass
    assert f"{len(names)}/{len(names)}" in capsys.readouterr().err


def test_meshes_that_are_made_beside_the_sampling_are_the_same(
    model: Path, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In threads here, which start at once; processes are for the GPU."""
    monkeypatch.setattr(writing, "num_workers", lambda *args: 2)
    monkeypatch.setattr(writing, "MAX_PENDING", 3)
    monkeypatch.setattr(writing, "ProcessPoolExecutor", lambda num, **options: ThreadPoolExecutor(num))
    assert cli.main(command(model, tmp_path)) == 0
    assert files(tmp_path) == files(straight)


def test_stopped_with_its_processes_it_keeps_what_they_had_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also what was written behind one that was lost; and the signal is what the caller hears of."""
    monkeypatch.setattr(writing, "num_workers", lambda *args: 1)
    monkeypatch.setattr(writing, "ProcessPoolExecutor", lambda num, **options: ThreadPoolExecutor(num))
    gallery, names = open_gallery(tmp_path, {"a": 1}), ["lost", "done", "running", "done too"]
    options = {"num": len(names), "device": torch.device("cpu"), "ranks": Ranks()}
    pending: list[Future[dict[str, object]]] = [Future() for _ in names]
    pending[0].set_exception(BrokenProcessPool("terminated"))
    for i in (1, 3):
        pending[i].set_result({"name": names[i], "file": None})

    def write_until_stopped() -> None:
        with writing.open_writer(gallery, "obj", MeshOptions(), **options) as writer:  # type: ignore[arg-type]
            writer._pending.extend(pending)
            raise Stopped(signal.SIGTERM)

    with pytest.raises(Stopped):
        write_until_stopped()
    assert [line["name"] for line in gallery.lines(names)] == ["done", "done too"]


def test_processes_to_write_are_those_that_would_be_idle() -> None:
    cuda, cores = torch.device("cuda"), len(os.sched_getaffinity(0))
    assert writing.num_workers(10_000, torch.device("cpu"), Ranks()) == 0
    assert writing.num_workers(8, cuda, Ranks()) == 0
    assert writing.num_workers(10_000, cuda, Ranks()) == min(8, cores - 1)
    assert writing.num_workers(10_000, cuda, Ranks(0, 2 * cores, 0, 2 * cores)) == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_told_to_stop_it_keeps_what_is_done(
    model: Path,
    straight: Path,
    tmp_path: Path,
    sampled: list[int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: int,
) -> None:
    add, handlers = Gallery.add, [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    lines: list[dict[str, object]] = []

    def add_and_stop(self: Gallery, line: dict[str, object]) -> None:
        add(self, line)
        lines.append(line)
        if len(lines) == 3:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Gallery, "add", add_and_stop)
    assert cli.main(command(model, tmp_path)) == 128 + number
    assert f"3 of {2 * NUM} shapes" in capsys.readouterr().err
    assert len(read_manifest(tmp_path)) == 3
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers
    sampled.clear()
    monkeypatch.setattr(Gallery, "add", add)
    assert cli.main(command(model, tmp_path)) == 0
    assert len(sampled) == 2 * NUM - 3
    assert files(tmp_path) == files(straight)


def test_killed_it_loses_what_was_in_flight(model: Path, straight: Path, tmp_path: Path, sampled: list[int]) -> None:
    part = tmp_path / PARTS_FOLDER / "rank-00000.jsonl"
    running = subprocess.Popen(
        [sys.executable, "-m", "shapediff.sample", *command(model, tmp_path)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 180
    while not (part.exists() and part.read_bytes().count(b"\n") >= 2) and time.monotonic() < deadline:
        time.sleep(0.001)
    running.kill()
    running.wait()
    done = part.read_bytes().count(b"\n")
    part.write_bytes(part.read_bytes() + b'{"time": 1, "name": "chai')  # a line that was cut short as well
    assert cli.main(command(model, tmp_path)) == 0
    assert done >= 2
    assert len(sampled) == 2 * NUM - done
    partials = {name for name in files(tmp_path) if ".partial" in name}
    assert {name: data for name, data in files(tmp_path).items() if name not in partials} == files(straight)


def test_the_same_command_mends_what_is_damaged(
    model: Path, straight: Path, tmp_path: Path, sampled: list[int]
) -> None:
    assert cli.main(command(model, tmp_path)) == 0
    lines = [line for line in read_manifest(tmp_path) if line["file"]]
    first, second, third = (tmp_path / line["file"] for line in lines[:3])
    first.write_bytes(first.read_bytes()[:-10])
    second.unlink()
    third.write_bytes(third.read_bytes().replace(b"v", b"w", 1))  # of the same size
    sampled.clear()
    assert cli.main(command(model, tmp_path)) == 0
    assert sorted(sampled) == sorted(line["seed"] for line in lines[:3])
    assert files(tmp_path) == files(straight)
    sampled.clear()
    assert cli.main(command(model, tmp_path, "--num", "2", "--guidance", "3", "--batch-size", "7")) == 0
    assert sampled == []  # defaults spelled out are the same request


def test_another_command_never_mixes_in(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    base = ["--checkpoint", str(model), "--steps", "2", "--num", "1", "--class", "chair"]
    assert cli.main([*base, "--out", "a"]) == 0
    before = files(tmp_path / "a")
    for change, named in (
        (["--seed", "1"], "seed=0"),
        (["--format", "glb"], "format=obj"),
        (["--steps", "3"], "steps=2"),
    ):
        assert cli.main([*base, "--out", "a", *change]) == 2
        assert named in capsys.readouterr().err
    assert files(tmp_path / "a") == before
    for change, folder in (
        ([], "samples"),
        (["--seed", "1"], "samples-2"),
        (["--seed", "2"], "samples-3"),
        ([], "samples"),
    ):
        assert cli.main([*base, *change]) == 0
        assert f"1 mesh in {folder} " in capsys.readouterr().out
    (tmp_path / "b").mkdir()
    merge_manifest(tmp_path / "b", [{"name": "mine", "file": None}])
    assert cli.main([*base, "--out", "b"]) == 2
    assert "no command has put down" in capsys.readouterr().err


def test_a_gallery_of_ten_thousand(tmp_path: Path) -> None:
    names = [f"chair_{i:04d}" for i in range(10_002)]
    ranks = [open_gallery(tmp_path, {"seed": 0}, rank=rank) for rank in range(3)]
    for rank, gallery in enumerate(ranks):
        for name in Ranks(rank, 3, rank, 3).share(names):
            gallery.add({"name": name, "file": None})
    assert ranks[0].count(names) == len(names)
    ranks[1].merge()
    assert [line["name"] for line in read_manifest(tmp_path)] == names  # in the order of their numbers
    assert open_gallery(tmp_path, {"seed": 0}).missing(names) == []


def test_the_later_of_two_lines_holds(tmp_path: Path) -> None:
    one, other = (open_gallery(tmp_path, {}, rank=rank) for rank in (1, 0))
    one.add({"name": "a", "file": None, "reason": "first"})
    other.add({"name": "a", "file": None, "reason": "second"})
    assert open_gallery(tmp_path, {}).lines(["a"]) == [{"name": "a", "file": None, "reason": "second"}]


def test_a_foreign_manifest_is_refused_or_not_believed(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(DataError, match="damaged"):
        open_gallery(tmp_path, {})
    (tmp_path / "out").mkdir()
    gallery = open_gallery(tmp_path / "out", {})
    gallery.add({"name": "a", "file": "../manifest.json", "bytes": 1, "sha256": "5e"})
    assert gallery.missing(["a"]) == ["a"]


@pytest.mark.parametrize("num_items", [1, 7, 8])
def test_where_memory_runs_out_batches_are_halved(num_items: int, caplog: pytest.LogCaptureFixture) -> None:
    def compute(part: Sequence[int], size: int) -> list[int]:
        if size > 2:
            raise torch.cuda.OutOfMemoryError
        return list(part)

    batches = list(in_batches(range(num_items), 8, compute))
    assert [item for part, _, result in batches for item in result] == list(range(num_items))
    assert {size for _, size, _ in batches} == {2}
    assert all(list(part) == result for part, _, result in batches)
    assert "going on with 2" in caplog.text
    with pytest.raises(ConfigError, match="one shape at a time"):
        list(in_batches([0], 1, lambda part, size: compute(part, 3)))


def test_a_power_of_two_below() -> None:
    for number in range(1, 70):
        power = power_of_two_below(number + 0.5, 64)
        assert power <= number < 2 * power or (power == 64 and number >= 64)
    assert power_of_two_below(0.3, 64) == 1


@pytest.mark.parametrize(("free", "expected"), [(30, 16), (19, 8), (1, 1), (1e6, 64)])
def test_a_batch_fills_at_most_four_fifths(
    model: Path, monkeypatch: pytest.MonkeyPatch, free: float, expected: int
) -> None:
    """A GPU that is made up: each sample takes 50 bytes beside the 1000 that are taken, `free` times that is free."""
    pipeline = ShapePipeline.from_pretrained(model)
    answers = {
        "reset_peak_memory_stats": None,
        "memory_allocated": 1000,
        "max_memory_allocated": 1000 + 2 * 50,
        "mem_get_info": (int(free * 50), 0),
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, answer=answer: answer)
    assert pipeline._fitting_batch_size(pipeline.config.sampling, "float32") == expected


@pytest.mark.gpu
def test_a_batch_fits_the_memory_found() -> None:
    device = torch.device("cuda")
    free, _ = torch.cuda.mem_get_info(device)
    per_sample = free // 20
    size = fitting_batch_size(device, lambda n: torch.empty(n * per_sample, dtype=torch.uint8, device=device).fill_(0))
    assert size == 16  # of the 16 that fill 80 %


def test_ranks_are_read_from_the_environment() -> None:
    assert ranks_from({}) == Ranks()
    assert ranks_from({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_SIZE": "4"}) == Ranks(5, 8, 1, 4)
    for wrong in ({"RANK": "x", "WORLD_SIZE": "2"}, {"RANK": "2", "WORLD_SIZE": "2"}):
        with pytest.raises(ConfigError, match="WORLD_SIZE"):
            ranks_from(wrong)
    for world_size in (1, 2, 3, 7):
        shares = [Ranks(r, world_size, r, world_size).share(range(20)) for r in range(world_size)]
        assert sorted(number for share in shares for number in share) == list(range(20))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
