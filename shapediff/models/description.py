"""What a denoiser costs, from its config alone: it runs on fake tensors, which hold shapes and no numbers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from shapediff.models.dit3d import DiT3DConfig
from shapediff.models.layers import pretended_gpu
from shapediff.models.octree_transformer import OctreeTransformerConfig
from shapediff.models.unet3d import UNet3DConfig
from shapediff.models.vae3d import VAE3DConfig
from shapediff.models.voxel_gan import VoxelGeneratorConfig


@dataclass(frozen=True)
class Description:
    """The costs of a denoiser at one resolution.

    `forward_flops` of one sample counts matrix products, convolutions and attention, 2 a multiply-add; backward takes twice
    that, and recomputed activations once more. `tokens` are the patches of a grid, or the typical length of a sequence.
    `activation_bytes` is what each sample keeps for backward, attention being fused, and `cast_weight_bytes` the weights in
    16 bits that autocast keeps beside them.
    """

    parameters: int
    forward_flops: int
    tokens: int
    activation_bytes: int
    cast_weight_bytes: int


def describe(
    config: UNet3DConfig | DiT3DConfig | OctreeTransformerConfig | VAE3DConfig | VoxelGeneratorConfig,
    resolution: int,
    *,
    num_classes: int = 1,
    autocast: bool = False,
    on_gpu: bool = True,
) -> Description:
    """The costs of `config` on grids of `resolution` voxels a side. Raises ValueError where they do not fit each other.

    `autocast` runs matrix products in 16 bits, and `on_gpu` normalisations in 32 all the same, as autocast does there.
    """
    with torch.device("meta"):
        network = replace(config, recompute_activations=False).build(resolution=resolution, num_classes=num_classes)
    recompute = config.recompute_activations
    return describe_network(network, resolution, recompute=recompute, autocast=autocast, on_gpu=on_gpu)


def describe_network(
    network: nn.Module, resolution: int, *, recompute: bool = False, autocast: bool = False, on_gpu: bool = True
) -> Description:
    """As `describe`, of a denoiser that is there (on the meta device, say) and does not recompute; `recompute`: as if it did."""
    # A batch of one may share what more samples have each.
    with FlopCounterMode(display=False) as flops:
        two = _kept(network, resolution, 2, recompute, autocast, on_gpu)
    three = _kept(network, resolution, 3, recompute, autocast, on_gpu)
    return Description(
        parameters=sum(p.numel() for p in network.parameters()),
        forward_flops=flops.get_total_flops() // 2,
        tokens=network.config.num_tokens(resolution),  # type: ignore[union-attr, operator]
        activation_bytes=three - two,
        cast_weight_bytes=max(0, 3 * two - 2 * three),
    )


def _kept(network: nn.Module, resolution: int, batch_size: int, recompute: bool, autocast: bool, on_gpu: bool) -> int:
    """Bytes that autograd keeps of a forward pass, the network's own tensors aside."""
    as_gpu = _NormsIn32Bits() if autocast and on_gpu else nullcontext()
    with FakeTensorMode():
        own = {
            name: torch.empty(tensor.shape, dtype=tensor.dtype, requires_grad=tensor.requires_grad)
            for name, tensor in [*network.named_parameters(), *network.named_buffers()]
        }
        inputs = network.example_inputs(batch_size, resolution)  # type: ignore[operator]
        kept = _Kept(network, own.values())
        keeping = torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda tensor: tensor)
        casting = torch.autocast("cpu", torch.bfloat16, enabled=autocast)
        with kept, keeping, casting, _FusedAttention(), as_gpu, pretended_gpu() if on_gpu else nullcontext():
            torch.func.functional_call(network, own, inputs)
    return kept.if_recomputed() if recompute else kept.bytes


class _FusedAttention(TorchFunctionMode):
    """Attention as a GPU runs it; fake tensors would take the unfused way, which keeps every score for backward."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            q, k, v = args
            causal = (kwargs or {}).get("is_causal", False)
            return torch.ops.aten._scaled_dot_product_flash_attention(
                q.to(v.dtype), k.to(v.dtype), v, is_causal=causal
            )[0]
        return func(*args, **(kwargs or {}))


class _NormsIn32Bits(TorchFunctionMode):
    """Normalisation under the autocast of GPUs, whose list of what needs float32 is longer than that of CPUs."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (F.group_norm, F.layer_norm, F.rms_norm):
            args = args[0].float(), *args[1:]
        return func(*args, **(kwargs or {}))


class _Kept:
    """Counts the bytes that autograd keeps while a network runs, once each however many views of them there are."""

    def __init__(self, network: nn.Module, own: Any) -> None:
        self.bytes = 0
        # Storages stay alive here: the address of one that is gone may come again.
        self._known = {storage._cdata: storage for storage in (tensor.untyped_storage() for tensor in own)}
        self._inputs = 0
        self._within: list[int] = []
        self._hooks = [
            hook
            for block in network.blocks  # type: ignore[union-attr]
            for hook in (block.register_forward_pre_hook(self._enter), block.register_forward_hook(self._leave))
        ]

    def pack(self, tensor: Tensor) -> Tensor:
        """For saved_tensors_hooks."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known:
            self._known[storage._cdata] = storage
            self.bytes += storage.nbytes()
        return tensor

    def if_recomputed(self) -> int:
        """What is kept where blocks keep their inputs alone, but for the largest of them, as it is while it runs again."""
        return self.bytes - sum(self._within) + self._inputs + max(self._within)

    def _enter(self, block: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._inputs += args[0].nbytes
        self._within.append(-self.bytes)

    def _leave(self, block: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        self._within[-1] += self.bytes

    def __enter__(self) -> _Kept:
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
