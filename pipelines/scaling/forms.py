"""The one-dimensional forms of the literature, as functions of u = x / x_max.

| form | y(u) | source |
| --- | --- | --- |
| M1 | b u^-c | Hestness et al. 2017 |
| M2 | e + b u^-c | Cortes et al. 1993; Rosenfeld et al. 2020 |
| M3 | b (1/u + g)^c | Alabdulmohsin, Neyshabur, Zhai 2022 (arXiv 2209.06640), section 2 |
| zhai | c + a (u + d)^-b | Zhai et al. 2022 (arXiv 2106.04560), section 3 |
| bnsl | e + b u^-c0 prod (1 + (u/d_i)^(1/f_i))^-((c_i - c_(i-1)) f_i) | Caballero 2023 (arXiv 2210.14891) |

Parameters are bounded and scales are logarithms, so that every start leads to a curve that falls and stays
positive. M4 has an optimiser of its own: `released.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pipelines.scaling.curves import Floats

MAX_EXPONENT = 5.0
FLOOR_SHARE = 0.999
"""Of the smallest loss: no floor lies above what was reached."""


@dataclass(frozen=True, kw_only=True)
class Form:
    name: str
    parameters: tuple[str, ...]
    """Names, `log_` before those that are fitted as logarithms."""
    log_y: Callable[[Floats, Floats], Floats]
    """(parameters (p,), u (n,)) to log y (n,)."""
    bounds: Callable[[Floats, Floats], tuple[Floats, Floats]]
    """(u (n,), y (n,)) to the lowest and highest parameters, (p,) each."""
    starts: int
    """Of the search: as many as its minima need."""


def _m1(p: Floats, u: Floats) -> Floats:
    return np.asarray(p[0] - p[1] * np.log(u))


def _m2(p: Floats, u: Floats) -> Floats:
    return np.asarray(np.log(p[0] + np.exp(p[1] - p[2] * np.log(u))))


def _m3(p: Floats, u: Floats) -> Floats:
    return np.asarray(p[0] + p[1] * np.log(1 / u + np.exp(p[2])))


def _zhai(p: Floats, u: Floats) -> Floats:
    return np.asarray(np.log(p[0] + np.exp(p[1] - p[2] * np.log(u + np.exp(p[3])))))


def _bnsl(p: Floats, u: Floats) -> Floats:
    """e, log b, then the exponent of each of n + 1 segments, n breaks log d_i and n sharpnesses log f_i."""
    breaks = (len(p) - 3) // 3
    slopes, places, widths = p[2 : 3 + breaks], p[3 + breaks : 3 + 2 * breaks], np.exp(p[3 + 2 * breaks :])
    log_u = np.log(u)
    log_power = p[1] - slopes[0] * log_u
    for change, place, width in zip(np.diff(slopes), places, widths, strict=True):
        log_power = log_power - change * width * np.logaddexp(0.0, (log_u - place) / width)
    return np.asarray(np.log(p[0] + np.exp(log_power)))


def _log_range(y: Floats) -> tuple[float, float]:
    """Of a factor in front: generous about the losses."""
    return float(np.log(y.min()) - 12), float(np.log(y.max()) + 6)


def _bounds_m1(u: Floats, y: Floats) -> tuple[Floats, Floats]:
    low, high = _log_range(y)
    return np.array([low, 0.0]), np.array([high, MAX_EXPONENT])


def _bounds_m2(u: Floats, y: Floats) -> tuple[Floats, Floats]:
    low, high = _log_range(y)
    return np.array([0.0, low, 0.0]), np.array([FLOOR_SHARE * y.min(), high, MAX_EXPONENT])


def _bounds_m3(u: Floats, y: Floats) -> tuple[Floats, Floats]:
    low, high = _log_range(y)
    return np.array([low - 12, 0.0, -14.0]), np.array([high, MAX_EXPONENT, 7.0])


def _bounds_zhai(u: Floats, y: Floats) -> tuple[Floats, Floats]:
    low, high = _log_range(y)
    lowest, highest = [0.0, low, 0.0, -14.0], [FLOOR_SHARE * y.min(), high, MAX_EXPONENT, 3.0]
    return np.array(lowest), np.array(highest)


def _bounds_bnsl(breaks: int) -> Callable[[Floats, Floats], tuple[Floats, Floats]]:
    def bounds(u: Floats, y: Floats) -> tuple[Floats, Floats]:
        low, high = _log_range(y)
        first, last = float(np.log(u.min())), float(np.log(u.max()))
        lowest = [0.0, low, *[0.0] * (breaks + 1), *[first] * breaks, *[-4.0] * breaks]
        highest = [FLOOR_SHARE * y.min(), high, *[3.0] * (breaks + 1), *[last + 1] * breaks, *[2.0] * breaks]
        return np.array(lowest), np.array(highest)

    return bounds


def bnsl(breaks: int) -> Form:
    """A smoothly broken power law with 1 or more breaks."""
    numbers = range(1, breaks + 1)
    return Form(
        name=f"bnsl{breaks}",
        parameters=(
            "e",
            "log_b",
            *(f"c{number}" for number in range(breaks + 1)),
            *(f"log_d{number}" for number in numbers),
            *(f"log_f{number}" for number in numbers),
        ),
        log_y=_bnsl,
        bounds=_bounds_bnsl(breaks),
        starts=24 * breaks,
    )


FORMS = {
    form.name: form
    for form in (
        Form(name="m1", parameters=("log_b", "c"), log_y=_m1, bounds=_bounds_m1, starts=1),
        Form(name="m2", parameters=("e", "log_b", "c"), log_y=_m2, bounds=_bounds_m2, starts=6),
        Form(name="m3", parameters=("log_b", "c", "log_g"), log_y=_m3, bounds=_bounds_m3, starts=8),
        Form(
            name="zhai", parameters=("c", "log_a", "b", "log_d"), log_y=_zhai, bounds=_bounds_zhai, starts=12
        ),
        bnsl(1),
        bnsl(2),
    )
}
