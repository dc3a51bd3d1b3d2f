"""A small denoiser of each kind, for grids of 16^3 and smaller."""

from __future__ import annotations

from shapediff.models import DiT3DConfig, ModelConfig, UNet3DConfig

TINY: dict[str, ModelConfig] = {
    "unet3d": UNet3DConfig(width=8, width_multipliers=(1, 2), num_res_blocks=1, attention_levels=(1,)),
    "unet3d_resample_in_blocks": UNet3DConfig(
        width=8, width_multipliers=(1, 2), num_res_blocks=2, attention_levels=(0,), resample_in_blocks=True
    ),
    "dit3d": DiT3DConfig(hidden_size=24, depth=2, num_heads=2, patch_size=2),
    "dit3d_windows": DiT3DConfig(
        hidden_size=24,
        depth=2,
        num_heads=2,
        patch_size=2,
        positions="rope",
        window_size=4,
        global_every=2,
        bottleneck=4,
    ),
}
