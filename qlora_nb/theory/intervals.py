"""How far to trust a mean over a few seeds: Student's 95 % interval.

Runs that differ in their seed alone end with different losses. Their mean is known no better than
this spread allows: with n values of standard deviation s the true mean lies within t·s/√n of theirs
in 95 of 100 cases, where t depends on n (Student, Biometrika 6, 1908).
"""

import math
import statistics

T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Student's t for a two-sided 95 % interval with 1, 2, … 9 degrees of freedom."""


def half_width(values: list[float]) -> float:
    """Half the 95 % interval of a mean, in the values' unit; NaN for fewer than two values. With
    more than ten the t of ten is taken, which makes it up to 15 % too wide.
    """
    n = len(values)
    if n < 2:
        return math.nan
    t = T_95[min(n - 1, len(T_95)) - 1]
    return t * statistics.stdev(values) / math.sqrt(n)
