"""Loss scaling, which float16 needs: small gradients would vanish, so that the loss is multiplied by as much as goes.

The scale halves at each overflow, whose step is left out, and doubles after GROWTH_STEPS steps without one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

FIRST_SCALE, GROWTH_STEPS = 2.0**16, 1000
_STATE = ("cur_scale", "cur_iter", "last_overflow_iter")


def scale_losses(engine: Any) -> None:
    """Have a DeepSpeed engine of ZeRO stage 1, 2 or 3 scale its losses.

    Under autocast DeepSpeed 0.19 would take torch's GradScaler, one a rank: that bounds the norm of gradients that are still
    scaled, and hears of no overflow, so that one overflow ends the training. The scaler of DeepSpeed's own fp16 mode, put in
    its place, is told by all ranks alike.
    """
    engine.optimizer.torch_autocast_gradscaler = None
    engine.optimizer.loss_scaler = DynamicLossScaler(
        init_scale=FIRST_SCALE,
        scale_window=GROWTH_STEPS,
        min_scale=1.0,
        delayed_shift=1,
        consecutive_hysteresis=False,
        raise_error_at_min_scale=False,
    )


def scale_state(engine: Any) -> dict[str, float] | None:
    """What the scaler must remember, None where losses are not scaled."""
    scaler = _scaler(engine)
    return {key: getattr(scaler, key) for key in _STATE} if scaler else None


def load_scale_state(engine: Any, state: Mapping[str, float] | None) -> None:
    """Take up what `scale_state` gave; a run that had no scaler leaves a new one at its start."""
    scaler = _scaler(engine)
    if scaler and state:
        for key in _STATE:
            setattr(scaler, key, type(getattr(scaler, key))(state[key]))


def _scaler(engine: Any) -> DynamicLossScaler | None:
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    return scaler if isinstance(scaler, DynamicLossScaler) else None
