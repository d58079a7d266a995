"""Schedules as functions of training progress p in [0, 1] (docs/design.md sections 4 and 5)."""

import math


def temperature(progress: float, initial: float, final: float, reached: float) -> float:
    """tau(p) = max(final, initial * exp(-r p)), with r such that `final` is reached at progress `reached`."""
    rate = math.log(initial / final) / reached
    return max(final, initial * math.exp(-rate * progress))


def learning_rate(progress: float, peak: float, warmup: float, begin: float = 0.0) -> float:
    """0 up to progress `begin`; of the rest linear from 0 over the first `warmup` share, then a cosine to 0."""
    progress = (progress - begin) / (1 - begin)
    if progress < warmup:
        return peak * max(0.0, progress) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - warmup) / (1 - warmup))))
