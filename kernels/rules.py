"""Every optimizer as a function of one element that reads like its paper.

Positional arguments differ per element: the parameter `p`, its gradient `g` and the states. Keyword-only arguments are
the same for a whole group: `lr`, the hyperparameters, and `t`, the number of this update (the first is 1). A rule
returns the new parameter and its new states in the order in which they came in. `staging.Rule` turns it into kernels;
called as it stands, it is ordinary Python. Defaults live in the classes of `fastlr.optimizers`.
"""

from math import inf

from .primitives import abs, clip, max, min, norm, sqrt, total


def sgd(p, g, b, *, lr, t, momentum, dampening, nesterov):
    """Polyak 1964, doi:10.1016/0041-5553(64)90137-5, eq. 9; Nesterov as in Sutskever et al. 2013, ICML, eqs. 3-4."""
    if momentum:
        b = g if t == 1 else momentum * b + (1 - dampening) * g
        if nesterov:
            g = g + momentum * b
        else:
            g = b
    return p - lr * g, b


def adagrad(p, g, s, *, lr, t, lr_decay, eps):
    """Duchi, Hazan and Singer 2011, JMLR 12:2121-2159, section 1, eq. 1 with a diagonal matrix."""
    s = s + g**2
    return p - lr / (1 + (t - 1) * lr_decay) * g / (sqrt(s) + eps), s


def adadelta(p, g, v, u, *, lr, rho, eps):
    """Zeiler 2012, arXiv:1212.5701, Algorithm 1."""
    v = rho * v + (1 - rho) * g**2
    delta = sqrt((u + eps) / (v + eps)) * g  # RMS over RMS: one root, since two made float64 wait for the divider
    u = rho * u + (1 - rho) * delta**2
    return p - lr * delta, v, u


def rmsprop(p, g, v, m, b, *, lr, alpha, eps, momentum, centered):
    """Tieleman and Hinton 2012, Coursera lecture 6.5, slide 29; centered: Graves 2013, arXiv:1308.0850, eqs. 38-45."""
    v = alpha * v + (1 - alpha) * g**2
    if centered:
        m = alpha * m + (1 - alpha) * g
        step = g / (sqrt(max(v - m**2, 0)) + eps)  # rounding can take the variance of a constant gradient below 0
    else:
        step = g / (sqrt(v) + eps)
    if momentum:
        b = momentum * b + step
        step = b
    return p - lr * step, v, m, b


def adam(p, g, m, v, v_max, *, lr, t, beta1, beta2, eps, amsgrad):
    """Kingma and Ba 2015, arXiv:1412.6980, Algorithm 1; AMSGrad: Reddi et al. 2018, arXiv:1904.09237, Algorithm 2."""
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g**2
    m_hat = m / (1 - beta1**t)
    if amsgrad:
        v_max = max(v_max, v)
        v_hat = v_max / (1 - beta2**t)
    else:
        v_hat = v / (1 - beta2**t)
    return p - lr * m_hat / (sqrt(v_hat) + eps), m, v, v_max


def nadam(p, g, m, v, *, lr, t, beta1, beta2, eps, momentum_decay, mu_product=1.0):
    """Dozat 2016, "Incorporating Nesterov Momentum into Adam", ICLR workshop, Algorithm 2, with its section 3.1."""
    mu = beta1 * (1 - 0.5 * 0.96 ** (t * momentum_decay))
    mu_next = beta1 * (1 - 0.5 * 0.96 ** ((t + 1) * momentum_decay))
    mu_product = mu_product * mu
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g**2
    m_hat = mu_next * m / (1 - mu_product * mu_next) + (1 - mu) * g / (1 - mu_product)
    v_hat = v / (1 - beta2**t)
    return p - lr * m_hat / (sqrt(v_hat) + eps), m, v, mu_product


def lamb(p, g, m, v, *, lr, t, beta1, beta2, eps, weight_decay, layer_adaptation):
    """You et al. 2020, arXiv:1904.00962, Algorithm 2, with the identity for phi."""
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g**2
    m_hat = m / (1 - beta1**t)
    v_hat = v / (1 - beta2**t)
    step = m_hat / (sqrt(v_hat) + eps) + weight_decay * p
    trust = 1.0
    if layer_adaptation:
        p_norm, step_norm = norm(p), norm(step)
        trust = p_norm / step_norm if p_norm > 0 and step_norm > 0 else 1.0
    return p - lr * trust * step, m, v


def lars(p, g, b, *, lr, momentum, trust_coefficient, weight_decay, layer_adaptation):
    """You, Gitman and Ginsburg 2017, arXiv:1708.03888, Algorithm 1."""
    trust = 1.0
    if layer_adaptation:
        p_norm, g_norm = norm(p), norm(g)
        trust = trust_coefficient * p_norm / (g_norm + weight_decay * p_norm) if p_norm > 0 and g_norm > 0 else 1.0
    b = momentum * b + lr * trust * (g + weight_decay * p)
    return p - b, b


