"""State dicts and files: what an optimizer knows, as a flat dict of arrays."""

from __future__ import annotations

import bisect
import functools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from . import checks, extras, files
from .groups import Groups
from .kernels.atomic import commit
from .step import scheduled
from .step.rows import Counts

if TYPE_CHECKING:
    from .optimizer import Optimizer

__all__ = ["Snapshot", "apply", "collect", "load", "save", "snapshot"]

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


def _identity(opt: Optimizer) -> dict[str, Any]:
    """What must agree between the optimizer that wrote a state and the one that reads it."""
    return {
        "format": _FORMAT,
        "rule": opt._source.name,
        "states": [opt._states.get(s, s) for s in opt._columns.letters],
        "scalars": list(opt._source.scalars),
        "dtype": opt._params.dtype.name,
        "population": opt._params.population,
        "leaves": {path: list(shape) for path, shape in zip(opt._params.paths, opt._params.shapes, strict=True)},
    }


def _described(opt: Optimizer, params: bool) -> dict[str, Any]:
    """What an optimizer knows beside arrays, and whether the parameters are there."""
    described = {**_identity(opt), "optimizer": type(opt).__name__, "steps": opt.steps, "groups": opt._hyper.export()}
    described["params"] = params
    if opt.loss_scale is not None:
        described["loss_scale"] = opt.loss_scale.state_dict()
    observed = scheduled.saved(scheduled.places(opt._hyper), opt._observed)
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


def _counted(opt: Optimizer) -> dict[str, np.ndarray]:
    """What is counted and kept for each leaf and model; copies."""
    counts = opt._rows.counts()
    scalars = {name: counts.scalars[..., k].copy() for k, name in enumerate(opt._source.scalars)}
    return {"step": counts.t, "clock": counts.clock, "skipped": counts.skipped, **scalars}


class _Column(NamedTuple):
    """An array of the optimizer's by its key in a state."""

    key: str
    array: Any
    shape: tuple[int, ...]


def _columns(opt: Optimizer, params: bool) -> list[_Column]:
    """The states of each leaf, then the parameters."""
    prefixes = {opt._states.get(letter, letter): opt._columns.arrays[letter] for letter in opt._columns.letters}
    if params:
        prefixes["params"] = opt._params.leaves
    return [
        _Column(_key(prefix, path), leaf, shape)
        for prefix, leaves in prefixes.items()
        for path, leaf, shape in zip(opt._params.paths, leaves, opt._params.shapes, strict=True)
    ]


def collect(opt: Optimizer, params: bool) -> dict[str, np.ndarray]:
    """The state of an optimizer, as copies."""
    opt._gradients.check_given()
    arrays = {c.key: opt._params.place.download(c.array) for c in _columns(opt, params)}
    return {_DESCRIPTION: _packed(_described(opt, params)), **_counted(opt), **arrays}


def snapshot(opt: Optimizer) -> Snapshot:
    """The state of an optimizer and its parameters, as copies, with the hyperparameters as they are."""
    state = Snapshot(collect(opt, True))
    state.hyperparameters = opt._hyper.everything()
    return state


