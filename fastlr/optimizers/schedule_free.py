"""Schedule-free SGD and AdamW, which average instead of letting the rate fall."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..checks import NON_NEGATIVE, RATE
from ..hyperparameters import number, pair
from ..kernels import rules
from ..kernels.staging import Rule
from ..optimizer import Optimizer
from ..options import StepOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["ScheduleFreeAdamW", "ScheduleFreeSGD"]


class ScheduleFreeSGD(Optimizer):
    """Schedule-free SGD: the average of the iterates takes the place of a schedule that ends.

    z = z - lr * (g + weight_decay * p); x = (1 - c) * x + c * z with c = lr**2 over the sum of all lr**2;
    p = (1 - beta) * z + beta * x.

    The parameters are y, where gradients are taken; evaluate, save and use `opt.averaged` (x), a view that is there at
    any time. A warmup belongs into lr: `Constant(1.0).warmup(1000)`. The decay acts at y, inside the step of z. There
    is no eps. States: `averaged` (x), `z`, which begin as copies of the parameters; of a group weights.

    Args:
        params: what to update in place; see `fastlr.Optimizer`.
        lr: step size per update, >= 0. Default 1.0.
        beta: how far gradients are taken towards the average, in [0, 1). Default 0.9.
        options: weight_decay (default 0) and everything else that `fastlr.Optimizer` takes.

    Raises:
        TypeError: if an argument is of the wrong kind.
        ValueError: if one is out of range.

    Source: Defazio et al. 2024, "The Road Less Scheduled", arXiv:2405.15682, eqs. 3-5, weighted by lr**2.

    Example:
        >>> import numpy as np, fastlr
        >>> w = np.array([1.0, 2.0])
        >>> opt = fastlr.ScheduleFreeSGD(w, lr=0.5)
        >>> info = opt.step(np.array([1.0, -1.0]))
        >>> opt.averaged
        array([0.5, 2.5])
    """

    _rule = Rule(rules.schedule_free_sgd)
    _states = {"x": "averaged"}
    beta = number(RATE)

    def __init__(self, params: Any, *, lr: Any = 1.0, beta: Any = 0.9, **options: Unpack[StepOptions]) -> None:
        super().__init__(params, lr=lr, beta=beta, **options)

    @property
    def averaged(self) -> Any:
        """The averaged parameters, x: what to evaluate and to keep."""
        return self.state["averaged"]


class ScheduleFreeAdamW(Optimizer):
    """Schedule-free AdamW: the average of the iterates takes the place of momentum and of a schedule that ends.

    v = beta2 * v + (1 - beta2) * g**2; rate = lr * sqrt(1 - beta2**t);
    z = z - rate * (g / (sqrt(v) + eps) + weight_decay * p); x = (1 - c) * x + c * z with c = rate**2 over the sum of
    all rate**2; p = (1 - beta1) * z + beta1 * x.

    The parameters are y, where gradients are taken; evaluate, save and use `opt.averaged` (x), a view that is there at
    any time. A warmup belongs into lr: `Constant(2.5e-3).warmup(1000)`. eps is outside the root, which is not corrected
    for bias (the rate is, and with it the decay and the weights; the authors' package corrects the root instead). The
    decay acts at y. States: `averaged` (x), `z`, which begin as copies of the parameters, `exp_avg_sq` (v); of a group
    weights.

    Args:
        params: what to update in place; see `fastlr.Optimizer`.
        lr: step size per update, >= 0. Default 2.5e-3.
        betas: how far gradients are taken towards the average, and decay of the squares, each in [0, 1). Default
            (0.9, 0.999).
        eps: added to the root, >= 0. Default 1e-8.
        options: weight_decay (default 0) and everything else that `fastlr.Optimizer` takes.

    Raises:
        TypeError: if an argument is of the wrong kind.
        ValueError: if one is out of range.

    Source: Defazio et al. 2024, "The Road Less Scheduled", arXiv:2405.15682, Algorithm 1.

    Example:
        >>> import numpy as np, fastlr
        >>> w = np.array([1.0, 2.0])
        >>> opt = fastlr.ScheduleFreeAdamW(w, lr=0.5)
        >>> info = opt.step(np.array([1.0, -1.0]))
        >>> opt.averaged.round(3)
        array([0.5, 2.5])
    """

    _rule = Rule(rules.schedule_free_adamw)
    _states = {"x": "averaged", "v": "exp_avg_sq"}
    betas = pair("beta1", "beta2", RATE)
    eps = number(NON_NEGATIVE)

    def __init__(
        self,
        params: Any,
        *,
        lr: Any = 2.5e-3,
        betas: tuple[Any, Any] = (0.9, 0.999),
        eps: Any = 1e-8,
        **options: Unpack[StepOptions],
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, **options)

    @property
    def averaged(self) -> Any:
        """The averaged parameters, x: what to evaluate and to keep."""
        return self.state["averaged"]
