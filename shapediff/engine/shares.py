"""Which weights each rank keeps: the one file that knows how DeepSpeed lays them out under each ZeRO stage.

Every element of every parameter is some one rank's *share*: under stages 1 to 3 of the rank whose optimizer steps it, under
stage 0, where all ranks step everything, of the rank that an even cut gives it to. The average of the weights is kept and
the state is written share by share, so that neither moves a weight between ranks, and both cost a rank 1/world.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shapediff.engine import distributed

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Share:
    """A run of elements of the flattened parameter `name`, from `start` on.

    `weight` (n,) float32 is a view: writing to it changes what the optimizer steps. It is `owner`, the tensor by which the
    optimizer knows its state, flattened, from `offset` on.
    """

    name: str
    start: int
    weight: Tensor
    owner: Tensor
    offset: int

    def part(self, first: int, last: int) -> Share:
        """Elements [first, last) of this share."""
        return Share(self.name, self.start + first, self.weight[first:last], self.owner, self.offset + first)


class Shares:
    """All that this rank has of the engines' float32 weights and of their optimizers' moments.

    `held` is what this rank's optimizers step, `mine` the part of it that is this rank's share, `shapes` every parameter by
    name, "network.parameter". All ranks' `mine` together hold every element exactly once.
    """

    def __init__(self, engines: Mapping[str, Any]) -> None:
        self.engines = engines
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.held: list[Share] = []
        self.mine: list[Share] = []
        for name, engine in engines.items():
            stage = engine.zero_optimization_stage()
            named = {f"{name}.{key}": p for key, p in engine.module.named_parameters()}
            self.shapes |= {key: tuple(getattr(p, "ds_shape", p.shape)) for key, p in named.items()}
            held = [share for key, p in named.items() for share in _HELD[stage](key, p, engine)]
            self.held += held
            self.mine += held if stage else _even_cut(held, distributed.rank(), distributed.world_size())
        counted = distributed.sum_over_ranks(torch.tensor(_numel(self.mine), device=distributed.device()))
        expected = sum(map(math.prod, self.shapes.values()))
        assert int(counted) == expected, (
            f"the ranks hold {int(counted)} weights of {expected}: DeepSpeed's layout is new"
        )

    def tensors(self, share: Share) -> dict[str, Tensor]:
        """The weight and its moments, (n,) float32 each, views of what the optimizer steps; no moments before its first step."""
        state = self._engine(share).basic_optimizer.state.get(share.owner, {})
        last = share.offset + share.weight.numel()
        return {"weight": share.weight} | {
            key: state[key].view(-1)[share.offset : last] for key in MOMENTS if key in state
        }

    def num_steps(self) -> dict[str, int]:
        """How many steps each network's optimizer has made, which Adam's correction of its bias needs."""
        return {
            name: max(
                (int(state["step"]) for state in engine.basic_optimizer.state.values() if "step" in state), default=0
            )
            for name, engine in self.engines.items()
        }

    def start_moments(self, num_steps: Mapping[str, int]) -> None:
        """Give each optimizer that has made steps moments of 0, to be filled in; it would make them itself at its first."""
        for share in {id(share.owner): share for share in self.held}.values():
            if not (count := num_steps[_network(share.name)]):
                continue
            # Where the fused AdamW keeps its count.
            steps = torch.tensor(float(count), device=share.owner.device)
            moments = {key: torch.zeros_like(share.owner, requires_grad=False) for key in MOMENTS}
            self._engine(share).basic_optimizer.state[share.owner] = {"step": steps, **moments}

    def publish(self) -> None:
        """Carry what was written to `held` over to the networks; every rank must call it."""
        for engine in self.engines.values():
            _PUBLISH[engine.zero_optimization_stage()](engine)

    def gather(self, values: Sequence[Tensor]) -> Iterator[tuple[str, Tensor]]:
        """(name, whole tensor on the CPU) of every parameter, put together from a tensor for each of `mine`.

        Every rank must ask, and gets them all.
        """
        found = {share.name: (share.start, value) for share, value in zip(self.mine, values, strict=True)}
        for name, shape in self.shapes.items():
            whole = torch.zeros(math.prod(shape), device=distributed.device())
            if name in found:
                start, value = found[name]
                whole[start : start + value.numel()] = value
            yield name, distributed.sum_over_ranks(whole).view(shape).cpu()

    def _engine(self, share: Share) -> Any:
        return self.engines[_network(share.name)]


def _network(name: str) -> str:
    return name.split(".", 1)[0]


def _numel(shares: Sequence[Share]) -> int:
    return sum(share.weight.numel() for share in shares)


def _even_cut(shares: Sequence[Share], index: int, count: int) -> list[Share]:
    """Part `index` of `count` about equal parts of all elements in a row."""
    total = _numel(shares)
    first, last = total * index // count, total * (index + 1) // count
    parts, position = [], 0
    for share in shares:
        begin, end = (min(max(at - position, 0), share.weight.numel()) for at in (first, last))
        if begin < end:
            parts.append(share.part(begin, end))
        position += share.weight.numel()
    return parts


def _whole(name: str, p: nn.Parameter, engine: Any) -> Iterator[Share]:
    """Stage 0: the optimizer steps the network's own parameters."""
    yield Share(name, 0, p.detach().view(-1), p, 0)


def _fragment(name: str, p: nn.Parameter, engine: Any) -> Iterator[Share]:
    """Stages 1 and 2: the parameters of a group in a row, padded and cut evenly; a copy of this rank's part is stepped."""
    link = p._hp_mapping  # type: ignore[attr-defined]
    if link is not None:
        owner = engine.optimizer.single_partition_of_fp32_groups[link.param_group_index]
        here, there = link.lp_fragment_address, link.hp_fragment_address
        yield Share(name, here.start, owner.detach()[there.start : there.start + there.numel], owner, there.start)


def _partition(name: str, p: nn.Parameter, engine: Any) -> Iterator[Share]:
    """Stage 3: each parameter padded and cut evenly, this rank's parts of some in a row."""
    optimizer = engine.optimizer
    group, offset, size = optimizer.grad_position[optimizer.get_param_id(p)]
    start = size * distributed.rank()
    real = min(size, p.ds_numel - start)  # type: ignore[attr-defined]
    if real > 0:
        owner = optimizer.fp32_partitioned_groups_flat[group]
        yield Share(name, start, owner.detach()[offset : offset + real], owner, offset)


def _publish_partitions(engine: Any) -> None:
    optimizer = engine.optimizer
    # Small parameters are kept whole on every rank: let go, so that they are gathered anew.
    optimizer.checkpoint_event_prologue()
    for group in range(len(optimizer.fp32_partitioned_groups_flat)):
        optimizer._reassign_or_swap_out_partitioned_parameters(group)
    optimizer.checkpoint_event_epilogue()


_HELD: dict[int, Callable[[str, nn.Parameter, Any], Iterator[Share]]] = {
    0: _whole,
    1: _fragment,
    2: _fragment,
    3: _partition,
}
_PUBLISH: dict[int, Callable[[Any], None]] = {
    0: lambda engine: None,
    1: lambda engine: engine.optimizer.update_lp_params(),
    2: lambda engine: engine.optimizer.update_lp_params(),
    3: _publish_partitions,
}
