"""95 % intervals of means that stay honest where there are few samples."""

import math

Z = 1.96  # normal quantile of a two-sided 95 % interval


def wilson(mean: float, n: int) -> tuple[float, float]:
    """The 95 % interval of Wilson (1927) for a share of n samples, honest where n is small or the share 0 or 1; for a
    mean of values between 0 and 1 it is too wide rather than too narrow.

    Raises:
        ValueError: no samples.
    """
    if n < 1:
        raise ValueError(f"n={n}; an interval needs at least one sample")
    centre, spread = mean + Z * Z / (2 * n), Z * math.sqrt(mean * (1 - mean) / n + Z * Z / (4 * n * n))
    return max(0.0, (centre - spread) / (1 + Z * Z / n)), min(1.0, (centre + spread) / (1 + Z * Z / n))


def half_width(total: float, square: float, n: int) -> float:
    """Half of the 95 % interval of a mean of values in [0, 1], by their sum and sum of squares over n samples: the
    distance from the mean to the farther end of the interval of Agresti and Coull (1998), which adds two zeros and two
    ones (Z²/2 of each, exactly) to the samples. Shares have about Wilson's interval, graded scores a narrower one, and
    many samples that of the normal approximation, which is nothing where two samples agree.
    """
    more, mean = n + Z * Z, total / n
    centre = (total + Z * Z / 2) / more
    spread = Z * math.sqrt(max(0.0, (square + Z * Z / 2) / more - centre**2) / more)
    return max(mean - max(0.0, centre - spread), min(1.0, centre + spread) - mean)


def normal_half_width(total: float, square: float, n: int) -> float:
    """The same of values without bounds, by the normal approximation; NaN for a single sample, which says nothing."""
    return Z * math.sqrt(max(0.0, square / n - (total / n) ** 2) / (n - 1)) if n > 1 else math.nan
