"""Slow float64 references, written from the papers: plain NumPy, one equation a line, whole histories where it helps.

Each takes the first parameters and the list of gradients, and returns the parameters after each of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

Arrays = Sequence[np.ndarray]


def _prepared(
    theta: np.ndarray, grads: Arrays, lr: float, weight_decay: float, decoupled: bool, maximize: bool
) -> Iterator:
    """Yield (theta, g) for each step; the caller sends back the next theta."""
    theta = theta.astype(np.float64)
    for g in grads:
        g = g.astype(np.float64)
        if maximize:
            g = np.negative(g)
        if decoupled:
            theta = theta * (1.0 - lr * weight_decay)
        else:
            g = g + theta * weight_decay
        theta = yield theta, g


def _run(update, theta, grads, lr, weight_decay=0.0, decoupled_weight_decay=False, maximize=False) -> list[np.ndarray]:
    steps = _prepared(theta, grads, lr, weight_decay, decoupled_weight_decay, maximize)
    out = []
    theta, g = next(steps)
    for k in range(len(grads)):
        out.append(update(k + 1, theta, g))
        if k + 1 < len(grads):
            theta, g = steps.send(out[-1])
    return out


def sgd(theta, grads, lr=1e-3, momentum=0.0, dampening=0.0, nesterov=False, **options):
    """Momentum as a sum over all past gradients, each weighted by the power of momentum that it has seen."""
    history: list[np.ndarray] = []

    def update(t, theta, g):
        history.append(g if t == 1 else (1.0 - dampening) * g)
        if momentum == 0:
            return theta - lr * g
        velocity = sum(momentum ** (t - 1 - k) * past for k, past in enumerate(history))
        return theta - lr * (g + momentum * velocity if nesterov else velocity)

    return _run(update, theta, grads, lr, **options)


def adagrad(theta, grads, lr=1e-2, lr_decay=0.0, initial_accumulator_value=0.0, eps=1e-10, **options):
    """The diagonal of the sum of outer products of all gradients so far."""
    squares: list[np.ndarray] = []

    def update(t, theta, g):
        squares.append(g * g)
        diagonal = initial_accumulator_value + np.sum(squares, axis=0)
        return theta - (lr / (1.0 + (t - 1.0) * lr_decay)) * (g / (np.sqrt(diagonal) + eps))

    return _run(update, theta, grads, lr, **options)


def adadelta(theta, grads, lr=1.0, rho=0.9, eps=1e-6, **options):
    """Algorithm 1: accumulate gradient, compute update, accumulate updates, apply."""
    memory = {"g2": np.zeros(theta.shape), "dx2": np.zeros(theta.shape)}

    def update(t, theta, g):
        memory["g2"] = rho * memory["g2"] + (1.0 - rho) * np.square(g)
        dx = -np.sqrt((memory["dx2"] + eps) / (memory["g2"] + eps)) * g
        memory["dx2"] = rho * memory["dx2"] + (1.0 - rho) * np.square(dx)
        return theta + lr * dx

    return _run(update, theta, grads, lr, **options)


def rmsprop(theta, grads, lr=1e-2, alpha=0.99, eps=1e-8, momentum=0.0, centered=False, **options):
    """Running averages as weighted sums over all past gradients."""
    history: list[np.ndarray] = []
    velocity = [np.zeros(theta.shape)]

    def update(t, theta, g):
        history.append(g)
        weights = [(1.0 - alpha) * alpha ** (t - 1 - k) for k in range(t)]
        second = sum(w * x * x for w, x in zip(weights, history, strict=True))
        first = sum(w * x for w, x in zip(weights, history, strict=True))
        spread = second - first * first if centered else second
        direction = g / (np.sqrt(spread) + eps)
        velocity[0] = momentum * velocity[0] + direction
        return theta - lr * velocity[0]

    return _run(update, theta, grads, lr, **options)


def adam(theta, grads, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, amsgrad=False, **options):
    """Bias-corrected averages as weighted means over all past gradients, whose weights add up to 1."""
    history: list[np.ndarray] = []
    largest = [np.zeros(theta.shape)]

    def mean(values: Arrays, beta: float) -> tuple[np.ndarray, float]:
        weights = np.array([beta ** (len(values) - 1 - k) for k in range(len(values))])
        return np.tensordot(weights / weights.sum(), np.stack(values), axes=1), (1.0 - beta) * weights.sum()

    def update(t, theta, g):
        history.append(g)
        m_hat, _ = mean(history, betas[0])
        v_hat, mass = mean([x * x for x in history], betas[1])
        if amsgrad:
            largest[0] = np.maximum(largest[0], v_hat * mass)
            v_hat = largest[0] / mass
        return theta - lr * m_hat / (np.sqrt(v_hat) + eps)

    return _run(update, theta, grads, lr, **options)


def nadam(theta, grads, lr=2e-3, betas=(0.9, 0.999), eps=1e-8, momentum_decay=4e-3, **options):
    """Averages as weighted sums over all past gradients; the momenta of all steps are known from the start."""
    history: list[np.ndarray] = []
    mus = [betas[0] * (1.0 - 0.5 * 0.96 ** (k * momentum_decay)) for k in range(1, len(grads) + 2)]

    def update(t, theta, g):
        history.append(g)
        first = sum((1.0 - betas[0]) * betas[0] ** (t - 1 - k) * x for k, x in enumerate(history))
        second = sum((1.0 - betas[1]) * betas[1] ** (t - 1 - k) * x * x for k, x in enumerate(history))
        looked_ahead = mus[t] * first / (1.0 - np.prod(mus[: t + 1])) + (1.0 - mus[t - 1]) * g / (
            1.0 - np.prod(mus[:t])
        )
        return theta - lr * looked_ahead / (np.sqrt(second / (1.0 - betas[1] ** t)) + eps)

    return _run(update, theta, grads, lr, **options)


def _length(x: np.ndarray) -> float:
    return float(np.linalg.norm(np.ravel(x)))


def lamb(theta, grads, lr=1e-3, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0, layer_adaptation=True, maximize=False):
    """Algorithm 2: r from bias-corrected averages, the decay added, the step as long as lr times the parameters."""
    history: list[np.ndarray] = []

    def update(t, theta, g):
        history.append(g)
        weights = [np.array([beta ** (t - 1 - k) for k in range(t)]) for beta in betas]
        m_hat, v_hat = (
            np.tensordot(w / w.sum(), np.stack([x**power for x in history]), axes=1)
            for w, power in zip(weights, (1, 2), strict=True)
        )
        direction = m_hat / (np.sqrt(v_hat) + eps) + weight_decay * theta
        if not layer_adaptation:
            return theta - lr * direction
        if _length(theta) == 0 or _length(direction) == 0:
            return theta - lr * direction
        return theta - lr * _length(theta) * (direction / _length(direction))

    return _run(update, theta, grads, lr, maximize=maximize)


def lars(
    theta,
    grads,
    lr=1.0,
    momentum=0.9,
    trust_coefficient=1e-3,
    weight_decay=0.0,
    layer_adaptation=True,
    maximize=False,
):
    """Algorithm 1, the momentum as a sum over all past steps."""
    pushes: list[np.ndarray] = []

    def update(t, theta, g):
        local = 1.0
        if layer_adaptation and _length(theta) > 0 and _length(g) > 0:
            local = trust_coefficient * _length(theta) / (_length(g) + weight_decay * _length(theta))
        pushes.append(lr * local * (g + weight_decay * theta))
        return theta - sum(momentum ** (t - 1 - k) * push for k, push in enumerate(pushes))

    return _run(update, theta, grads, lr, maximize=maximize)


def adamw(theta, grads, weight_decay=1e-2, decoupled_weight_decay=True, **settings):
    """Adam with the decay taken out of the gradient."""
    return adam(theta, grads, weight_decay=weight_decay, decoupled_weight_decay=decoupled_weight_decay, **settings)


def dog(theta, grads, lr=1.0, relative_distance=1e-6, eps=1e-8, layerwise=False, **options):
    """Eqs. 1 and 2, from all iterates and gradients so far."""
    iterates: list[np.ndarray] = []
    seen: list[np.ndarray] = []

    def update(t, theta, g):
        iterates.append(theta)
        seen.append(g)
        first = relative_distance * (1.0 + _length(iterates[0]))
        distance = max([first, *(_length(x - iterates[0]) for x in iterates)])
        return theta - lr * (distance / np.sqrt(sum(_length(x) ** 2 for x in seen) + eps)) * g

    return _run(update, theta, grads, lr, **options)


def prodigy(theta, grads, lr=1.0, betas=(0.9, 0.999), eps=1e-8, d0=1e-6, weight_decay=0.0, decoupled_weight_decay=True):
    """Algorithm 4, averages and sums as weighted sums over all past steps."""
    history: list[tuple[float, np.ndarray, np.ndarray]] = []
    estimate = [d0]
    base = _base(lr)

    def update(t, theta, g):
        if not decoupled_weight_decay:
            g = g + weight_decay * theta
        d = estimate[0]
        history.append((d, g, history[0][2] - theta if history else np.zeros_like(theta)))
        if t == 1:
            history[0] = (d, g, theta)  # where it began; its distance from there is zero

        def summed(beta, term):
            return sum((1 - beta) * beta ** (t - 1 - k) * term(*one, k) for k, one in enumerate(history))

        m = summed(betas[0], lambda d, g, away, k: d * g)
        v = summed(betas[1], lambda d, g, away, k: (d * g) ** 2)
        beta3 = np.sqrt(betas[1])
        r = summed(beta3, lambda d, g, away, k: base * d**2 * np.sum(g * away) if k else 0.0)
        s = summed(beta3, lambda d, g, away, k: base * d**2 * g)
        size = np.sum(np.abs(s))
        new = theta - lr * d * weight_decay * theta if decoupled_weight_decay else theta
        new = new - lr * d * m / (np.sqrt(v) + d * eps)
        estimate[0] = max(d, r / size) if size > 0 else d
        return new

    return _run(update, theta, grads, lr)


def _base(lr):
    """The rate of a group, where `lr` has one for each element: the factors in these tests are 1 on average."""
    return float(np.mean(lr))


def _averaged(theta, steps, weights, beta):
    """Schedule-free: z moves by the steps so far, x is the weighted mean of all z, y lies between them."""
    zs = theta - np.cumsum(np.stack(steps), axis=0)
    x = np.average(zs, axis=0, weights=weights)
    return (1 - beta) * zs[-1] + beta * x


def schedule_free_sgd(theta, grads, lr=1.0, beta=0.9, weight_decay=0.0, **options):
    steps: list[np.ndarray] = []
    start = theta

    def update(t, theta, g):
        steps.append(lr * (g + weight_decay * theta))
        return _averaged(start, steps, [_base(lr) ** 2] * t, beta)

    return _run(update, theta, grads, lr, **options)


def schedule_free_adamw(theta, grads, lr=2.5e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, **options):
    steps: list[np.ndarray] = []
    squares: list[np.ndarray] = []
    start = theta

    def update(t, theta, g):
        squares.append(g * g)
        v = sum((1 - betas[1]) * betas[1] ** (t - 1 - k) * x for k, x in enumerate(squares))
        corrections = np.sqrt([1 - betas[1] ** k for k in range(1, t + 1)])
        steps.append(lr * corrections[-1] * (g / (np.sqrt(v) + eps) + weight_decay * theta))
        return _averaged(start, steps, (_base(lr) * corrections) ** 2, betas[0])

    return _run(update, theta, grads, lr, **options)
