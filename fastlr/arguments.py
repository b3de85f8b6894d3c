"""Names of arguments: the error for an unknown one, such as another library's, says what to use here instead."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from . import checks

__all__ = ["METHOD", "answered", "check"]

_Function = TypeVar("_Function", bound=Callable[..., Any])

# Names that other libraries use, an argument that must exist here for the advice to apply, and the advice; the first
# row that fits is used. Every optimizer has weight_decay, every LossScale an interval, every LBFGS a history.
METHOD = ".warmup"  # stands for the methods of a schedule
_ELSEWHERE: list[tuple[str, str, str]] = [
    # Optimizers
    ("learning_rate eta initial_learning_rate", "lr", "use lr="),
    ("schedule scheduler lr_scheduler lr_schedule", "lr", "use lr=, which takes schedules"),
    ("max_grad_norm global_clipnorm max_norm grad_clip gradient_clip_val", "clip_norm", "use clip_norm="),
    ("clipnorm", "clip_norm", 'use clip_norm= with scope="leaf"'),
    ("clipvalue", "clip_value", "use clip_value="),
    ("beta_1 beta_2 beta1 beta2 b1 b2", "betas", "use betas=(beta1, beta2)"),
    (
        "betas beta_1 beta_2 beta1 beta2 b1 b2",
        "weight_decay",
        "use momentum=, if this class has it; fastlr.Adam and its kin have betas",
    ),
    ("momentum", "betas", "use betas=, whose first is the momentum"),
    ("rho discounting_factor", "alpha", "use alpha=, the decay of the average"),
    ("epsilon", "eps", "use eps="),
    ("eps_root", "eps", "use eps=; the docstring says whether it is inside the root"),
    ("eps epsilon eps_root", "weight_decay", "leave it out: this rule has no eps"),
    ("l2 wd l2_regularization weight_decay_rate", "weight_decay", "use weight_decay="),
    ("decouple decoupled adam_w_mode", "weight_decay", "use decoupled_weight_decay="),
    ("mask exclude_from_weight_decay", "weight_decay", "use groups with a weight_decay of their own"),
    ("tau", "weight_decay", "use ema=1 - tau, and ema_out= for a target network"),
    ("use_ema ema_momentum ema_decay polyak", "weight_decay", "use ema=, the decay of the average"),
    ("amsgrad", "weight_decay", "use fastlr.Adam or fastlr.AdamW, which have it"),
    ("nesterov", "weight_decay", "use fastlr.SGD, which has it, or fastlr.NAdam, which is Adam with it"),
    ("initial_accumulator", "weight_decay", "use fastlr.Adagrad and its initial_accumulator_value="),
    ("bias_correction correct_bias", "weight_decay", "leave it out: biases are corrected as in the paper"),
    ("loss_scale_factor dynamic_loss_scale", "weight_decay", "use loss_scale=fastlr.LossScale(...)"),
    ("gradient_accumulation_steps", "weight_decay", "use opt.accumulate(grads), and then opt.step(grad_scale=steps)"),
    (
        "foreach fused differentiable",
        "weight_decay",
        "leave it out: it chooses among PyTorch's implementations, and here every step is one pass",
    ),
    # LossScale
    ("init_scale initial_scale loss_scale", "interval", "use init="),
    ("growth_factor scale_factor", "growth", "use growth="),
    ("backoff_factor", "backoff", "use backoff="),
    ("growth_interval growth_steps dynamic_growth_steps scale_window", "interval", "use interval="),
    ("min_loss_scale", "min_scale", "use min_scale="),
    ("enabled", "interval", "leave it out: for none, build the optimizer without loss_scale="),
    # Schedules
    ("optimizer", METHOD, "leave it out, and build the optimizer with lr=, which takes the schedule"),
    ("last_epoch", METHOD, "leave it out: a schedule has no memory, and follows the optimizer's steps"),
    (
        "warmup warmup_steps num_warmup_steps warmup_iters warmup_epochs",
        METHOD,
        "use the method, such as Constant(1e-3).warmup(500)",
    ),
    (
        "warmup warmup_steps num_warmup_steps warmup_iters warmup_epochs",
        "lr",
        "use lr= with a schedule, such as Constant(1e-3).warmup(500)",
    ),
    ("warmup_steps num_warmup_steps warmup_iters warmup_epochs", "steps", "use steps="),
    (
        "T_max T_0 total_steps total_iters max_iters num_training_steps num_steps transition_steps",
        "steps",
        "use steps=",
    ),
    ("decay_steps", "steps", "use steps="),
    ("decay_steps transition_steps", "every", "use every="),
    ("T_mult t_mul", "growth", "use growth="),
    ("m_mul", "decay", "use decay="),
    ("eta_min min_lr lr_min lr_end end_lr end_value final_lr end_learning_rate", "end", "use end="),
    ("alpha", "end", "use end=, which is the last rate itself, not a fraction of the first"),
    ("min_lr eta_min", "floor", "use floor="),
    ("end_value", "floor", "use floor="),
    ("gamma decay_rate", "factor", "use factor="),
    ("gamma decay_rate", "decay", "use decay="),
    ("step_size drop_every", "every", "use every="),
    ("step_size", METHOD, "use every= of StepDecay, or up= and down= of Cyclic"),
    ("step_size", "lr", "use lr="),
    ("milestones boundaries", "milestones", "use milestones="),
    ("milestones", "boundaries", "use boundaries="),
    ("milestones boundaries", METHOD, "use fastlr.schedules.MultiStep, or Piecewise"),
    ("base_lr init_value initial_value min_lr", "low", "use low="),
    ("max_lr peak_value", "high", "use high="),
    ("max_lr peak_value base_lr init_value initial_value start_lr initial_lr", "lr", "use lr="),
    ("base_lr init_value start_lr initial_lr lr learning_rate start_value", "start", "use start="),
    ("lr learning_rate init_value", "value", "use value="),
    ("start_factor", "start", "use start=lr * start_factor"),
    ("end_factor", "end", "use end=lr * end_factor"),
    ("step_size_up", "up", "use up="),
    ("step_size_down", "down", "use down="),
    ("pct_start", "rise", "use rise="),
    ("div_factor", "div", "use div="),
    ("final_div_factor", "final_div", "use final_div="),
    ("three_phase", "phases", "use phases=3"),
    ("anneal_strategy", "shape", "use shape="),
    ("lr_lambda", "function", "use function="),
    # LBFGS
    ("history_size memory_size maxcor", "history", "use history="),
    ("tolerance_grad gtol pgtol", "grad_tolerance", "use grad_tolerance="),
    ("tolerance_grad gtol pgtol", "history", "use grad_tolerance= of minimize"),
    ("tolerance_change ftol tol", "loss_tolerance", "use loss_tolerance="),
    ("tolerance_change ftol tol", "history", "use loss_tolerance= of minimize"),
    ("max_iter maxiter max_iterations", "max_steps", "use max_steps="),
    ("max_iter maxiter max_iterations", "history", "use max_steps= of minimize"),
    ("max_eval maxfun max_ls max_iter maxiter", "max_evaluations", "use max_evaluations="),
    ("line_search_fn line_search", "method", 'use method="wolfe" or "armijo"'),
    ("lr learning_rate", "history", "leave it out: the line search finds how far to go"),
    # find_lr
    ("start_lr min_lr", "low", "use low="),
    ("end_lr max_lr final_value end_value", "high", "use high="),
    ("num_iter num_training num_it", "steps", "use steps="),
    ("beta smooth_f", "smoothing", "use smoothing="),
    ("diverge_th stop_factor early_stop_threshold", "diverge", "use diverge="),
]


def _advice(given: str, known: Sequence[str]) -> str | None:
    """What to do instead of giving an argument that other libraries have; None if nothing is known of it."""
    return next((words for names, here, words in _ELSEWHERE if here in known and given in names.split()), None)


def check(name: str, given: Iterable[str], known: Iterable[str], more: Sequence[str] = ()) -> None:
    """Check names of arguments; for those of other libraries, the error says what to use here instead.

    Args:
        name: what they are, for messages.
        given: by the caller.
        known: those that exist.
        more: what else exists that advice may refer to, such as `METHOD`.

    Raises:
        TypeError: if one is unknown.
    """
    known = list(known)
    for one in given:
        advice = None if one in known else _advice(one, [*known, *more])
        if advice is not None:
            raise TypeError(f"{name} {one!r} is not known here: {advice}. There are {', '.join(known)}.")
        checks.choices(name, [one], known)


def answered(function: _Function, more: Sequence[str] = ()) -> _Function:
    """A function that checks the names of its arguments by `check`.

    Args:
        function: the function, or the `__init__` of a class, which is called by the name of the class.
        more: as for `check`.
    """
    name = function.__qualname__.removesuffix(".__init__").rpartition(".")[2]
    known = [n for n in inspect.signature(function).parameters if n != "self"]

    @functools.wraps(function)
    def answering(*args: Any, **given: Any) -> Any:
        if not given.keys() <= set(known):
            check(f"{name}: argument", given, known, more)
        return function(*args, **given)

    return answering  # type: ignore[return-value]
