"""Rates from past squares of the gradient: Adagrad, Adadelta and RMSprop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..checks import FRACTION, NON_NEGATIVE
from ..hyperparameters import fixed, flag, number
from ..kernels import rules
from ..kernels.staging import Rule
from ..optimizer import Optimizer
from ..options import StepOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Adadelta", "Adagrad", "RMSprop"]


class Adagrad(Optimizer):
    """Adagrad: each element's rate falls with the sum of its squared gradients.

    s = s + g**2; p = p - lr / (1 + (t - 1) * lr_decay) * g / (sqrt(s) + eps).

    eps is outside the root. The sum starts at initial_accumulator_value, 0 as in PyTorch (0.1 in Optax and Keras: with
    the defaults of each the first steps differ by almost their whole length). State: `sum`.

    Args:
        params: what to update in place; see `fastlr.Optimizer`.
        lr: step size per update, >= 0. Default 1e-2.
        lr_decay: time-based decay of the rate per update, >= 0. Default 0.
        initial_accumulator_value: start of the sum, >= 0. Default 0.
        eps: added to the root, >= 0. Default 1e-10.
        options: weight_decay (default 0, coupled) and everything else that `fastlr.Optimizer` takes.

    Raises:
        TypeError: if an argument is of the wrong kind.
        ValueError: if one is out of range.

    Source: Duchi, Hazan and Singer 2011, JMLR 12:2121-2159, section 1, eq. 1, with the diagonal of the matrix; eps and
    lr_decay as in PyTorch.

    Example:
        >>> import numpy as np, fastlr
        >>> w = np.array([1.0, 2.0])
        >>> info = fastlr.Adagrad(w, lr=0.5).step(np.array([4.0, -0.25]))
        >>> w.round(6)
        array([0.5, 2.5])
    """

    _rule = Rule(rules.adagrad)
    _states = {"s": "sum"}
    lr_decay = number(NON_NEGATIVE)
    initial_accumulator_value = fixed("s", NON_NEGATIVE)
    eps = number(NON_NEGATIVE)

    def __init__(
        self,
        params: Any,
        *,
        lr: Any = 1e-2,
        lr_decay: Any = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: Any = 1e-10,
        **options: Unpack[StepOptions],
    ) -> None:
        own: dict[str, Any] = {"lr_decay": lr_decay, "initial_accumulator_value": initial_accumulator_value}
        super().__init__(params, lr=lr, eps=eps, **own, **options)


class Adadelta(Optimizer):
    """Adadelta: steps in the units of the parameters, from running averages of squared gradients and squared steps.

    v = rho * v + (1 - rho) * g**2; delta = sqrt((u + eps) / (v + eps)) * g;
    u = rho * u + (1 - rho) * delta**2; p = p - lr * delta.

    eps is inside both roots of the paper, here one root of the quotient. The paper has no lr; 1 is the paper
    (PyTorch's default; Keras has 0.001). No bias correction. States: `square_avg` (v), `acc_delta` (u), from 0.

    Args:
        params: what to update in place; see `fastlr.Optimizer`.
        lr: factor on the step, >= 0. Default 1.0.
        rho: decay of both averages, in [0, 1]. Default 0.9.
        eps: added inside the roots, >= 0. Default 1e-6.
        options: weight_decay (default 0, coupled) and everything else that `fastlr.Optimizer` takes.

    Raises:
        TypeError: if an argument is of the wrong kind.
        ValueError: if one is out of range.

    Source: Zeiler 2012, arXiv:1212.5701, Algorithm 1.

    Example:
        >>> import numpy as np, fastlr
        >>> w = np.array([1.0])
        >>> info = fastlr.Adadelta(w).step(np.array([2.0]))
        >>> w.round(6)
        array([0.996838])
    """

    _rule = Rule(rules.adadelta)
    _states = {"v": "square_avg", "u": "acc_delta"}
    rho = number(FRACTION)
    eps = number(NON_NEGATIVE)

    def __init__(
        self, params: Any, *, lr: Any = 1.0, rho: Any = 0.9, eps: Any = 1e-6, **options: Unpack[StepOptions]
    ) -> None:
        super().__init__(params, lr=lr, rho=rho, eps=eps, **options)


class RMSprop(Optimizer):
    """RMSprop: the gradient over a running root mean square, centered or not, with or without momentum.

    v = alpha * v + (1 - alpha) * g**2; step = g / (sqrt(v) + eps); centered: m = alpha * m + (1 - alpha) * g and
    sqrt(v - m**2) in place of sqrt(v); with momentum b = momentum * b + step, step = b; p = p - lr * step.

    eps is outside the root (inside in Optax, Keras and TensorFlow: at the same settings ten steps differ by 27 %). No
    bias correction. The centered variance is kept from falling below 0 by rounding. States: `square_avg` (v),
    `grad_avg` (m, only if centered), `momentum_buffer` (b, only with momentum), from 0.

    Args:
        params: what to update in place; see `fastlr.Optimizer`.
        lr: step size per update, >= 0. Default 1e-2.
        alpha: decay of the averages, in [0, 1]. Default 0.99.
        eps: added to the root, >= 0. Default 1e-8.
        momentum: share of the buffer that is kept, >= 0. Default 0: none.
        centered: divide by the standard deviation instead of the root mean square. Default False.
        options: weight_decay (default 0, coupled) and everything else that `fastlr.Optimizer` takes.

    Raises:
        TypeError: if an argument is of the wrong kind.
        ValueError: if one is out of range.

    Source: Tieleman and Hinton 2012, "Neural Networks for Machine Learning", Coursera, lecture 6.5, slide 29; centered:
    Graves 2013, arXiv:1308.0850, eqs. 38-45 (there eps is inside the root); lr outside the momentum as in PyTorch.

    Example:
        >>> import numpy as np, fastlr
        >>> w = np.array([1.0])
        >>> info = fastlr.RMSprop(w, lr=0.1).step(np.array([3.0]))
        >>> w.round(6)
        array([0.])
    """

    _rule = Rule(rules.rmsprop)
    _states = {"v": "square_avg", "m": "grad_avg", "b": "momentum_buffer"}
    alpha = number(FRACTION)
    eps = number(NON_NEGATIVE)
    momentum = number(NON_NEGATIVE)
    centered = flag()

    def __init__(
        self,
        params: Any,
        *,
        lr: Any = 1e-2,
        alpha: Any = 0.99,
        eps: Any = 1e-8,
        momentum: Any = 0.0,
        centered: bool = False,
        **options: Unpack[StepOptions],
    ) -> None:
        super().__init__(params, lr=lr, alpha=alpha, eps=eps, momentum=momentum, centered=centered, **options)
