"""Every optimizer as a function of one element that reads like its paper.

Positional arguments differ per element: the parameter `p`, its gradient `g` and the states. Keyword-only arguments are
the same for a whole group: `lr`, the hyperparameters, and `t`, the number of this update (the first is 1). A rule
returns the new parameter and its new states in the order in which they came in. `staging.Rule` turns it into kernels;
called as it stands, it is ordinary Python. Defaults live in the classes of `fastlr.optimizers`.
"""

from .primitives import max, sqrt


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


def step_options(p, g, *, lr, maximize, weight_decay, decoupled_weight_decay):
    """What every optimizer can do before its rule, in this order: maximize, then decay (coupled: into the gradient).

    Decoupled: Loshchilov and Hutter 2019, arXiv:1711.05101, Algorithm 2, with the decay multiplied by lr.
    """
    if maximize:
        g = -g
    if weight_decay:
        if decoupled_weight_decay:
            p = p - lr * weight_decay * p
        else:
            g = g + weight_decay * p
    return p, g
