"""The one mean over categories: unweighted, and it says which categories it misses."""

from __future__ import annotations

import math
from collections.abc import Iterable


def mean_over_categories(values: Iterable[tuple[str, float]]) -> tuple[float, int, str]:
    """Mean of one metric from (category, value) pairs; NaN = undefined.

    Returns the mean over the categories in which it is defined (NaN without one), how many those are, and the text of
    the reason column: which categories are missing.
    """
    values = list(values)
    defined = [value for _, value in values if not math.isnan(value)]
    missing = [category for category, value in values if math.isnan(value)]
    reason = f"undefined in {', '.join(missing)}" if missing else ("" if values else "no sample")
    return (math.fsum(defined) / len(defined) if defined else math.nan), len(defined), reason
