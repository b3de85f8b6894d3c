"""Every schedule as a function of the step that reads like its paper.

`n` is the number of updates before this one, a float; keyword-only arguments are a schedule's numbers, with a float for
whole numbers too, and words that tell its forms apart. A schedule among the arguments is called with a step of its own.
`staging` reads these functions; called as they stand, they are ordinary Python. Defaults live in the classes.
"""

from math import cos, exp, floor, log, pi, sqrt

# What equations call besides functions in the table of `kernels.functions`


def times(a, b):
    """A product in which zero times infinity is zero: what is switched off stays off however large the rest is."""
    return 0 if a == 0 else 0 if b == 0 else a * b


def min(a, b):
    """Python's min: the smaller of two values; NaN if `a` is."""
    return b if b < a else a


def max(a, b):
    """Python's max: the larger of two values; NaN if `a` is."""
    return b if b > a else a


def falling(f):
    """From 1 to 0 along half a cosine, for f from 0 to 1; never below 0."""
    return 0.5 * (1 + cos(pi * f))


# Decays


def constant(n, *, value):
    """The same value at every step."""
    return value + 0  # also for -0.0 a 0.0


def time_based(n, *, lr, decay):
    """`lr / prod(1 + decay k, k < n)`: the first factors multiplied, of the others the logarithms summed."""
    product = 1
    for k in range(1, 6):
        product = product * (1 + decay * k if n > k else 1)
    # For the rest a rate that does not overflow there; of a larger one the product is infinite already.
    d = min(max(decay, 1e-300), 1e150)
    end = max(n, 6)
    rest = (log_integral(d, end) - log_integral(d, 6)) + (log_corrections(d, end) - log_corrections(d, 6))
    rest = rest if n > 6 else 0
    return lr / product * exp(-rest)


def log_integral(d, x):
    """The integral of log(1 + d x): `((1 + u) log(1 + u) - u) / d` for u = d x, without cancellation.

    Where u < 1/2 it is a series of positive terms.
    """
    u = d * x
    r = u / (2 + u)
    square = r * r
    series = 0
    for k in reversed(range(1, 13)):
        series = square * (series + 1 / (2 * k + 1))
    return (2 * (square + (1 + r) * r * series) / (1 - r) if u < 0.5 else (1 + u) * log(1 + u) - u) / d


# B(2j) / (2j (2j - 1)), j from 8 to 1, with the Bernoulli numbers B
CORRECTIONS = (-3617 / 122400, 1 / 156, -691 / 360360, 1 / 1188, -1 / 1680, 1 / 1260, -1 / 360, 1 / 12)


def log_corrections(d, x):
    """What a sum of log(1 + d k), k < x, has beside its integral: Euler and Maclaurin's formula."""
    y = d / (1 + d * x)
    square = y * y
    series = 0
    for factor in CORRECTIONS:
        series = factor + square * series
    return y * series - 0.5 * log(1 + d * x)


def inverse_time(n, *, lr, decay, every, staircase):
    """`lr / (1 + decay n)`."""
    if staircase:
        n = floor(n / every)
    return lr / (1 + decay * n)


def step_decay(n, *, lr, factor, every, count):
    """`lr factor**floor(n / every)`."""
    if count == "1 + n":
        n = 1 + n
    return times(lr, factor ** floor(n / every))


def multi_step(n, *, lr, milestones, factor):
    """`lr factor**(number of milestones <= n)`."""
    drops = 0
    for milestone in milestones:
        drops = drops + (1 if n >= milestone else 0)
    return times(lr, factor**drops)


def exponential(n, *, lr, decay, factor, half_life, every, staircase, lowest):
    """`lr exp(-decay n)`."""
    if staircase:
        n = floor(n / every) * every
    if factor is not None:
        share = factor**n
    elif half_life is not None:
        share = 0.5 ** (n / half_life)
    else:
        share = exp(-decay * n)
    return max(times(lr, share), lowest)


def linear(n, *, start, end, steps):
    """`start + (end - start) min(n / steps, 1)`, written so that it is exact at both ends."""
    f = min(n / steps, 1)
    return start * (1 - f) + end * f


def polynomial(n, *, lr, steps, power, end, cycle):
    """`end + (lr - end) (1 - min(n / steps, 1))**power`."""
    if cycle:
        steps = steps * max(-floor(-n / steps), 1)
    return end + (lr - end) * (1 - min(n / steps, 1)) ** power


def inverse_sqrt(n, *, lr, warmup_steps):
    """Vaswani et al. 2017, arXiv:1706.03762, eq. 3, with the peak `d_model**-0.5 warmup**-0.5` called lr."""
    step_num = n + 1
    return lr * min(step_num / warmup_steps, sqrt(warmup_steps / step_num))


def piecewise(n, *, boundaries, values):
    """`values[k]` from step `boundaries[k - 1]` on."""
    value = values[0] + 0
    for k in range(len(boundaries)):
        value = values[k + 1] if n >= boundaries[k] else value
    return value


