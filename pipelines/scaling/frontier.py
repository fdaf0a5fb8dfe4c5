"""The frontier: the best loss that a compute budget reached, over all models and amounts of data.

Its law is Zhai et al.'s `c + a (C + d)^-b` (arXiv 2106.04560, section 3), without recency: a frontier
has few points and jumps from model to model. It bends less than learning curves do, so its structural part
is smaller.
"""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from pipelines.scaling.curves import Floats
from pipelines.scaling.fits import Fit, fit_form
from pipelines.scaling.forms import FORMS

FRONTIER = "frontier"
STRUCTURAL = 0.1
"""d, of the grid 0, .1, .2, .3: cut at C_max / 2 to C_max / 64, frontiers of three tasks (5-shot, 10-shot,
fine-tuned ImageNet, without g/14 and G/14) had their worst coverage of nominal 90 % at 87, 93, 100, 100 %."""
MAX_FRONTIER_CUT = 10.0


def is_best(compute: Floats, loss: Floats) -> NDArray[np.bool_]:
    """Which runs (n,) are better than every one that took as much compute or less."""
    order = np.lexsort((loss, compute))
    best = np.minimum.accumulate(loss[order])
    found = np.zeros(len(loss), dtype=bool)
    found[order] = np.concatenate([[True], best[1:] < best[:-1]])
    return found


def fit_frontier(compute: Floats, loss: Floats) -> Fit:
    """Of points on the frontier, (n,) each."""
    return replace(fit_form(FORMS["zhai"], compute, loss), structural=STRUCTURAL)
