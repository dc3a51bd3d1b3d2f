"""What a denoiser costs, from its config alone: it is built and run on the meta device, which holds shapes and no numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from shapediff.models.dit3d import DiT3DConfig
from shapediff.models.unet3d import UNet3DConfig


@dataclass(frozen=True)
class Description:
    """The costs of a denoiser at one resolution.

    `forward_flops` of one sample counts matrix products, convolutions and attention, 2 a multiply-add; backward takes twice
    that, and recomputed activations once more. `tokens` are the patches of a grid. `activations` is how many numbers one sample
    keeps for backward on a GPU, attention being fused: 4 bytes each in float32, a little over 2 under bfloat16 autocast.
    """

    parameters: int
    forward_flops: int
    tokens: int
    activations: int


def describe(config: UNet3DConfig | DiT3DConfig, resolution: int, *, num_classes: int = 1) -> Description:
    """The costs of `config` on grids of `resolution` voxels a side. Raises ValueError where they do not fit each other."""
    with torch.device("meta"):
        network = replace(config, recompute_activations=False).build(resolution=resolution, num_classes=num_classes)
        inputs = torch.empty(1, resolution**3), torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long)
    network.to("meta")  # the tables too, which are made of NumPy arrays
    kept = _Kept(network)
    keeping = torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda tensor: tensor)
    with FlopCounterMode(display=False) as flops, _FusedAttention(), keeping:
        network(*inputs)
    return Description(
        parameters=sum(p.numel() for p in network.parameters()),
        forward_flops=flops.get_total_flops(),
        tokens=(resolution // config.patch_size) ** 3,
        activations=kept.if_recomputed() if config.recompute_activations else kept.numbers,
    )


class _FusedAttention(TorchFunctionMode):
    """Attention as a GPU runs it; the meta device would take the unfused way, which keeps every score for backward."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            return torch.ops.aten._scaled_dot_product_flash_attention(*args)[0]
        return func(*args, **(kwargs or {}))


class _Kept:
    """Counts the numbers that autograd keeps while a network runs, once each however many views of them there are."""

    def __init__(self, network: nn.Module) -> None:
        self.numbers = 0
        # Storages stay alive here: the address of one that is gone may come again.
        weights = [*network.parameters(), *network.buffers()]
        self._known = {storage._cdata: storage for storage in (w.untyped_storage() for w in weights)}
        self._inputs = 0
        self._within: list[int] = []
        for block in network.blocks:  # type: ignore[union-attr]
            block.register_forward_pre_hook(self._enter)
            block.register_forward_hook(self._leave)

    def pack(self, tensor: Tensor) -> Tensor:
        """For saved_tensors_hooks."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known:
            self._known[storage._cdata] = storage
            self.numbers += storage.nbytes() // tensor.itemsize
        return tensor

    def if_recomputed(self) -> int:
        """What is kept where blocks keep their inputs alone, but for the largest of them, as it is while it runs again."""
        return self.numbers - sum(self._within) + self._inputs + max(self._within)

    def _enter(self, block: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._inputs += args[0].numel()
        self._within.append(-self.numbers)

    def _leave(self, block: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        self._within[-1] += self.numbers
