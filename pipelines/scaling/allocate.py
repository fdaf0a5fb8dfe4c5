"""What a compute budget buys: the best size and amount of data, and the loss there.

With C = f N D and `L = E + A N^-alpha + B D^-beta` the minimum is where alpha A N^-alpha = beta B D^-beta
(Hoffmann et al. 2022, equation 4): N* = G (C / f)^a, D* = (C / f)^b / G, a = beta / (alpha + beta), b = alpha
/ (alpha + beta), G = (alpha A / (beta B))^(1 / (alpha + beta)).
"""

from dataclasses import dataclass

import numpy as np

from pipelines.scaling.curves import Floats
from pipelines.scaling.joint import JointFit, JointLaw
from workers.errors import ConfigError

HORIZON = 10.0
"""Times the largest run's compute: `--backtest` cuts at a tenth of it."""


@dataclass(frozen=True, kw_only=True)
class Allocation:
    flops: float
    size: float
    size_low: float
    size_high: float
    data: float
    data_low: float
    data_high: float
    loss: float
    loss_low: float
    loss_high: float
    beyond_backtests: bool


def optimum(law: JointLaw, product: float) -> tuple[float, float]:
    """Best size and data whose product is `product` (FLOPs over FLOPs per size and data)."""
    total = law.alpha + law.beta
    g = (law.alpha * law.A / (law.beta * law.B)) ** (1 / total)
    return float(g * product ** (law.beta / total)), float(product ** (law.alpha / total) / g)


def allocate(
    fit: JointFit,
    flops: float,
    *,
    flops_factor: float,
    largest: float,
    confidence: float,
    extrapolate: bool = False,
) -> Allocation:
    """`largest`: FLOPs of the largest run that was fitted. ConfigError far beyond it, unless told to
    extrapolate.
    """
    if not flops > 0:
        raise ConfigError(f"--budget {flops:g}: expected FLOPs, such as 1e21")
    beyond = flops > HORIZON * largest
    if beyond and not extrapolate:
        raise ConfigError(
            f"--budget {flops:g} is {flops / largest:.3g} times the largest run ({largest:.3g} "
            "FLOPs); backtests reach "
            f"{HORIZON:g} times. --extrapolate says all the same what would be best"
        )
    product = flops / flops_factor
    size, data = optimum(fit.law, product)
    draws = np.array([optimum(draw, product) for draw in fit.draws if min(draw.alpha, draw.beta) > 0])
    tail = (1 - confidence) / 2
    (size_low, data_low), (size_high, data_high) = np.quantile(draws, [tail, 1 - tail], axis=0)
    loss = fit.forecast(np.array([size]), np.array([data]), confidence=confidence)
    return Allocation(
        flops=flops,
        size=size,
        size_low=float(size_low),
        size_high=float(size_high),
        data=data,
        data_low=float(data_low),
        data_high=float(data_high),
        loss=float(loss.median[0]),
        loss_low=float(loss.low[0]),
        loss_high=float(loss.high[0]),
        beyond_backtests=beyond,
    )


def isoflop(law: JointLaw, flops: float, sizes: Floats, flops_factor: float) -> Floats:
    """Loss (n,) of sizes (n,) that all train for the same FLOPs."""
    return law.predict(sizes, flops / flops_factor / sizes)
