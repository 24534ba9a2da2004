"""Learning rate as a pure function of the update number, so that a resumed stage needs no scheduler state."""

from __future__ import annotations

import math

from rlsys.config.schema import OptimizerConfig


def learning_rate(config: OptimizerConfig, update: int, total_updates: int) -> float:
    """Return the learning rate of one optimizer update.

    With W = warmup_updates, u = update, p = (u - W) / (total - 1 - W) clipped to [0, 1], f = final_fraction:
    u < W:     peak * (u + 1) / (W + 1)                    above 0 from the first update on
    constant:  peak
    linear:    peak * (1 - (1 - f) p)
    cosine:    peak * (f + (1 - f) (1 + cos(pi p)) / 2)

    Update W has the peak rate, and the last update has peak * f. The rate never decays if update W is the last one or
    is not reached. Updates past the end of the stage keep the last rate.

    Args:
        config: peak rate, warmup and schedule.
        update: number of finished optimizer updates of this stage, >= 0.
        total_updates: number of optimizer updates of the whole stage, >= 1.

    Raises:
        ValueError: update < 0 or total_updates < 1.
    """
    if update < 0 or total_updates < 1:
        raise ValueError(f"expected update >= 0 and total_updates >= 1, found {update} and {total_updates}")
    warmup, final = config.warmup_updates, config.final_fraction
    if update < warmup:
        return config.learning_rate * (update + 1) / (warmup + 1)
    decay_updates = total_updates - 1 - warmup
    progress = min(1.0, (update - warmup) / decay_updates) if decay_updates > 0 else 0.0
    match config.schedule:
        case "constant":
            return config.learning_rate
        case "linear":
            return config.learning_rate * (1 - (1 - final) * progress)
        case "cosine":
            return config.learning_rate * (final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2)
