"""How far to trust a mean over a few seeds: Student's 95 % interval.

Runs that differ in their seed alone end with different losses. Their mean is known no better than
this spread allows: with n values of standard deviation s the true mean lies within t·s/√n of theirs
in 95 of 100 cases, where t depends on n (Student, Biometrika 6, 1908).
"""

import math
import statistics

T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Student's t for a two-sided 95 % interval with 1, 2, … 9 degrees of freedom."""

Z_95 = 1.959964
"""What t comes down to with ever more of them: the normal distribution's."""


def t_95(degrees: int) -> float:
    """Student's t for a two-sided 95 % interval; beyond the table by the first terms of its series
    in 1/degrees (Abramowitz and Stegun 26.7.5), within 0.003.
    """
    if degrees <= len(T_95):
        return T_95[degrees - 1]
    first = (Z_95**3 + Z_95) / 4
    second = (5 * Z_95**5 + 16 * Z_95**3 + 3 * Z_95) / 96
    return Z_95 + first / degrees + second / degrees**2


def half_width(values: list[float]) -> float:
    """Half the 95 % interval of a mean, in the values' unit; NaN for fewer than two values."""
    n = len(values)
    if n < 2:
        return math.nan
    return t_95(n - 1) * statistics.stdev(values) / math.sqrt(n)
