"""The optimizers: each a rule with its defaults, its checks and the names of its states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from .checks import FRACTION, NON_NEGATIVE, POSITIVE, RATE
from .groups import everywhere, somewhere
from .hyperparameters import fixed, flag, number, pair
from .kernels import rules
from .kernels.staging import Rule
from .optimizer import Optimizer
from .options import StepOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["LAMB", "LARS", "SGD", "Adadelta", "Adagrad", "Adam", "AdamW", "DoG", "NAdam", "Prodigy", "RMSprop"]
__all__ += ["ScheduleFreeAdamW", "ScheduleFreeSGD"]


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
