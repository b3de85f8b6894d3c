"""Adam and what is made of it: AdamW, NAdam and LAMB."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from ..checks import NON_NEGATIVE, RATE
from ..hyperparameters import flag, number, pair
from ..kernels import rules
from ..kernels.staging import Rule
from ..optimizer import Optimizer
from ..options import StepOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["LAMB", "Adam", "AdamW", "NAdam"]


class Adam(Optimizer):
    """Adam: the bias-corrected mean of the gradients over the root of that of their squares.

    m = beta1 * m + (1 - beta1) * g; v = beta2 * v + (1 - beta2) * g**2; m_hat = m / (1 - beta1**t);
    v_hat = v / (1 - beta2**t); p = p - lr * m_hat / (sqrt(v_hat) + eps). With AMSGrad the largest v so far takes the
    place of v in v_hat.

    eps is outside the root and added after the bias correction, as in the paper's Algorithm 1 (Keras and scikit-learn
    use the paper's other form, where eps is not corrected: 22 % apart at gradients of 1e-5). Weight decay is coupled
    (L2) unless `decoupled_weight_decay=True`; `AdamW` has it decoupled. States: `exp_avg` (m), `exp_avg_sq` (v),
    `max_exp_avg_sq` (only with amsgrad; the maximum is taken before the bias correction), from 0.

    Args:
        params: what to update in place; see `fastlr.Optimizer`.
        lr: step size per update, >= 0. Default 1e-3.
        betas: decay of the two averages, each in [0, 1). Default (0.9, 0.999).
        eps: added to the root, >= 0. Default 1e-8.
        amsgrad: never let the denominator shrink. Default False.
        options: weight_decay (default 0) and everything else that `fastlr.Optimizer` takes.

    Raises:
        TypeError: if an argument is of the wrong kind.
        ValueError: if one is out of range.

    Source: Kingma and Ba 2015, arXiv:1412.6980, Algorithm 1; Reddi, Kale and Kumar 2018, arXiv:1904.09237, Algorithm 2
    (with bias correction, as in PyTorch).

    Example:
        >>> import numpy as np, fastlr
        >>> params = {"w": np.ones((2, 2)), "b": np.zeros(2)}
        >>> opt = fastlr.Adam(params, lr=0.1)
        >>> info = opt.step({"w": np.full((2, 2), 5.0), "b": np.array([-1.0, 1.0])})
        >>> params["b"].round(6)
        array([ 0.1, -0.1])
        >>> info.step, info.lr
        (1, 0.1)
    """

    _rule = Rule(rules.adam)
    _states = {"m": "exp_avg", "v": "exp_avg_sq", "v_max": "max_exp_avg_sq"}
    betas = pair("beta1", "beta2", RATE)
    eps = number(NON_NEGATIVE)
    amsgrad = flag()

    def __init__(
        self,
        params: Any,
        *,
        lr: Any = 1e-3,
        betas: tuple[Any, Any] = (0.9, 0.999),
        eps: Any = 1e-8,
        amsgrad: bool = False,
        **options: Unpack[StepOptions],
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, amsgrad=amsgrad, **options)


class AdamW(Adam):
    """Adam with decoupled weight decay: the rule starts from p - lr * weight_decay * p.

    As `Adam` but for two defaults: `weight_decay=1e-2` (as in PyTorch; 1e-4 in Optax, 4e-3 in Keras) and
    `decoupled_weight_decay=True`. The decay is multiplied by lr and comes before the update.

    Args:
        params: what to update in place; see `fastlr.Optimizer`.
        lr: step size per update, >= 0. Default 1e-3.
        betas: decay of the two averages, each in [0, 1). Default (0.9, 0.999).
        eps: added to the root after the bias correction, >= 0. Default 1e-8.
        amsgrad: never let the denominator shrink. Default False.
        options: weight_decay (default 1e-2), decoupled_weight_decay (default True) and everything else that
            `fastlr.Optimizer` takes.

    Raises:
        TypeError: if an argument is of the wrong kind.
        ValueError: if one is out of range.

    Source: Loshchilov and Hutter 2019, arXiv:1711.05101, Algorithm 2, with lr in place of the paper's schedule factor
    on the decay, as in PyTorch.

    Example:
        >>> import numpy as np, fastlr
        >>> w = np.ones(2)
        >>> info = fastlr.AdamW(w, lr=0.1, weight_decay=0.5).step(np.ones(2))
        >>> w.round(6)
        array([0.85, 0.85])
    """

    _defaults: ClassVar[StepOptions] = {"weight_decay": 1e-2, "decoupled_weight_decay": True}


class NAdam(Optimizer):
    """NAdam: Adam with Nesterov momentum on a schedule of its own.

    mu = beta1 * (1 - 0.5 * 0.96**(t * momentum_decay)), mu_next the same at t + 1, mu_product the product of all mu so
    far; m = beta1 * m + (1 - beta1) * g; v = beta2 * v + (1 - beta2) * g**2;
    m_hat = mu_next * m / (1 - mu_product * mu_next) + (1 - mu) * g / (1 - mu_product); v_hat = v / (1 - beta2**t);
    p = p - lr * m_hat / (sqrt(v_hat) + eps).

    eps is outside the root. The schedule of mu is PyTorch's; Keras has it without `momentum_decay` (as if it were 1),
    Optax has none at all: at the same settings ten steps differ by 55 %. The product of the mu is kept in float64 for
    each group. Weight decay is coupled unless `decoupled_weight_decay=True`. States: `exp_avg` (m), `exp_avg_sq` (v),
    from 0, and `mu_product`, from 1.

    Args:
        params: what to update in place; see `fastlr.Optimizer`.
        lr: step size per update, >= 0. Default 2e-3.
        betas: decay of the two averages, each in [0, 1). Default (0.9, 0.999).
        eps: added to the root, >= 0. Default 1e-8.
        momentum_decay: how fast mu approaches beta1, >= 0. Default 4e-3.
        options: weight_decay (default 0) and everything else that `fastlr.Optimizer` takes.

    Raises:
        TypeError: if an argument is of the wrong kind.
        ValueError: if one is out of range.

    Source: Dozat 2016, "Incorporating Nesterov Momentum into Adam", ICLR workshop, Algorithm 2, with the schedule of
    its section 3.1 as in PyTorch (https://openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ).

    Example:
        >>> import numpy as np, fastlr
        >>> w = np.array([1.0, 2.0])
        >>> info = fastlr.NAdam(w, lr=0.1).step(np.array([1.0, -3.0]))
        >>> w.round(3)
        array([0.894, 2.106])
    """

    _rule = Rule(rules.nadam)
    _states = {"m": "exp_avg", "v": "exp_avg_sq"}
    betas = pair("beta1", "beta2", RATE)
    eps = number(NON_NEGATIVE)
    momentum_decay = number(NON_NEGATIVE)

    def __init__(
        self,
        params: Any,
        *,
        lr: Any = 2e-3,
        betas: tuple[Any, Any] = (0.9, 0.999),
        eps: Any = 1e-8,
        momentum_decay: Any = 4e-3,
        **options: Unpack[StepOptions],
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, momentum_decay=momentum_decay, **options)


class LAMB(Optimizer):
    """LAMB: Adam's step, scaled in each leaf to a length in proportion to that of the parameters.

    m, v, m_hat and v_hat as in Adam; step = m_hat / (sqrt(v_hat) + eps) + weight_decay * p;
    p = p - lr * norm(p) / norm(step) * step, where a ratio with a norm of 0 is 1.

    The norms are taken over each leaf (of each model). eps is outside the root; the bias is corrected as in the paper
    (some implementations leave it out). The paper's bounds phi on norm(p) are the identity here. The decay is inside
    the step, so it is scaled with it. Biases and gains are usually left out:
    `groups={"*.bias": {"weight_decay": 0.0, "layer_adaptation": False}}`. States: `exp_avg` (m), `exp_avg_sq` (v),
    from 0.

    Args:
        params: what to update in place; see `fastlr.Optimizer`.
        lr: step size per update, >= 0. Default 1e-3.
        betas: decay of the two averages, each in [0, 1). Default (0.9, 0.999).
        eps: added to the root, >= 0. Default 1e-6.
        layer_adaptation: scale the step; without it this is Adam with decoupled decay. Default True.
        options: weight_decay (default 0, added to the step as weight_decay * p) and everything else that
            `fastlr.Optimizer` takes.

    Raises:
        TypeError: if an argument is of the wrong kind.
        ValueError: if one is out of range.

    Source: You et al. 2020, "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes",
    arXiv:1904.00962, Algorithm 2.

    Example:
        >>> import numpy as np, fastlr
        >>> w = np.array([3.0, 4.0])
        >>> info = fastlr.LAMB(w, lr=0.1).step(np.array([1.0, -1.0]))
        >>> w.round(3)
        array([2.646, 4.354])
    """

    _rule = Rule(rules.lamb)
    _states = {"m": "exp_avg", "v": "exp_avg_sq"}
    betas = pair("beta1", "beta2", RATE)
    eps = number(NON_NEGATIVE)
    layer_adaptation = flag()

    def __init__(
        self,
        params: Any,
        *,
        lr: Any = 1e-3,
        betas: tuple[Any, Any] = (0.9, 0.999),
        eps: Any = 1e-6,
        layer_adaptation: bool = True,
        **options: Unpack[StepOptions],
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, layer_adaptation=layer_adaptation, **options)