def dog(p, g, x0, *, lr, base_lr, t, relative_distance, eps, layerwise=False, distance=0.0, squares=0.0, rate=0.0):
    """Ivgi, Hinder and Carmon 2023, arXiv:2302.12022, eqs. 1 and 2; layer-wise: section 3.3."""
    x0 = p if t == 1 else x0
    if layerwise:
        far, start, length = norm(p - x0), norm(p), norm(g)
    else:
        far, start, length = norm(p - x0, "all"), norm(p, "all"), norm(g, "all")
    distance = max(relative_distance * (1 + start) if distance == 0 else distance, far)
    squares = squares + length**2
    step = distance / sqrt(squares + eps)
    rate = base_lr * step
    return p - lr * step * g, x0, distance, squares, rate


def prodigy(
    p,
    g,
    x0,
    m,
    v,
    s,
    *,
    lr,
    base_lr,
    t,
    beta1,
    beta2,
    eps,
    weight_decay,
    decoupled_weight_decay,
    d=1e-6,
    r=0.0,
    rate=0.0,
):
    """Mishchenko and Defazio 2024, arXiv:2306.06101, Algorithm 4; beta3 is the root of beta2."""
    x0 = p if t == 1 else x0
    if not decoupled_weight_decay:
        g = g + weight_decay * p
    rate = base_lr * d
    beta3 = sqrt(beta2)
    m = beta1 * m + (1 - beta1) * d * g
    v = beta2 * v + (1 - beta2) * d**2 * g**2
    r = beta3 * r + (1 - beta3) * d**2 * total(base_lr * g * (x0 - p), "all")
    s = beta3 * s + (1 - beta3) * base_lr * d**2 * g
    s_sum = total(abs(s), "all")
    step = m / (sqrt(v) + d * eps)
    if decoupled_weight_decay:
        p = p - lr * d * weight_decay * p
    p = p - lr * d * step
    d = max(d, r / s_sum if s_sum > 0 else 0)
    return p, x0, m, v, s, d, r, rate


def schedule_free_sgd(p, g, x, z, *, lr, base_lr, t, beta, weight_decay, weights=0.0):
    """Defazio et al. 2024, arXiv:2405.15682, eqs. 3-5, weighted as in eq. 23; `p` is y, where gradients are taken."""
    x = p if t == 1 else x
    z = p if t == 1 else z
    weights = weights + base_lr**2
    c = base_lr**2 / weights if weights > 0 else 0
    z = z - lr * (g + weight_decay * p)
    x = (1 - c) * x + c * z
    return (1 - beta) * z + beta * x, x, z, weights


def schedule_free_adamw(p, g, x, z, v, *, lr, base_lr, t, beta1, beta2, eps, weight_decay, weights=0.0):
    """Defazio et al. 2024, arXiv:2405.15682, Algorithm 1; `p` is y, where gradients are taken."""
    x = p if t == 1 else x
    z = p if t == 1 else z
    v = beta2 * v + (1 - beta2) * g**2
    correction = sqrt(1 - beta2**t)
    weights = weights + (base_lr * correction) ** 2
    c = (base_lr * correction) ** 2 / weights if weights > 0 else 0
    z = z - lr * correction * (g / (sqrt(v) + eps) + weight_decay * p)
    x = (1 - c) * x + c * z
    return (1 - beta1) * z + beta1 * x, x, z, v, weights


def accumulation(p, g, *, first):
    """A sum of gradients: here `p` is what has been added up so far."""
    if first:
        p = g
    else:
        p = p + g
    return p


def before(
    p,
    g,
    lr_scale,
    *,
    lr,
    grad_scale,
    clip_norm,
    scope,
    clip_value,
    maximize,
    weight_decay,
    decoupled_weight_decay,
    unscaled,
    tested,
    norm_clipped,
    value_clipped,
    per_element,
):
    """What every optimizer can do before its rule: unscale, test, clip, maximize, decay; in this order.

    Clip by norm: Pascanu, Mikolov and Bengio 2013, arXiv:1211.5063, Algorithm 1, with PyTorch's 1e-6. Decoupled decay:
    Loshchilov and Hutter 2019, arXiv:1711.05101, Algorithm 2, with the decay multiplied by lr. What is returned after
    `lr` is for people, and for the decision to skip the step.
    """
    grad_norm, clip_coef, finite = 0.0, 1.0, True
    if tested or norm_clipped:
        grad_norm = norm(g, "all") / grad_scale
    if tested:
        finite = grad_norm - grad_norm == 0
    if norm_clipped:
        clip_coef = min(clip_norm / (norm(g, scope) / grad_scale + 1e-6), 1.0)
        clip_coef = clip_coef if clip_norm < inf else 1.0
        g = clip_coef / grad_scale * g
    elif unscaled:
        g = g / grad_scale
    if value_clipped:
        g = clip(g, -clip_value, clip_value)
    if per_element:
        lr = lr * lr_scale
    if maximize:
        g = -g
    if weight_decay:
        if decoupled_weight_decay:
            p = p - lr * weight_decay * p
        else:
            g = g + weight_decay * p
    return p, g, lr, grad_norm, clip_coef, finite


def after(p, start, lr_scale, ema, *, ema_decay, per_element, averaged, may_pause):
    """What every optimizer can do after its rule: keep elements whose rate is 0 as they were, average."""
    if per_element:
        p = p if lr_scale != 0 else start
    if averaged:
        # At 1 it is kept bit for bit: adding 0 would turn -0 into 0, and it into NaN where p is infinite.
        ema = ema + (1 - ema_decay) * (p - ema) if ema_decay < 1 or not may_pause else ema
    return p, ema
