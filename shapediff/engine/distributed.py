"""Processes and DeepSpeed: what differs between one process and many is here."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, cast

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor
from torch.utils.cpp_extension import _get_build_directory

from shapediff.errors import ConfigError
from shapediff.files import exclusive
from shapediff.hardware import fast_bf16, keep_freed_memory

PATIENCE = timedelta(days=1)
"""How long ranks wait for each other: a sheet may take rank 0 hours, and one that is lost is noticed otherwise."""
BUCKET_NUMBERS = 50_000_000
"""Gradients that are exchanged at once; DeepSpeed's own choice, ten times that, allocates 4 GB for them whatever the model."""

ZeroStage = Literal["auto", 0, 1, 2, 3]
TrainPrecision = Literal["auto", "bf16", "fp16", "float32"]
_NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
MESSAGE_BYTES = 1024


@dataclass(frozen=True)
class DeepSpeedConfig:
    """How DeepSpeed shares the work.

    `zero_stage`: 0 every rank holds everything; 1 shares the optimizer state, 2 the gradients too, 3 the weights too; "auto" is
    the first of 1 to 3 that should fit the GPUs found (see Plan.stage), and 1 on a CPU.
    `precision`: "bf16" and "fp16" run convolutions and matrix products in 16 bits over float32 weights (autocast), fp16 with
    a loss scale that finds itself and the steps that overflow left out; "auto" is bf16 where the hardware is faster at it,
    else float32. `offload_optimizer` keeps the optimizer's weights and moments in CPU memory and steps there (stages 1 to
    3); `offload_parameters` the weights too, which go to the GPU layer by layer (stage 3).
    """

    zero_stage: ZeroStage = "auto"
    precision: TrainPrecision = "auto"
    offload_optimizer: bool = False
    offload_parameters: bool = False

    def __post_init__(self) -> None:
        if self.zero_stage not in ("auto", 0, 1, 2, 3):
            raise ValueError(f"zero_stage={self.zero_stage} must be auto, 0, 1, 2 or 3")
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("offload_optimizer needs zero_stage 1, 2 or 3")
        if self.offload_parameters and self.zero_stage != 3:
            raise ValueError(f"offload_parameters needs zero_stage=3, not {self.zero_stage}")
        if self.precision == "fp16" and self.zero_stage == 0:
            raise ValueError("precision=fp16 needs zero_stage 1, 2 or 3; on one GPU stage 1 costs what stage 0 does")

    def with_stage(self, stage: int) -> DeepSpeedConfig:
        """These settings under that ZeRO stage. Raises ValueError where they do not fit it."""
        return replace(self, zero_stage=cast(ZeroStage, stage))

    def autocast_dtype(self, device: torch.device) -> torch.dtype | None:
        """What convolutions and matrix products run in on `device`; None: float32, as all the rest."""
        if self.precision == "fp16":
            return torch.float16
        return torch.bfloat16 if self.precision == "bf16" or (self.precision == "auto" and fast_bf16(device)) else None

    def to_deepspeed(
        self, *, device: torch.device, micro_batch_size: int, accumulation_steps: int, grad_clip: float
    ) -> dict[str, Any]:
        """DeepSpeed's own configuration, once the stage is settled."""
        assert self.zero_stage != "auto"
        zero: dict[str, Any] = {"stage": self.zero_stage}
        if device.type == "cpu" and self.zero_stage in (1, 2) and not self.offload_optimizer:
            # The buffer spares a GPU's allocator; a CPU copies every gradient once more for it (benchmarks/distributed.py).
            zero["contiguous_gradients"] = False
        if self.offload_optimizer:
            zero["offload_optimizer"] = {"device": "cpu"}
        zero["reduce_bucket_size"] = BUCKET_NUMBERS
        if self.offload_parameters:
            zero["offload_param"] = {"device": "cpu"}
        dtype = self.autocast_dtype(device)
        return {
            "train_micro_batch_size_per_gpu": micro_batch_size,
            "gradient_accumulation_steps": accumulation_steps,
            "gradient_clipping": grad_clip,
            "torch_autocast": {
                "enabled": dtype is not None,
                "dtype": _NAMES[dtype or torch.bfloat16],
                # Those of modules that are named here would be summed in 16 bits.
                "lower_precision_safe_modules": [],
            },
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            # Our own loop prints and logs; DeepSpeed's lines would come beside it every ten steps.
            "steps_per_print": 2**31,
            # It waits for the device at every step, for a line that is not printed.
            "timers": {"throughput": {"enabled": False}},
        }


