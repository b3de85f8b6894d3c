"""Stochastic gradient descent, plain, with momentum, and with a trust ratio for each layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..checks import NON_NEGATIVE
from ..groups import everywhere, somewhere
from ..hyperparameters import flag, number
from ..kernels import rules
from ..kernels.staging import Rule
from ..optimizer import Optimizer
from ..options import StepOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["LARS", "SGD"]


class SGD(Optimizer):
    """Stochastic gradient descent, plain, with momentum (Polyak) or with Nesterov momentum.

    b = g at the first update, then momentum * b + (1 - dampening) * g; p = p - lr * b; with Nesterov
    p = p - lr * (g + momentum * b).

    The learning rate is outside the momentum buffer (as in PyTorch; Keras multiplies it in), so a new rate acts on
    the whole buffer at once. The first update is not dampened. No buffer exists if momentum is 0 everywhere.
    State: `momentum_buffer`, from 0.

    Args:
        params: what to update in place; see `fastlr.Optimizer`.
        lr: step size per update, >= 0. Default 1e-3.
        momentum: share of the buffer that is kept, >= 0. Default 0: none.
        dampening: the gradient enters the buffer times 1 - dampening. Default 0.
        nesterov: look ahead; needs momentum and no dampening. Default False.
        options: weight_decay (default 0, coupled) and everything else that `fastlr.Optimizer` takes.

    Raises:
        TypeError: if an argument is of the wrong kind.
        ValueError: if one is out of range, or Nesterov is asked for without momentum or with dampening.

    Source: Polyak 1964, doi:10.1016/0041-5553(64)90137-5, eq. 9; Sutskever et al. 2013, "On the importance of
    initialization and momentum in deep learning", ICML, eqs. 3-4, in PyTorch's form, which takes the gradient at the
    point already looked ahead to.

    Example:
        >>> import numpy as np, fastlr
        >>> w = np.array([1.0, 2.0])
        >>> opt = fastlr.SGD(w, lr=0.5, momentum=0.9)
        >>> info = opt.step(np.array([1.0, -1.0]))
        >>> w
        array([0.5, 2.5])
    """

    _rule = Rule(rules.sgd)
    _states = {"b": "momentum_buffer"}
    _related = ("momentum", "dampening", "nesterov")
    momentum = number(NON_NEGATIVE)
    dampening = number()
    nesterov = flag()

    def __init__(
        self,
        params: Any,
        *,
        lr: Any = 1e-3,
        momentum: Any = 0.0,
        dampening: Any = 0.0,
        nesterov: bool = False,
        **options: Unpack[StepOptions],
    ) -> None:
        super().__init__(params, lr=lr, momentum=momentum, dampening=dampening, nesterov=nesterov, **options)

    @classmethod
    def _check_settings(cls, uniforms: Sequence[Mapping[str, Any]]) -> None:
        for values in uniforms:
            if values["nesterov"] and not (everywhere(values["momentum"]) and not somewhere(values["dampening"])):
                raise ValueError("nesterov=True needs a momentum above 0 and a dampening of 0.")


class LARS(Optimizer):
    """LARS: momentum whose rate in each leaf is in proportion to norm(p) over that of the gradient.

    trust = trust_coefficient * norm(p) / (norm(g) + weight_decay * norm(p)), 1 where a norm is 0;
    b = momentum * b + lr * trust * (g + weight_decay * p); p = p - b.

    The norms are taken over each leaf (of each model). The learning rate is inside the momentum buffer, as in the
    paper, so a new rate acts on new gradients only. There is no eps. Biases and gains are usually left out:
    `groups={"*.bias": {"weight_decay": 0.0, "layer_adaptation": False}}`. State: `momentum_buffer` (b), from 0.

    Args:
        params: what to update in place; see `fastlr.Optimizer`.
        lr: global step size, >= 0. Default 1.0.
        momentum: share of the buffer that is kept, >= 0. Default 0.9.
        trust_coefficient: >= 0. Default 1e-3, as in the paper.
        layer_adaptation: scale the rate; without it trust is 1. Default True.
        options: weight_decay (default 0, inside the step) and everything else that `fastlr.Optimizer` takes.

    Raises:
        TypeError: if an argument is of the wrong kind.
        ValueError: if one is out of range.

    Source: You, Gitman and Ginsburg 2017, "Large Batch Training of Convolutional Networks", arXiv:1708.03888,
    Algorithm 1.

    Example:
        >>> import numpy as np, fastlr
        >>> w = np.array([3.0, 4.0])
        >>> info = fastlr.LARS(w, trust_coefficient=0.1).step(np.array([0.0, 2.0]))
        >>> w
        array([3. , 3.5])
    """

    _rule = Rule(rules.lars)
    _states = {"b": "momentum_buffer"}
    momentum = number(NON_NEGATIVE)
    trust_coefficient = number(NON_NEGATIVE)
    layer_adaptation = flag()

    def __init__(
        self,
        params: Any,
        *,
        lr: Any = 1.0,
        momentum: Any = 0.9,
        trust_coefficient: Any = 1e-3,
        layer_adaptation: bool = True,
        **options: Unpack[StepOptions],
    ) -> None:
        own: dict[str, Any] = {"trust_coefficient": trust_coefficient, "layer_adaptation": layer_adaptation}
        super().__init__(params, lr=lr, momentum=momentum, **own, **options)