def save(opt: Optimizer, path: str | os.PathLike[str], params: bool, extra: Any) -> None:
    """Write an optimizer to a file, array by array, those on the host from where they are."""
    opt._gradients.check_given()
    described, arrays = _described(opt, params), _counted(opt)
    if extra is not None:
        packed, own = extras.pack(extra)
        described["extra"] = True
        arrays[_EXTRA] = _packed(packed)
        arrays.update({f"{_EXTRA}.{k}": array for k, array in enumerate(own)})
    columns = _columns(opt, params)
    if any(files.member_name(key) != key for key in (*arrays, *(c.key for c in columns))):
        described[_ESCAPED] = True
    to_host: Callable[[Any], np.ndarray] = np.asarray if opt._on_host else opt._params.place.to_host
    members = [
        files.Member(files.member_name(key), array.shape, array.dtype, functools.partial(np.asarray, array))
        for key, array in {_DESCRIPTION: _packed(described), **arrays}.items()
    ]
    members += [
        files.Member(files.member_name(c.key), c.shape, opt._params.dtype, functools.partial(to_host, c.array))
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


@dataclass
class _Checked:
    """A state that fits, not yet taken over.

    Attributes:
        arrays: arrays of the optimizer's, and what goes into each.
        params: those of the parameters, as they will be.
        attributes: of the optimizer, to be set.
        counts: what is counted.
        loss_scale: the scale and its good steps, or None: it stays.
    """

    arrays: list[tuple[Any, np.ndarray]]
    params: Sequence[Any]
    attributes: dict[str, Any]
    counts: Counts
    loss_scale: tuple[np.ndarray, np.ndarray] | None


def apply(opt: Optimizer, state: Mapping[str, np.ndarray], hyperparameters: bool = True) -> None:
    """Check a state against an optimizer, whole, and then take it over.

    Args:
        opt: the optimizer.
        state: as `collect` or `snapshot` made it.
        hyperparameters: take over those in the state; False: the optimizer keeps its own.

    Raises:
        TypeError: if it is no dict.
        ValueError: if it does not fit; then nothing is changed.
    """
    source = _InMemory(state)
    exact = state.hyperparameters if isinstance(state, Snapshot) else None
    _take(opt, _check(opt, source, _description(opt, source), hyperparameters, exact))


def load(opt: Optimizer, path: str | os.PathLike[str], hyperparameters: bool) -> dict[str, Any]:
    """Read a file, check it whole, and then take it over; what the caller saved with it.

    Raises:
        ValueError: if it is damaged or does not fit; then nothing is changed.
    """
    with files.reading(path) as archive:
        described = _description(opt, archive)
        checked = _check(opt, archive, described, hyperparameters, None)
        extra: dict[str, Any] = {}
        if "extra" in described or _EXTRA in archive:
            read = archive.array(_EXTRA, extras.fits)
            packed = _unpacked(read, 2 * extras.DEEPEST, "what was saved as extra is damaged.")  # a tuple is two
            extra = extras.unpack(packed, lambda k: archive.array(f"{_EXTRA}.{k}", extras.fits))
    _take(opt, checked)
    return extra


def _unpacked(array: np.ndarray, deepest: int, message: str) -> Any:
    """JSON in an array of bytes, of no more than some containers within containers."""
    try:
        value = json.loads(array.tobytes())
    except (ValueError, RecursionError):
        raise ValueError(message) from None
    if _depth(value, deepest) > deepest:
        raise ValueError(message)
    return value


def _description(opt: Optimizer, source: _Source) -> dict[str, Any]:
    """The description in a state, as far as it can be understood without an optimizer."""
    message = "this is not the state of a fastlr optimizer: it has no readable description."
    # What fits is about as long as what this optimizer would write; each model may have some numbers of its own.
    own = sum(64 + len(path) for path in opt._params.paths) + 1024 * len(opt._hyper)
    longest = (4 << 20) + 16 * own + 16_384 * opt._params.models

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
    opt: Optimizer,
    source: _Source,
    saved: Mapping[str, Any],
    hyperparameters: bool,
    exact: Mapping[str, Mapping[str, Any]] | None,
) -> _Checked:
    """Check a state against an optimizer, whole; changes nothing.

    Args:
        opt: the optimizer.
        source: where the arrays are.
        saved: the description.
        hyperparameters: whether those of the state are taken over.
        exact: the hyperparameters themselves, where they are in memory.
    """
    for what, here in _identity(opt).items():
        if saved.get(what) != here:
            raise ValueError(_difference(what, saved.get(what), here))
    name, here = saved.get("optimizer", type(opt).__name__), type(opt).__name__
    if hyperparameters and name != here:
        raise ValueError(
            f"the state is of {checks.shown(name)}, this optimizer is {here!r}, and with the hyperparameters of the "
            "one it would no longer be the other. Load with hyperparameters=False: then it keeps its own."
        )
    steps = checks.counted("steps in the state", saved.get("steps"))
    loss_scale = None
    if opt.loss_scale is not None and "loss_scale" in saved:
        loss_scale = opt.loss_scale.read(saved["loss_scale"], opt._params.population, alone=False)

    def there(key: str) -> str:
        return files.member_name(key) if saved.get(_ESCAPED) else key

    def array(key: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        def fits(found: np.dtype, its_shape: tuple[int, ...], held: int) -> None:
            if its_shape != shape or found != dtype:
                raise ValueError(f"{key!r} in the state is {found} {its_shape}, expected {np.dtype(dtype)} {shape}.")

        if there(key) not in source:
            raise ValueError(f"the state has no {key!r}; it is incomplete.")
        return source.array(there(key), fits)

    with_params = bool(saved.get("params")) or any(there(_key("params", p)) in source for p in opt._params.paths)
    arrays = [(c.array, array(c.key, c.shape, opt._params.dtype)) for c in _columns(opt, with_params)]
    counts = _counts(opt, saved, steps, array)
    hyper = _hyperparameters(opt, saved["groups"], exact) if hyperparameters else opt._hyper
    attributes = {"_hyper": hyper, "_observed": scheduled.restored(scheduled.places(hyper), saved.get("observed", {}))}
    attributes.update(_fitting(opt, attributes, counts, foreign=hyperparameters and exact is None))
    params = [a for _, a in arrays[-len(opt._params.leaves) :]] if with_params else opt._params.leaves
    return _Checked(arrays, params, attributes, counts, loss_scale)


def _counts(opt: Optimizer, saved: Mapping[str, Any], steps: int, array: Callable[..., np.ndarray]) -> Counts:
    """What is counted for each leaf and model, in the order of this optimizer's leaves."""
    shape = len(opt._params.paths), opt._params.models
    place = {path: k for k, path in enumerate(saved["leaves"])}
    order = [place[path] for path in opt._params.paths]
    counted: dict[str, np.ndarray] = {}
    for name in ("step", "clock", "skipped"):
        count = array(name, shape, np.int64)[order]
        if not ((count >= 0) & (count < 2**53)).all():
            raise ValueError(f"{name!r} in the state must be whole numbers from 0 to 2**53.")
        counted[name] = count
    scalars = np.zeros((*shape, len(opt._source.scalars)))
    for k, name in enumerate(opt._source.scalars):
        scalars[..., k] = array(name, shape, np.float64)[order]
        # What follows from gradients can be NaN after they were.
        if not np.isfinite(scalars[..., k]).all() and not opt._source.sums_anything:
            raise ValueError(f"{name!r} in the state must be finite.")
    return Counts(counted["step"], counted["clock"], counted["skipped"], scalars, steps)


def _hyperparameters(
    opt: Optimizer, groups: Mapping[str, Any], exact: Mapping[str, Mapping[str, Any]] | None
) -> Groups:
    """The hyperparameters of a state, checked as those of a user."""
    own, expected = groups[""].keys(), opt._hyper.everything()[""].keys()
    if own != expected:
        raise ValueError(
            f"the state is of another optimizer: it has the hyperparameters {checks.shown(', '.join(sorted(own)))}, "
            f"this one has {', '.join(sorted(expected))}."
        )
    try:
        values = opt._hyper.read(groups) if exact is None else exact
        return opt._hyper.with_values(values, opt._params.paths)
    except (TypeError, ValueError, ArithmeticError, RecursionError) as error:  # some quote what may be very long
        raise ValueError(f"in the hyperparameters of the state, {str(error)[:400]}") from None


def _fitting(opt: Optimizer, attributes: Mapping[str, Any], counts: Counts, foreign: bool) -> dict[str, Any]:
    """The attributes that follow from others, once it is known that the next step can be made with them.

    Args:
        opt: the optimizer.
        attributes: hyperparameters, and what plateaus remember.
        counts: what is counted.
        foreign: whether the hyperparameters come from a file, so that schedules have to fit the next step.
    """
    probe: Optimizer = object.__new__(type(opt))
    probe.__dict__.update({**opt.__dict__, **attributes, "_observed": attributes["_observed"].copy()})
    try:
        staged = probe._stage(opt._unscaled)
        if staged.states != opt._columns.letters:
            names = ", ".join(opt._states.get(s, s) for s in staged.states) or "none"
            raise ValueError(f"with the hyperparameters in the state the rule has other states than here: {names}.")
        rows = probe._make_rows(counts, opt._partition)
        follows = probe._follow(probe._hyper.uniforms(), staged, rows)
        if foreign:
            follows.fill(counts.steps, np.zeros((len(rows), len(staged.uniforms))))
        if opt._on_host:
            return probe._rows_for(counts)
        follows.formulas()
    except (TypeError, ArithmeticError, RecursionError) as error:  # of schedules
        raise ValueError(f"the hyperparameters in the state are wrong: {error}.") from None
    return {}


def _take(opt: Optimizer, checked: _Checked) -> None:
    """Take over a state that fits: on the host in one piece, which nothing can interrupt."""
    attributes = [(opt.__dict__, name, value) for name, value in checked.attributes.items()]
    if checked.loss_scale is not None:
        scale, good = checked.loss_scale
        attributes += [(opt.loss_scale.__dict__, "_scale", scale), (opt.loss_scale.__dict__, "_good", good)]
    opt._gradients.check_given()
    if opt._on_host:
        arrays = _apart(checked.arrays)
        arrays += zip(opt._columns.arrays.get("shadow", ()), opt._columns.encoded(checked.params), strict=True)
        commit([*((to, ..., source) for to, source in arrays), *attributes])
        return
    for to, source in checked.arrays:
        opt._params.place.upload(to, source)
    commit(attributes)
    if opt.loss_scale is not None:
        opt.loss_scale._put()
    opt._take_counts(checked.counts)
    opt._columns.encode_shadow()


def _apart(arrays: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Arrays and what goes into them, as copies where that stands in memory that is going to be written."""
    spans = sorted((checks.address(to), checks.address(to) + to.nbytes) for to, _ in arrays if to.nbytes)

    def own(source: np.ndarray) -> np.ndarray:
        if not source.flags.c_contiguous:
            return source.copy()
        begin = checks.address(source)
        before = bisect.bisect_left(spans, (begin + source.nbytes,)) - 1  # the last that begins before its end
        return source.copy() if before >= 0 and spans[before][1] > begin else source

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