def start() -> torch.device:
    """Join the process group that the launcher set up, or make one of a single process; returns this rank's device.

    Raises ConfigError for a launcher that promises restarts which could not work.
    """
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=_free_port())
    # Ranks on one CPU share its cores: more threads than cores slow every one of them manyfold.
    if get_accelerator().device_name() == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        # torchrun, DeepSpeed's launcher, neither.
        names = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "WORLD_SIZE")
        local = int(next(os.environ[name] for name in names if name in os.environ))
        torch.set_num_threads(max(1, _num_cores() // local))
    _build_operators()
    device = torch.device("cpu")
    if get_accelerator().device_name() != "cpu":
        device = torch.device(get_accelerator().device_name(), int(os.environ.get("LOCAL_RANK", "0")))
        get_accelerator().set_device(device.index)
    else:
        keep_freed_memory()
    _join(device)
    _unlink_shared_memory()
    return device


def _join(device: torch.device) -> None:
    """Raises ConfigError where restarts could not work."""
    backend = get_accelerator().communication_backend_name()
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # torchrun then keeps one store for all its restarts, where the ranks of a second start find those of the first.
        if int(os.environ["GROUP_WORLD_SIZE"]) > 1 and int(os.environ["TORCHELASTIC_MAX_RESTARTS"]) > 0:
            raise ConfigError(
                "torchrun --max-restarts on several machines needs --rdzv-backend c10d and, in the environment, "
                "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1: without them a restart finds the addresses of the ranks before it"
            )
        store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
        prefix = f"restart {os.environ['TORCHELASTIC_RESTART_COUNT']}"
        dist.init_process_group(
            backend,
            store=dist.PrefixStore(prefix, store),
            world_size=int(os.environ["WORLD_SIZE"]),
            rank=int(os.environ["RANK"]),
            timeout=PATIENCE,
            device_id=None if device.type == "cpu" else device,
        )
    deepspeed.init_distributed(dist_backend=backend, timeout=PATIENCE, verbose=False)


def rank() -> int:
    """This process's number, 0 before `start`."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is rank 0, the one that writes and reports."""
    return rank() == 0


def barrier() -> None:
    """Wait for every rank."""
    if world_size() > 1:
        dist.barrier()


def device() -> torch.device:
    """Where tensors must be for the ranks to exchange them: this rank's GPU, or the CPU."""
    return torch.device(get_accelerator().current_device_name())


def gather_text(text: str) -> list[str]:
    """The `text` of every rank, by rank; of each, as much as fits in MESSAGE_BYTES."""
    raw = text.encode()[:MESSAGE_BYTES].ljust(MESSAGE_BYTES, b"\0")
    rows = gathered(torch.tensor(list(raw), dtype=torch.uint8, device=device()))
    return [bytes(row).rstrip(b"\0").decode(errors="ignore") for row in rows.tolist()]


def mean_over_ranks(value: Tensor) -> Tensor:
    """The mean of `value` over the ranks, on every rank."""
    return sum_over_ranks(value) / world_size()


def sum_over_ranks(value: Tensor) -> Tensor:
    """The sum of `value` over the ranks, on every rank; `value` itself takes it."""
    if world_size() > 1:
        dist.all_reduce(value)
    return value


def gathered(value: Tensor) -> Tensor:
    """The values of all ranks, of one shape, stacked in their order, on every rank."""
    values = [torch.empty_like(value) for _ in range(world_size())]
    if world_size() > 1:
        dist.all_gather(values, value.contiguous())
    else:
        values = [value]
    return torch.stack(values)


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _build_operators() -> None:
    """Compile what DeepSpeed needs on a CPU, one process at a time.

    PyTorch marks a build in progress by a file, and a build that was killed leaves it: every later one would wait for it
    forever. While this process alone may build, such a file is a remnant.
    """
    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is None or not deepspeed.ops.__compatible_ops__.get(builder.NAME, False):
        return
    folder = Path(_get_build_directory(builder.NAME, verbose=False))
    with exclusive(folder.with_name(f"{folder.name}.building"), waits=True):
        (folder / "lock").unlink(missing_ok=True)
        builder.load(verbose=False)


def _unlink_shared_memory() -> None:
    """Take the names off the memory by which DeepSpeed's ranks on a CPU exchange numbers, so that it goes when they end.

    DeepSpeed never does: every run, killed or not, would leave 69 MB a rank in memory until the machine restarts.
    """
    barrier()  # by now every rank has opened it
    prefix = f"deepspeed_allreduce_buffer_{os.getuid()}_{os.environ['MASTER_ADDR']}_{os.environ['MASTER_PORT']}"
    Path("/dev/shm", f"{prefix}_{rank()}").unlink(missing_ok=True)


def _free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])