def interpolated(n, *, steps, values, shape):
    """From values[k] at steps[k] to the next, and the last one after that."""
    value = values[-1]
    for k in reversed(range(len(steps) - 1)):
        f = (n - steps[k]) / (steps[k + 1] - steps[k])
        rest = falling(f) if shape == "cosine" else 1 - f
        between = values[k + 1] + (values[k] - values[k + 1]) * rest
        value = between if n < steps[k + 1] else value
    return value


def call(n, *, function):
    """A function of the user's."""
    return function(n)


# Cycles


def cosine(n, *, lr, steps, end):
    """Loshchilov and Hutter 2017, arXiv:1608.03983, eq. 5, without restarts."""
    return end + (lr - end) * falling(min(n / steps, 1))


def cosine_restarts(n, *, lr, steps, growth, equal_periods, decay, end):
    """Loshchilov and Hutter 2017, arXiv:1608.03983, eq. 5, with T_0 = steps and T_mult = growth."""
    if equal_periods:
        i = floor(n / steps)
        f = n / steps - i
    else:
        # The number of the period follows from a logarithm, which may be off by one where it is a whole number.
        i = floor(log(n / steps * (growth - 1) + 1) / log(growth))
        power = growth**i
        late = n < first_step(steps, growth, power)
        i = i - 1 if late else i
        power = power / growth if late else power
        following = power * growth
        early = n >= first_step(steps, growth, following)
        i = i + 1 if early else i
        power = following if early else power
        f = (n - first_step(steps, growth, power)) / (steps * power)
    height = (lr - end) * decay**i
    return end + height * falling(f)


def first_step(steps, growth, power):
    """The first step of period i, of which `power` is growth**i."""
    return steps * (power - 1) / (growth - 1)


def one_cycle(n, *, ends, values, shape):
    """Smith and Topin 2018, arXiv:1708.07120, section 3: from values[k] at ends[k] to the next."""
    value = values[-1]
    for k in reversed(range(len(ends) - 1)):
        a, b = values[k], values[k + 1]
        f = min(max(n - ends[k], 0) / (ends[k + 1] - ends[k]), 1)
        between = b + (a - b) * falling(f) if shape == "cosine" else (b - a) * f + a
        value = between if n <= ends[k + 1] else value
    return value


def cyclic(n, *, low, high, up, down, period, mode, gamma):
    """Smith 2017, arXiv:1506.01186, section 3."""
    cycle = floor(n / period)
    inside = n - cycle * period
    height = inside / up if inside <= up else (period - inside) / down
    if mode == "triangular2":
        height = height * 0.5**cycle
    elif mode == "exp_range":
        height = height * gamma**n
    return low + (high - low) * height


def warmup_stable_decay(n, *, lr, warmup_steps, begin, decay_steps, shape, end):
    """Hu et al. 2024, arXiv:2404.06395, section 4; "1-sqrt": Haegele et al. 2024, arXiv:2405.18392, section 3."""
    f = min(max(n - begin + 1, 0) / decay_steps, 1)
    if shape == "linear":
        rest = 1 - f
    elif shape == "cosine":
        rest = falling(f)
    else:
        rest = 1 - sqrt(f)
    value = lr if n < begin else end + (lr - end) * rest
    if warmup_steps is not None:
        value = lr * (n + 1) / warmup_steps if n < warmup_steps else value
    return value


def slanted_triangular(n, *, lr, cut, rest, ratio):
    """Howard and Ruder 2018, arXiv:1801.06146, section 3.2, eq. 3, with `rest` for `(1 / cut_fraction - 1) cut`."""
    down = max(1 - (n - cut) / rest, 0)
    p = n / cut if n < cut else down
    return lr * (1 + p * (ratio - 1)) / ratio


# Schedules of schedules


def plateau(n, *, scale, schedule, lowest):
    """A schedule times what a plateau remembers."""
    return max(scale * schedule(n), lowest)


def warmup(n, *, schedule, steps, start, shape, included, first_at_start):
    """A schedule with a factor that rises to 1 in the first steps."""
    f = min((n if first_at_start else n + 1) / steps, 1)
    if shape == "cosine":
        g = 1 - falling(f)
    elif shape == "sqrt":
        g = sqrt(f)
    elif shape == "log":
        g = log(1 + f * steps) / log(1 + steps)
    else:
        g = f
    factor = start + (1 - start) * g if n < steps else 1
    return factor * schedule(n if included else max(n - steps, 0))


def then(n, *, first, second, at):
    """One schedule, and then another from its own step 0."""
    before, after = first(min(n, at)), second(max(n - at, 0))
    return before if n < at else after


def product(n, *, first, second):
    """The product of two schedules."""
    return times(first(n), second(n))


def scaled(n, *, schedule, factor):
    """A schedule times a number."""
    return times(factor, schedule(n))


def clip(n, *, schedule, low, high):
    """A schedule limited to a range."""
    return min(max(schedule(n), low), high)


def shift(n, *, schedule, by):
    """A schedule that begins later, or earlier."""
    return schedule(max(n - by, 0))


def repeat(n, *, schedule, period):
    """The first steps of a schedule again and again."""
    return schedule(n - floor(n / period) * period)


def per_epoch(n, *, schedule, steps):
    """A schedule that counts epochs."""
    return schedule(floor(n / steps))
