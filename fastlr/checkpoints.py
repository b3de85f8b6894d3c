"""State dicts and files: what an optimizer knows, as a flat dict of arrays."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from . import checks, extras, files
from .arrays.spans import Spans
from .groups import Groups
from .kernels.atomic import commit
from .state import OptimizerState
from .step import scheduled
from .step.rows import Counts

__all__ = ["Saved", "Snapshot", "check", "collect", "read", "save", "snapshot", "upload", "writes"]

_FORMAT = 2
_DESCRIPTION = "fastlr"
_DEEPEST = 100  # containers within containers in a description: more than any schedule that somebody wrote
_EXTRA = "fastlr.extra"  # no state of a rule: their names have no dots
_ESCAPED = "escaped"  # in the description of a file: whether names stand there as `files.member_name` has them


class Snapshot(dict[str, np.ndarray]):
    """A state in memory, which knows the hyperparameters themselves, functions of the user's among them."""

    hyperparameters: Mapping[str, Mapping[str, Any]]


def _key(prefix: str, path: str) -> str:
    return f"{prefix}.{path}" if path else prefix


def _identity(current: OptimizerState) -> dict[str, Any]:
    """What must agree between the optimizer that wrote a state and the one that reads it."""
    return {
        "format": _FORMAT,
        "rule": current.options.rule.name,
        "states": [current.options.public_name(s) for s in current.columns.letters],
        "scalars": list(current.options.rule.scalars),
        "dtype": current.parameters.dtype.name,
        "population": current.parameters.population,
        "leaves": {
            path: list(shape) for path, shape in zip(current.parameters.paths, current.parameters.shapes, strict=True)
        },
    }


def _described(current: OptimizerState, params: bool) -> dict[str, Any]:
    """What an optimizer knows besides arrays, and whether the parameters are there."""
    described = {
        **_identity(current),
        "optimizer": current.options.optimizer,
        "steps": current.rows.steps,
        "groups": current.groups.export(),
    }
    described["params"] = params
    if current.loss_scale is not None:
        described["loss_scale"] = current.loss_scale.state_dict()
    observed = scheduled.saved(scheduled.labelled_plateaus(current.groups), current.observed)
    if observed:
        described["observed"] = observed
    if _depth(described, _DEEPEST) > _DEEPEST:
        raise ValueError(f"a schedule is nested more than {_DEEPEST} deep, which cannot be saved.")
    return described


def _depth(value: Any, most: int) -> int:
    """How many containers stand within one another, up to one more than are allowed."""
    depth, level = 0, [value]
    while depth <= most:
        level = [v for x in level if isinstance(x, dict | list) for v in (x.values() if isinstance(x, dict) else x)]
        if not level:
            break
        depth += 1
    return depth


def _packed(value: Any) -> np.ndarray:
    return np.frombuffer(json.dumps(value).encode(), np.uint8).copy()


def _counted(current: OptimizerState) -> dict[str, np.ndarray]:
    """What is counted and kept for each leaf and model; copies."""
    counts = current.rows.counts()
    scalars = {name: counts.scalars[..., k].copy() for k, name in enumerate(current.options.rule.scalars)}
    return {"step": counts.t, "clock": counts.clock, "skipped": counts.skipped, **scalars}


class _Column(NamedTuple):
    """An array of the optimizer's by its key in a state."""

    key: str
    array: Any
    shape: tuple[int, ...]


def _columns(current: OptimizerState, params: bool) -> list[_Column]:
    """The states of each leaf, then the parameters."""
    prefixes = {
        current.options.public_name(letter): current.columns.arrays[letter] for letter in current.columns.letters
    }
    if params:
        prefixes["params"] = current.parameters.leaves
    return [
        _Column(_key(prefix, path), leaf, shape)
        for prefix, leaves in prefixes.items()
        for path, leaf, shape in zip(current.parameters.paths, leaves, current.parameters.shapes, strict=True)
    ]


def collect(current: OptimizerState, params: bool) -> dict[str, np.ndarray]:
    """The state of an optimizer, as copies."""
    current.gradients.check_given()
    arrays = {c.key: current.parameters.place.download(c.array) for c in _columns(current, params)}
    return {_DESCRIPTION: _packed(_described(current, params)), **_counted(current), **arrays}


