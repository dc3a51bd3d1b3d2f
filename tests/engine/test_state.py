"""States of one process: the whole comes back, is kept as asked, and damage is found out. Several: tests/distributed."""

from __future__ import annotations

import errno
import logging
from pathlib import Path

import pytest
import torch
from torch import nn

from shapediff.engine import state_files
from shapediff.engine.ema import Ema
from shapediff.engine.shares import Shares, _even_cut
from shapediff.engine.state import Progress, finished_states, load_newest_state, save_state
from shapediff.errors import CheckpointError
from tests.engine.engines import WholeEngine


class Run:
    """Two small networks, their average, and a position."""

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        networks = {"a": nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 1)), "b": nn.Conv3d(2, 3, 3)}
        self.engines = {name: WholeEngine(network) for name, network in networks.items()}
        self.shares = Shares(self.engines)
        self.ema = Ema(self.shares, decay=0.9)
        self.progress = Progress()

    def step(self) -> None:
        for engine in self.engines.values():
            engine.step()
        self.ema.update()
        step = self.progress.step + 1
        self.progress = Progress(step, skipped=step // 2, samples_seen=8 * step, seconds=0.5 * step)

    def save(self, folder: Path, **keep: int) -> None:
        save_state(folder, self.progress, self.shares, self.ema, **{"keep": 3} | keep)

    def everything(self) -> list[torch.Tensor]:
        found = [*self.ema.averages]
        for engine in self.engines.values():
            for p in engine.module.parameters():
                found += [p.detach(), *(engine.optimizer.state[p][key] for key in ("step", "exp_avg", "exp_avg_sq"))]
        return found


def run_of(steps: int) -> Run:
    run = Run()
    for _ in range(steps):
        run.step()
    return run


@pytest.mark.parametrize("before", [0, 3])
def test_a_resumed_run_is_the_same_run(tmp_path: Path, before: int) -> None:
    straight = run_of(before)
    straight.save(tmp_path)
    noise = torch.randn(4)
    resumed = Run(seed=1)
    resumed.progress = load_newest_state(tmp_path, resumed.shares, resumed.ema)  # type: ignore[assignment]
    assert resumed.progress == straight.progress
    assert torch.equal(torch.randn(4), noise)  # the generator goes on, too
    for _ in range(3):
        straight.step()
        resumed.step()
    for found, expected in zip(resumed.everything(), straight.everything(), strict=True):
        assert torch.equal(found, expected)
    assert resumed.ema.num_updates == before + 3


def test_a_network_that_has_made_no_step_yet_starts_as_one(tmp_path: Path) -> None:
    run, resumed = Run(), Run(seed=1)
    run.engines["a"].step()
    run.save(tmp_path)
    load_newest_state(tmp_path, resumed.shares, resumed.ema)
    assert resumed.shares.num_steps() == {"a": 1, "b": 0}
    run.step()
    resumed.step()
    assert all(torch.equal(a, b) for a, b in zip(resumed.everything(), run.everything(), strict=True))


def test_no_state_is_none(tmp_path: Path) -> None:
    run = Run()
    assert load_newest_state(tmp_path / "state", run.shares, run.ema) is None


def test_the_newest_stay_and_every_nth(tmp_path: Path) -> None:
    run = Run()
    for _ in range(9):
        run.step()
        run.save(tmp_path, keep=2, keep_every=4)
    assert [folder.name for folder in finished_states(tmp_path)] == [f"step-{n:08d}" for n in (4, 8, 9)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-{n:08d}" for n in (4, 8, 9)]


def test_a_damaged_state_is_set_aside_and_the_one_before_is_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run()
    for _ in range(3):
        run.step()
        run.save(tmp_path)
    newest, middle, oldest = reversed(finished_states(tmp_path))
    (newest / state_files.MANIFEST_FILE).unlink()
    path = middle / state_files.rank_file(0)
    path.write_bytes(path.read_bytes()[:-1])
    with caplog.at_level(logging.WARNING):
        assert load_newest_state(tmp_path, run.shares, run.ema) == Progress(1, samples_seen=8, seconds=0.5)
    assert "manifest.json is missing" in caplog.messages[0]
    assert f"{path} holds" in caplog.messages[1]
    assert finished_states(tmp_path) == [oldest]
    (oldest / state_files.PROGRESS_FILE).write_text("{}")
    with pytest.raises(CheckpointError, match=r"no state is intact: .*progress.json holds 2 bytes of"):
        load_newest_state(tmp_path, run.shares, run.ema)
    assert finished_states(tmp_path) == [oldest]  # nothing is touched where nothing helps


def test_what_a_kill_left_is_no_state_and_is_cleared(tmp_path: Path) -> None:
    run = run_of(1)
    run.save(tmp_path)
    (finished_states(tmp_path)[0]).rename(tmp_path / "step-00000001.partial")
    (tmp_path / "step-00000000.old").mkdir()
    assert load_newest_state(tmp_path, run.shares, run.ema) is None
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("at", range(3))
def test_a_full_disk_leaves_the_states_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """Full at the first, second or third file: tensors, progress, manifest."""
    run = run_of(1)
    run.save(tmp_path)
    before = finished_states(tmp_path)
    run.step()
    write, written = state_files._write, []

    def full(path: Path, *parts: object) -> state_files.FileFacts:
        written.append(path)
        if len(written) > at:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return write(path, *parts)  # type: ignore[arg-type]

    monkeypatch.setattr(state_files, "_write", full)
    with pytest.raises(CheckpointError, match=r"cannot be written: .*No space left on device.*rank 0"):
        run.save(tmp_path, keep=1)
    assert list(tmp_path.iterdir()) == before
    monkeypatch.undo()
    assert load_newest_state(tmp_path, run.shares, run.ema) == Progress(1, samples_seen=8, seconds=0.5)


def test_the_state_of_another_model_is_refused(tmp_path: Path) -> None:
    run_of(1).save(tmp_path)
    other = Shares({"a": WholeEngine(nn.Linear(3, 5))})
    with pytest.raises(CheckpointError, match=r"another model: 8 parameters differ, the first is a.0.bias"):
        load_newest_state(tmp_path, other, Ema(other, decay=0.9))


@pytest.mark.parametrize("count", [1, 2, 3, 7, 100])
def test_an_even_cut_takes_every_element_once(count: int) -> None:
    shares = Run().shares.held
    whole = torch.cat([share.weight for share in shares])
    parts = [_even_cut(shares, index, count) for index in range(count)]
    assert torch.equal(torch.cat([share.weight for part in parts for share in part]), whole)
    sizes = [sum(share.weight.numel() for share in part) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    by_name = {share.name: share.weight for share in shares}
    for share in (share for part in parts for share in part):
        stop = share.start + share.weight.numel()
        assert torch.equal(share.weight, by_name[share.name][share.start : stop])
        assert torch.equal(
            share.owner.detach().view(-1)[share.offset : share.offset + share.weight.numel()], share.weight
        )
