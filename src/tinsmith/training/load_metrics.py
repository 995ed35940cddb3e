"""What a result says of how evenly a request's tokens used the experts of a mixture.

With c the number of a request's assignments to an expert, and e the even share, assignments over experts:

    e_frac_with_tokens:mean     share of the experts with c > 0
    e_frac_oversubscribed:mean  share of the experts with c > e
    e_max_violation:mean, :max  max c / e - 1; 0 if all have the same (Wang et al. 2024, arXiv 2408.15664, equation 4)
    e_min_violation:mean        min c / e - 1; -1 if an expert has none

each a mean over the layers that have experts, `:max` the largest of them. Only the request's own tokens count, whatever
shares its pass.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tinsmith.route_tape import num_known
from tinsmith.types import IntArray, TrainItem


def load_metrics(loads: Sequence[IntArray]) -> dict[str, float]:
    """Of the counts of each layer; nothing where there are none."""
    if not loads or not loads[0].sum():
        return {}
    relative = [counts / counts.mean() for counts in loads]
    highest = [float(load.max()) - 1 for load in relative]
    return {
        "e_frac_with_tokens:mean": float(np.mean([(load > 0).mean() for load in relative])),
        "e_frac_oversubscribed:mean": float(np.mean([(load > 1).mean() for load in relative])),
        "e_max_violation:mean": float(np.mean(highest)),
        "e_max_violation:max": max(highest),
        "e_min_violation:mean": float(np.mean([load.min() - 1 for load in relative])),
    }


def replay_metrics(item: TrainItem) -> dict[str, float]:
    """`routes_replayed:sum`, the tokens whose experts were those that sampling had chosen, where any were."""
    num = sum(num_known(datum.routes) for datum in item.data)
    return {"routes_replayed:sum": float(num)} if num else {}
