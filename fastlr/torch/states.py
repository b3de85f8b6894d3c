"""What may stand in the state of an optimizer of PyTorch: checked whole, before anything of it is used."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ..checks import COUNTABLE
from . import tensors

__all__ = ["check_containers", "check_whole", "count", "entries_of", "number", "tensor"]

# What PyTorch keeps without a count, and starts anew where it is missing: of SGD and Muon, which keep nothing else.
_UNCOUNTED = {"step", "momentum_buffer"}


def number(called: str, name: str, value: Any, infinite: bool = False, nan: bool = False) -> float:
    """A number in the state of a parameter: a number, or a tensor of one element.

    Args:
        called: what the parameter is called.
        name: of the number.
        value: what stands there.
        infinite: whether it may be infinite.
        nan: whether it may be NaN.

    Raises:
        ValueError: if it is something else.
    """
    scalar = value
    if isinstance(scalar, torch.Tensor):
        if scalar.numel() != 1 or scalar.is_meta or scalar.is_complex() or scalar.layout is not torch.strided:
            raise ValueError(f"{name!r} of {called} must be one number, got a tensor of shape {tuple(scalar.shape)}.")
        scalar = scalar.item()
    if isinstance(scalar, bool | np.bool_) or not isinstance(scalar, int | float | np.integer | np.floating):
        raise ValueError(f"{name!r} of {called} must be a number, got a {type(value).__name__}.")
    result = float_of(scalar)
    if (math.isinf(result) and not infinite) or (math.isnan(result) and not nan):
        wanted = "must not be NaN" if infinite else f"must be finite, got {result!r}"
        raise ValueError(f"{name!r} of {called} {wanted}.")
    return result


def float_of(value: Any) -> float:
    """A number as a float, infinite where it is too large."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def count(called: str, name: str, value: Any) -> int:
    """A whole number from 0 to 2**53 in the state of a parameter.

    Raises:
        ValueError: if it is something else.
    """
    whole = number(called, name, value)
    if not 0 <= whole <= COUNTABLE or whole != int(whole):
        raise ValueError(f"{name!r} of {called} must be a whole number from 0 on, got {whole:g}.")
    return int(whole)


def tensor(called: str, name: str, value: Any, param: torch.Tensor) -> torch.Tensor:
    """A state with an element for each of a parameter.

    Raises:
        ValueError: if it is something else.
    """
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"{name!r} of {called} must be a tensor, got a {type(value).__name__}.")
    if value.shape != param.shape:
        raise ValueError(
            f"{name!r} of {called} has shape {tuple(value.shape)} in the state, the parameter {tuple(param.shape)}. "
            "If the parameter has changed its shape, reset its state: opt.state.pop(p)."
        )
    if value.layout is not torch.strided or not value.is_floating_point() or not tensors.has_memory(value):
        raise ValueError(
            f"{name!r} of {called} is {tensors.name_of(value.dtype)}, {value.layout}, on {value.device}; expected "
            "floating-point numbers in memory."
        )
    return value


def entries_of(called: str, value: Any) -> Mapping[str, Any]:
    """What stands in the state for a parameter.

    Raises:
        ValueError: if it is not a dict.
    """
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ValueError(f"the state of {called} must be a dict, got a {type(value).__name__}.")
    return value


def check_whole(called: str, entries: Mapping[str, Any], names: Sequence[str]) -> None:
    """Check that nothing is missing of the state of a parameter, unless all is, or no update has been made yet.

    Args:
        called: what messages call the parameter.
        entries: what stands in the state for it.
        names: what an optimizer has put there.

    Raises:
        ValueError: if a part is missing.
    """
    missing, left = ([name for name in names if (entries.get(name) is not None) is there] for there in (False, True))
    if not missing or not left or set(names) <= _UNCOUNTED:
        return
    if "step" in left and number(called, "step", entries["step"]) == 0:
        return
    raise ValueError(
        f"{called} has no {missing[0]!r} in the state any more, only {', '.join(left)}. Put it back, or let the "
        "parameter start anew without any: opt.state.pop(p)."
    )


def check_containers(
    state: Any, present: Sequence[Mapping[str, Any]]
) -> tuple[Mapping[Any, Any], list[dict[str, Any]]]:
    """Check the form of a saved state, without what is in it.

    Args:
        state: as `torch.optim.Optimizer.state_dict` returns it.
        present: the groups of the optimizer.

    Returns:
        The state of the parameters, and the groups, copied.

    Raises:
        ValueError: if it does not fit.
    """
    if not isinstance(state, Mapping) or not {"state", "param_groups"} <= state.keys():
        raise ValueError("this is not the state of an optimizer of PyTorch: it has no 'state' and 'param_groups'.")
    entries, groups = state["state"], state["param_groups"]
    if not isinstance(entries, Mapping):
        raise ValueError(f"'state' must be a dict, got a {type(entries).__name__}.")
    if not isinstance(groups, list | tuple) or not all(isinstance(group, Mapping) for group in groups):
        raise ValueError("'param_groups' must be a list of dicts, one for each group.")
    for g, group in enumerate(groups):
        ids = group.get("params")
        if not isinstance(ids, list | tuple) or not all(isinstance(k, Hashable) for k in ids):
            raise ValueError(f"'params' of group {g} in the state must be a list with the number of each parameter.")
    counts = [[len(group["params"]) for group in each] for each in (groups, present)]
    if counts[0] != counts[1]:
        raise ValueError(
            f"the state has groups of {counts[0]} parameters, this optimizer of {counts[1]}: it has a different "
            "number of parameter groups, or one that doesn't match the size of optimizer's group."
        )
    for g, group in enumerate(groups):
        names = group.get("param_names", ())
        good = isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)
        if not good or ("param_names" in group and len(names) != len(group["params"])):
            raise ValueError(f"'param_names' of group {g} in the state must be a list with a name for each parameter.")
    return entries, [checked(f"group {g} of the state", copy.deepcopy, dict(group)) for g, group in enumerate(groups)]


def checked(called: str, make: Callable[..., Any], *args: Any) -> Any:
    """What a function makes of a part of a saved state; whatever it raises says that the part is not right.

    Args:
        called: what messages call the part.
        make: the function.
        args: its arguments.

    Raises:
        ValueError: if it fails.
    """
    try:
        return make(*args)
    except Exception as error:
        raise ValueError(f"{called} is invalid: {type(error).__name__}: {error}") from error
