"""Optimizers that find their rate: DoG and Prodigy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from ..checks import NON_NEGATIVE, POSITIVE, RATE
from ..hyperparameters import fixed, flag, number, pair
from ..kernels import rules
from ..kernels.staging import Rule
from ..optimizer import Optimizer
from ..options import StepOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["DoG", "Prodigy"]


class DoG(Optimizer):
    """DoG: SGD without a learning rate to choose: distance over gradients.

    rate = lr * distance / sqrt(sum of norm(g)**2 + eps); p = p - rate * g, where distance is the largest norm(p - x0)
    so far, x0 being where the parameters began; at the first update relative_distance * (1 + norm(p)).

    The norms are over all leaves (of each model); with layerwise=True over each leaf (the paper's L-DoG). lr is a
    factor on the rate, 1 in the paper; `info.lr` is the rate in use. The paper evaluates an average of the iterates:
    `ema=`. State: `initial_params` (x0); distance and squares, one for all parameters or layer-wise for each leaf, and
    the rate of each group. relative_distance and layerwise are the same in all groups.

    Args:
        params: what to update in place; see `fastlr.Optimizer`.
        lr: factor on the rate, >= 0. Default 1.0.
        relative_distance: the first distance, over 1 + norm(p), >= 0. Default 1e-6.
        eps: added to the sum of squares, >= 0. Default 1e-8.
        layerwise: a rate for each leaf. Default False.
        options: weight_decay (default 0, coupled) and everything else that `fastlr.Optimizer` takes.

    Raises:
        TypeError: if an argument is of the wrong kind.
        ValueError: if one is out of range.

    Source: Ivgi, Hinder and Carmon 2023, "DoG is SGD's Best Friend", arXiv:2302.12022, eqs. 1 and 2.

    Example:
        >>> import numpy as np, fastlr
        >>> w = np.array([3.0, 4.0])
        >>> info = fastlr.DoG(w).step(np.array([6.0, 8.0]))
        >>> f"{info.lr:.3g}"
        '6e-07'
    """

    _rule = Rule(rules.dog)
    _states = {"x0": "initial_params"}
    relative_distance = number(NON_NEGATIVE)
    eps = number(NON_NEGATIVE)
    layerwise = flag()

    def __init__(
        self,
        params: Any,
        *,
        lr: Any = 1.0,
        relative_distance: Any = 1e-6,
        eps: Any = 1e-8,
        layerwise: bool = False,
        **options: Unpack[StepOptions],
    ) -> None:
        own: dict[str, Any] = {"relative_distance": relative_distance, "layerwise": layerwise}
        super().__init__(params, lr=lr, eps=eps, **own, **options)


class Prodigy(Optimizer):
    """Prodigy: Adam without a learning rate to choose: it estimates the distance to the solution, d.

    With gradients times d: m = beta1 * m + (1 - beta1) * d * g; v = beta2 * v + (1 - beta2) * d**2 * g**2;
    r = beta3 * r + (1 - beta3) * d**2 * <lr * g, x0 - p>; s = beta3 * s + (1 - beta3) * lr * d**2 * g;
    p = p - lr * d * m / (sqrt(v) + d * eps); then d = max(d, r / norm1(s)), beta3 = sqrt(beta2).

    The sums <g, x0 - p> and norm1(s) run over all parameters, and d and r are one for all, also for a parameter that
    comes late. A group may have an lr of its own: lr weights its elements inside both sums, so a group whose lr is 0
    does not count. (The authors' package takes no other rates than one and 0.) betas[1] is the same in all groups.
    As in the paper there is no bias correction, and the update uses the d from before it; the authors' package adds eps
    times the new one. eps is outside the root. The decay is decoupled, p - lr * d * weight_decay * p. lr is a factor, 1
    in the paper, for a schedule; `info.lr` is lr * d. States: `initial_params` (x0), `exp_avg` (m), `exp_avg_sq` (v),
    `weighted_grad` (s), from 0; d and r, one for all; the rate of each group.

    Args:
        params: what to update in place; see `fastlr.Optimizer`.
        lr: factor on the rate, >= 0. Default 1.0.
        betas: decay of the two averages, each in [0, 1). Default (0.9, 0.999).
        eps: added to the root times d, >= 0. Default 1e-8.
        d0: the first estimate, > 0; too small a one only costs steps. Default 1e-6.
        options: weight_decay (default 0), decoupled_weight_decay (default True) and everything else that
            `fastlr.Optimizer` takes.

    Raises:
        TypeError: if an argument is of the wrong kind.
        ValueError: if one is out of range.

    Source: Mishchenko and Defazio 2024, "Prodigy: An Expeditiously Adaptive Parameter-Free Learner", arXiv:2306.06101,
    Algorithm 4.

    Example:
        >>> import numpy as np, fastlr
        >>> w = np.array([3.0, 4.0])
        >>> opt = fastlr.Prodigy(w)
        >>> for _ in range(100):
        ...     info = opt.step(2 * w)
        >>> info.lr > 1e-3
        True
    """

    _rule = Rule(rules.prodigy)
    _states = {"x0": "initial_params", "m": "exp_avg", "v": "exp_avg_sq", "s": "weighted_grad"}
    betas = pair("beta1", "beta2", RATE)
    eps = number(NON_NEGATIVE)
    d0 = fixed("d", POSITIVE)
    _defaults: ClassVar[StepOptions] = {"decoupled_weight_decay": True}

    def __init__(
        self,
        params: Any,
        *,
        lr: Any = 1.0,
        betas: tuple[Any, Any] = (0.9, 0.999),
        eps: Any = 1e-8,
        d0: float = 1e-6,
        **options: Unpack[StepOptions],
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, d0=d0, **options)