def snapshot(current: OptimizerState) -> Snapshot:
    """The state of an optimizer and its parameters, as copies, with the hyperparameters as they are."""
    state = Snapshot(collect(current, True))
    state.hyperparameters = current.groups.everything()
    return state


def save(current: OptimizerState, path: str | os.PathLike[str], params: bool, extra: Any) -> None:
    """Write an optimizer to a file, array by array, those on the host from where they are."""
    current.gradients.check_given()
    described, arrays = _described(current, params), _counted(current)
    if extra is not None:
        packed, own = extras.pack(extra)
        described["extra"] = True
        arrays[_EXTRA] = _packed(packed)
        arrays.update({f"{_EXTRA}.{k}": array for k, array in enumerate(own)})
    columns = _columns(current, params)
    if any(files.member_name(key) != key for key in (*arrays, *(c.key for c in columns))):
        described[_ESCAPED] = True
    to_host: Callable[[Any], np.ndarray] = (
        np.asarray if not current.backend.on_device else current.parameters.place.download
    )
    members = [
        files.Member(files.member_name(key), array.shape, array.dtype, functools.partial(np.asarray, array))
        for key, array in {_DESCRIPTION: _packed(described), **arrays}.items()
    ]
    members += [
        files.Member(files.member_name(c.key), c.shape, current.parameters.dtype, functools.partial(to_host, c.array))
        for c in columns
    ]
    files.write(members, path)


# Taking over a state


class _Source(Protocol):
    """Where the arrays of a state come from."""

    def __contains__(self, name: str) -> bool: ...

    def array(self, name: str, fits: files.Fits) -> np.ndarray: ...


class _InMemory:
    """A state dict of the caller's, in which anything may stand."""

    def __init__(self, state: Any) -> None:
        if not isinstance(state, Mapping):
            raise TypeError(f"state must be a dict as state_dict returns it, got a {type(state).__name__}.")
        self._state = state

    def __contains__(self, name: str) -> bool:
        return name in self._state

    def array(self, name: str, fits: files.Fits) -> np.ndarray:
        try:
            array = np.asarray(self._state[name])
        except Exception as error:  # whatever an array of another library raises
            raise ValueError(f"{name!r} in the state cannot be read: {error}.") from None
        fits(array.dtype, array.shape, array.nbytes)
        return array


@dataclass(frozen=True)
class Saved:
    """A state that fits an optimizer, not yet taken over.

    Attributes:
        description: what it says of itself.
        arrays: arrays of the optimizer's, and what goes into each.
        params: those of the parameters, as they will be.
        groups: the hyperparameters.
        observed: what plateaus remember.
        counts: what is counted.
        loss_scale: the scale and its good steps, or None: it stays.
        from_file: whether the hyperparameters come from a file, so that schedules have to fit the next step.
    """

    description: Mapping[str, Any]
    arrays: list[tuple[Any, np.ndarray]]
    params: Sequence[Any]
    groups: Groups
    observed: scheduled.Remembered
    counts: Counts
    loss_scale: tuple[np.ndarray, np.ndarray] | None
    from_file: bool


def check(current: OptimizerState, state: Mapping[str, np.ndarray], hyperparameters: bool = True) -> Saved:
    """Check a state against that of an optimizer, whole; changes nothing.

    Args:
        current: that of the optimizer.
        state: as `collect` or `snapshot` made it.
        hyperparameters: take over those in the state; False: the optimizer keeps its own.

    Raises:
        TypeError: if it is no dict.
        ValueError: if it does not fit.
    """
    exact = state.hyperparameters if isinstance(state, Snapshot) else None
    return _check(current, _InMemory(state), hyperparameters, exact)


def read(current: OptimizerState, path: str | os.PathLike[str], hyperparameters: bool) -> tuple[Saved, dict[str, Any]]:
    """Read a file and check it whole.

    Args:
        current: the state of the optimizer.
        path: of the file.
        hyperparameters: take over those in the file; False: the optimizer keeps its own.

    Returns:
        The state, and what the caller saved with it.

    Raises:
        ValueError: if it is damaged or does not fit.
    """
    with files.reading(path) as archive:
        saved = _check(current, archive, hyperparameters, None)
        extra: dict[str, Any] = {}
        if "extra" in saved.description or _EXTRA in archive:
            packed = archive.array(_EXTRA, extras.fits)
            content = _unpacked(packed, 2 * extras.DEEPEST, "what was saved as extra is damaged.")  # a tuple is two
            extra = extras.unpack(content, lambda k: archive.array(f"{_EXTRA}.{k}", extras.fits))
    return saved, extra


