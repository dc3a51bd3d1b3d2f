"""Training in forked ranks: what takes ten seconds to import is imported once, so that many runs fit into one test.

`ForkedRanks` starts this file as a server, in a process of its own where nothing has started threads; the server forks the
ranks of each run. A run may be given faults, see `_apply_faults`.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partialmethod
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 180
STOPPED = 75


@dataclass(frozen=True)
class Outcome:
    """Exit statuses by rank, negative for signals, and what rank 0 logged."""

    codes: list[int]
    log: str


class ForkedRanks:
    """A context manager; `train` runs one training to its end, however it ends."""

    def __enter__(self) -> ForkedRanks:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        }
        command = [sys.executable, "-m", "tests.distributed.forked"]
        self._server = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stdin.close()  # type: ignore[union-attr]
        self._server.wait(timeout=TIMEOUT)

    def train(self, config: Mapping[str, Any], *, ranks: int, **faults: Any) -> Outcome:
        """Train as TrainConfig.from_dict(config) says on `ranks` ranks; the log lies at `run_dir`.log."""
        assert self._server.stdin and self._server.stdout
        self._server.stdin.write(json.dumps({"config": config, "ranks": ranks, "faults": faults}) + "\n")
        self._server.stdin.flush()
        codes = json.loads(self._server.stdout.readline())
        return Outcome(codes, Path(f"{config['run_dir']}.log").read_text())


def main() -> None:
    """The server. It imports all that the ranks would, what torch and DeepSpeed import when they start included."""
    import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
    import torch._dynamo

    import shapediff.engine.trainer  # noqa: F401

    torch.set_num_threads(1)
    for line in sys.stdin:
        job = json.loads(line)
        print(json.dumps(_run(job)), flush=True)


def _run(job: dict[str, Any]) -> list[int]:
    """Exit statuses. Once a rank has failed the others are killed, as a launcher would."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    for rank in range(job["ranks"]):  # here, since a rank may be killed before it could
        _log(rank, job).parent.mkdir(parents=True, exist_ok=True)
        _log(rank, job).write_text("")
    running = {_fork(rank, port, job): rank for rank in range(job["ranks"])}
    codes: dict[int, int] = {}
    kill_at = time.monotonic() + min(job["faults"].get("kill_after", TIMEOUT), TIMEOUT)
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            codes[running.pop(pid)] = code = os.waitstatus_to_exitcode(status)
            if code not in (0, STOPPED):
                kill_at = time.monotonic() + 0.2
        elif time.monotonic() > kill_at:
            for pid in running:
                os.kill(pid, signal.SIGKILL)
            kill_at = time.monotonic() + TIMEOUT
        else:
            time.sleep(0.002)
    return [codes[rank] for rank in range(job["ranks"])]


def _log(rank: int, job: dict[str, Any]) -> Path:
    return Path(f"{job['config']['run_dir']}{f'.{rank}' if rank else ''}.log")


def _fork(rank: int, port: int, job: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job["ranks"], "LOCAL_WORLD_SIZE": job["ranks"]}
        os.environ.update({key: str(value) for key, value in place.items()})
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        descriptor = os.open(_log(rank, job), os.O_WRONLY)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        code = _train(rank, job)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _train(rank: int, job: dict[str, Any]) -> int:
    from shapediff.engine.config import TrainConfig
    from shapediff.engine.trainer import train
    from shapediff.errors import ShapediffError

    logging.basicConfig(level=logging.INFO if rank == 0 else logging.ERROR, format="%(message)s", force=True)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    _apply_faults(rank, job["faults"])
    try:
        return train(TrainConfig.from_dict(job["config"]))
    except ShapediffError as error:
        logging.error("error: %s", error)
        return 1


def _apply_faults(rank: int, faults: dict[str, Any]) -> None:
    """What may be wrong with a run.

    eps: Adam's, in place of 1e-8.
    says_what_it_compiles: a line in the log for each graph, which runs as it is: to make C++ of it would take a minute.
    first_scale: that of the loss under fp16.
    die_after_step: rank 0 kills itself after that step.
    die_while_writing: [rank, step, what], which kills itself in the middle of its "tensors" of that step, or (rank 0) of the
        "manifest".
    die_within: [rank, seconds], which kills itself so long after its first step, whatever it is doing then.
    file_limit: [rank, step, bytes], the largest file that the rank may write from that step on.
    kill_after: all ranks are killed after so many seconds (see `_run`).
    """
    from torch import nn

    from shapediff.engine import loss_scaling, state_files
    from shapediff.engine.optim import OptimizerConfig
    from shapediff.engine.trainer import Trainer

    build, advance, write = OptimizerConfig.build, Trainer._advance, state_files._write
    done, timers = 0, []

    def build_with_eps(self: OptimizerConfig, network: Any) -> Any:
        optimizer = build(self, network)
        for group in optimizer.param_groups:
            group["eps"] = faults.get("eps", group["eps"])
        return optimizer

    def advance_and_fail(self: Trainer, seconds: float, taken: bool) -> None:
        nonlocal done
        advance(self, seconds, taken)
        done = self.progress.step
        limited, step, size = faults.get("file_limit", [-1, -1, 0])
        if rank == limited and done == step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        dying, delay = faults.get("die_within", [-1, 0])
        if rank == dying and not timers:
            timers.append(threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)))
            timers[0].start()
        if rank == 0 and done == faults.get("die_after_step"):
            os.kill(os.getpid(), signal.SIGKILL)

    def write_and_die(path: Path, *parts: Any) -> Any:
        file = {"tensors": state_files.rank_file(rank), "manifest": state_files.MANIFEST_FILE}
        dying, step, what = faults.get("die_while_writing", [-1, -1, "tensors"])
        facts = write(path, *parts)
        if (rank, done, path.name) == (dying, step, file[what]):
            os.truncate(path, facts.size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        return facts

    if faults.get("says_what_it_compiles"):
        nn.Module.compile = partialmethod(nn.Module.compile, backend=_compile_and_say_so)  # type: ignore[assignment, method-assign]
    loss_scaling.FIRST_SCALE = faults.get("first_scale", loss_scaling.FIRST_SCALE)
    OptimizerConfig.build, Trainer._advance = build_with_eps, advance_and_fail  # type: ignore[method-assign]
    state_files._write = write_and_die


def _compile_and_say_so(graph: Any, inputs: Any) -> Any:
    from torch._dynamo.backends.debugging import aot_eager

    logging.info("a graph of %d operations", len(graph.graph.nodes))
    return aot_eager(graph, inputs)


if __name__ == "__main__":
    main()