def _unpacked(array: np.ndarray, deepest: int, message: str) -> Any:
    """JSON in an array of bytes, of no more than some containers within containers."""
    try:
        value = json.loads(array.tobytes())
    except (ValueError, RecursionError):
        raise ValueError(message) from None
    if _depth(value, deepest) > deepest:
        raise ValueError(message)
    return value


def _description(current: OptimizerState, source: _Source) -> dict[str, Any]:
    """The description in a state, as far as it can be understood without an optimizer."""
    message = "this is not the state of a fastlr optimizer: it has no readable description."
    # What fits is about as long as what this optimizer would write; each model may have some numbers of its own.
    own = sum(64 + len(path) for path in current.parameters.paths) + 1024 * len(current.groups)
    longest = (4 << 20) + 16 * own + 16_384 * current.parameters.models

    def fits(dtype: np.dtype, shape: tuple[int, ...], held: int) -> None:
        if dtype != np.uint8 or len(shape) != 1 or shape[0] > longest:
            raise ValueError(message)

    if _DESCRIPTION not in source:
        raise ValueError(message)
    saved = _unpacked(source.array(_DESCRIPTION, fits), _DEEPEST, message)
    groups = saved.get("groups") if isinstance(saved, dict) else None
    if not isinstance(groups, dict) or "" not in groups or not all(isinstance(g, dict) for g in groups.values()):
        raise ValueError(message)
    return saved  # type: ignore[no-any-return]


def _check(
    current: OptimizerState,
    source: _Source,
    hyperparameters: bool,
    exact: Mapping[str, Mapping[str, Any]] | None,
) -> Saved:
    """Check a state against that of an optimizer, whole; changes nothing.

    Args:
        current: that of the optimizer.
        source: where the arrays are.
        hyperparameters: whether those of the state are taken over.
        exact: the hyperparameters themselves, where they are in memory.
    """
    saved = _description(current, source)
    for what, here in _identity(current).items():
        if saved.get(what) != here:
            raise ValueError(_difference(what, saved.get(what), here))
    name, here = saved.get("optimizer", current.options.optimizer), current.options.optimizer
    if hyperparameters and name != here:
        raise ValueError(
            f"the state is of {checks.shown(name)}, but this optimizer is {here!r}, and other hyperparameters would "
            "make it a different optimizer. Load with hyperparameters=False: then it keeps its own."
        )
    steps = checks.counted("steps in the state", saved.get("steps"))
    loss_scale = None
    if current.loss_scale is not None and "loss_scale" in saved:
        loss_scale = current.loss_scale.read(saved["loss_scale"], current.parameters.population, alone=False)

    def name_of(key: str) -> str:
        return files.member_name(key) if saved.get(_ESCAPED) else key

    def array(key: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        def fits(saved_dtype: np.dtype, saved_shape: tuple[int, ...], held: int) -> None:
            if saved_shape != shape or saved_dtype != dtype:
                expected = f"{np.dtype(dtype)} {shape}"
                raise ValueError(f"{key!r} in the state is {saved_dtype} {saved_shape}, expected {expected}.")

        if name_of(key) not in source:
            raise ValueError(f"the state has no {key!r}; it is incomplete.")
        return source.array(name_of(key), fits)

    with_params = bool(saved.get("params")) or any(
        name_of(_key("params", p)) in source for p in current.parameters.paths
    )
    arrays = [(c.array, array(c.key, c.shape, current.parameters.dtype)) for c in _columns(current, with_params)]
    counts = _counts(current, saved, steps, array)
    groups = _hyperparameters(current, saved["groups"], exact) if hyperparameters else current.groups
    observed = scheduled.restored(scheduled.labelled_plateaus(groups), saved.get("observed", {}))
    params = [a for _, a in arrays[-len(current.parameters.leaves) :]] if with_params else current.parameters.leaves
    from_file = hyperparameters and exact is None
    return Saved(saved, arrays, params, groups, observed, counts, loss_scale, from_file)


def _counts(current: OptimizerState, saved: Mapping[str, Any], steps: int, array: Callable[..., np.ndarray]) -> Counts:
    """What is counted for each leaf and model, in the order of this optimizer's leaves."""
    shape = len(current.parameters.paths), current.parameters.models
    index = {path: k for k, path in enumerate(saved["leaves"])}
    order = [index[path] for path in current.parameters.paths]
    counted: dict[str, np.ndarray] = {}
    for name in ("step", "clock", "skipped"):
        count = array(name, shape, np.int64)[order]
        if not ((count >= 0) & (count < 2**53)).all():
            raise ValueError(f"{name!r} in the state must be whole numbers from 0 to 2**53.")
        counted[name] = count
    scalars = np.zeros((*shape, len(current.options.rule.scalars)))
    for k, name in enumerate(current.options.rule.scalars):
        scalars[..., k] = array(name, shape, np.float64)[order]
        if np.isnan(scalars[..., k]).any() and not current.options.scalars_can_be_nan:
            raise ValueError(f"{name!r} in the state must not be NaN.")
    return Counts(counted["step"], counted["clock"], counted["skipped"], scalars, steps)


def _hyperparameters(
    current: OptimizerState, groups: Mapping[str, Any], exact: Mapping[str, Mapping[str, Any]] | None
) -> Groups:
    """The hyperparameters of a state, checked as those of a user."""
    own, expected = groups[""].keys(), current.groups.everything()[""].keys()
    if own != expected:
        raise ValueError(
            f"the state is of another optimizer: it has the hyperparameters {checks.shown(', '.join(sorted(own)))}, "
            f"this one has {', '.join(sorted(expected))}."
        )
    try:
        values = current.groups.read(groups) if exact is None else exact
        return current.groups.with_values(values, current.parameters.paths)
    except (TypeError, ValueError, ArithmeticError, RecursionError) as error:  # some quote what may be very long
        raise ValueError(f"in the hyperparameters of the state, {str(error)[:400]}") from None


def writes(current: OptimizerState, saved: Saved) -> list[tuple[Any, Any, Any]]:
    """What to write to take over a state on the host, see `atomic.commit`; the counters are in new rows."""
    arrays = _apart(saved.arrays)
    arrays += current.columns.shadow_of(saved.params)
    attributes: list[tuple[Any, Any, Any]] = []
    if saved.loss_scale is not None and current.loss_scale is not None:
        attributes = current.loss_scale.writes(*saved.loss_scale)
    return [*((to, ..., source) for to, source in arrays), *attributes]


def upload(current: OptimizerState, saved: Saved) -> None:
    """Take over the arrays and the loss scale of a state on a GPU."""
    for to, source in saved.arrays:
        current.parameters.place.upload(to, source)
    if saved.loss_scale is not None and current.loss_scale is not None:
        commit(current.loss_scale.writes(*saved.loss_scale))
        current.loss_scale.upload()
    current.columns.encode_shadow()


def _apart(arrays: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Arrays and what goes into them, as copies where that stands in memory that is going to be written."""
    written = Spans((checks.address(to), to.nbytes) for to, _ in arrays)

    def own(source: np.ndarray) -> np.ndarray:
        apart = source.flags.c_contiguous and not written.overlaps(checks.address(source), source.nbytes)
        return source if apart else source.copy()

    return [(to, own(source)) for to, source in arrays]


def _difference(what: str, saved: Any, here: Any) -> str:
    if what == "format":
        return f"the state has format {checks.shown(saved)}, this fastlr reads format {here}."
    if what == "leaves" and isinstance(saved, dict):
        path = next(p for p in {**saved, **here} if p not in saved or p not in here or saved[p] != here[p])
        return (
            f"the state is of other parameters: {checks.shown(path)} has shape {checks.shown(saved.get(path))} there "
            f"and {here.get(path)} here. Build the optimizer over the same parameters, or use rebuild to go on with "
            "others."
        )
    return f"the state is of another optimizer: its {what} is {checks.shown(saved)}, this one's is {here!r}."
