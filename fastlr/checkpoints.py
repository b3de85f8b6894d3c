"""State dicts and files: what an optimizer knows, as a flat dict of arrays."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import scheduled
from .groups import Groups
from .rows import Counts
from .schedules import Schedule

if TYPE_CHECKING:
    from .optimizer import Optimizer

_FORMAT = 2
_DESCRIPTION = "fastlr"


def _key(prefix: str, path: str) -> str:
    return f"{prefix}.{path}" if path else prefix


def _describe(opt: Optimizer) -> dict[str, Any]:
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


def collect(opt: Optimizer, params: bool) -> dict[str, np.ndarray]:
    """The state of an optimizer, as copies."""
    counts = opt._rows.counts()
    description = {**_describe(opt), "steps": counts.steps, "groups": opt._hyper.export()}
    if opt.loss_scale is not None:
        description["loss_scale"] = opt.loss_scale.state_dict()
    observed = scheduled.saved(opt._hyper, opt._observed)
    if observed:
        description["observed"] = observed
    out = {
        _DESCRIPTION: np.frombuffer(json.dumps(description).encode(), np.uint8).copy(),
        "step": counts.t,
        "clock": counts.clock,
        "skipped": counts.skipped,
        **{name: counts.scalars[..., k].copy() for k, name in enumerate(opt._source.scalars)},
    }
    for name, letter in zip(description["states"], opt._columns.letters, strict=True):
        for path, leaf in zip(opt._params.paths, opt._columns.arrays[letter], strict=True):
            out[_key(name, path)] = opt._params.place.to_host(leaf)
    if params:
        for path, leaf in zip(opt._params.paths, opt._params.leaves, strict=True):
            out[_key("params", path)] = opt._params.place.to_host(leaf)
    return out


def apply(opt: Optimizer, state: Mapping[str, np.ndarray]) -> None:
    """Check a state against an optimizer, whole, and then take it over.

    Raises:
        ValueError: if it does not fit; then nothing is changed.
    """
    try:
        saved = json.loads(bytes(np.asarray(state[_DESCRIPTION], np.uint8)))
        groups = {pattern: dict(values) for pattern, values in saved["groups"].items()}
        own = groups.pop("")
        steps = int(saved["steps"])
    except (KeyError, ValueError, TypeError, AttributeError):
        raise ValueError("this is not the state of a fastlr optimizer: it has no readable description.") from None
    for what, here in _describe(opt).items():
        if saved.get(what) != here:
            raise ValueError(_difference(what, saved.get(what), here))
    shape = opt._rows.index.shape
    wanted: dict[str, tuple[tuple[int, ...], Any]] = dict.fromkeys(("step", "clock", "skipped"), (shape, np.int64))
    wanted.update(dict.fromkeys(opt._source.scalars, (shape, np.float64)))
    prefixes = list(saved["states"])
    with_params = any(_key("params", path) in state for path in opt._params.paths)
    for prefix in prefixes + ["params"] * with_params:
        for path, leaf_shape in zip(opt._params.paths, opt._params.shapes, strict=True):
            wanted[_key(prefix, path)] = (leaf_shape, opt._params.dtype)
    arrays = {}
    for key, (expected, dtype) in wanted.items():
        if key not in state:
            raise ValueError(f"the state has no {key!r}; it is incomplete.")
        arrays[key] = array = np.asarray(state[key])
        if array.shape != expected or array.dtype != dtype:
            raise ValueError(
                f"{key!r} in the state is {array.dtype} {array.shape}, expected {np.dtype(dtype)} {expected}."
            )
    frozen = own.pop("frozen")
    expected_names = set(opt._hyper.names) - {"frozen"}
    if own.keys() != expected_names:
        raise ValueError(
            f"the state is of another optimizer: it has the hyperparameters {', '.join(sorted(own))}, "
            f"this one has {', '.join(sorted(expected_names))}."
        )
    present = {pattern: group._values for pattern, group in opt._hyper.items()}
    hyper = Groups(
        as_given(own, opt._hyper.defaults._values),
        {p: as_given(v, present.get(p, {}), f"groups[{p!r}]: ") for p, v in groups.items()},
        opt._params.paths,
        opt._params.population,
        opt._spelling,
    )
    hyper.defaults.frozen = frozen if isinstance(frozen, bool) else np.array(frozen)
    if opt.loss_scale is not None and "loss_scale" in saved:
        opt.loss_scale.load_state_dict(saved["loss_scale"])

    scalars = [arrays[name] for name in opt._source.scalars]
    stacked = np.stack(scalars, axis=-1) if scalars else np.zeros((*shape, 0))
    counts = Counts(arrays["step"], arrays["clock"], arrays["skipped"], stacked, steps)
    opt._put(_hyper=hyper, _observed=scheduled.restored(hyper, saved.get("observed", {})))
    opt._take_counts(counts)
    for prefix, letter in zip(prefixes, opt._columns.letters, strict=True):
        for path, leaf in zip(opt._params.paths, opt._columns.arrays[letter], strict=True):
            opt._params.place.copy(leaf, arrays[_key(prefix, path)])
    if with_params:
        for path, leaf in zip(opt._params.paths, opt._params.leaves, strict=True):
            opt._params.place.copy(leaf, arrays[_key("params", path)])
    opt._columns.encode_shadow()


def as_given(values: Mapping[str, Any], present: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Lists and dicts from JSON as the tuples, arrays and schedules that they were.

    Args:
        values: as `Groups.export` made them.
        present: what the optimizer has now, for functions of the user's, which cannot be saved.
        where: what to put before names in messages.

    Raises:
        ValueError: if a function would be needed and is not there.
    """

    def one(label: str, value: Any, here: Any) -> Any:
        if isinstance(value, dict):
            if value["type"] is not None:
                return Schedule.from_dict(value)
            if isinstance(here, Schedule):
                return here
            raise ValueError(
                f"{label} followed {value['code']}, a function of yours, which cannot be saved. Build the optimizer "
                "with that function again, then load."
            )
        if not isinstance(value, list):
            return value
        several = isinstance(here, tuple) and len(here) == len(value)
        return tuple(one(f"{label}[{k}]", v, here[k] if several else None) for k, v in enumerate(value))

    return {name: one(f"{where}{name}", value, present.get(name)) for name, value in values.items()}


def _difference(what: str, saved: Any, here: Any) -> str:
    if what == "format":
        return f"the state has format {saved!r}, this fastlr reads format {here}."
    if what == "leaves" and isinstance(saved, dict):
        paths = [p for p in {**saved, **here} if saved.get(p) != here.get(p)]
        path = paths[0] if paths else next(iter(here))
        return (
            f"the state is of other parameters: {path!r} has shape {saved.get(path)} there and {here.get(path)} here. "
            "Build the optimizer over the same parameters, or use rebuild to go on with others."
        )
    return f"the state is of another optimizer: its {what} is {saved!r}, this one's is {here!r}."


def _safetensors() -> Any:
    try:
        import safetensors.numpy
    except ImportError:
        raise ImportError("a .safetensors file needs the package safetensors: pip install safetensors.") from None
    return safetensors.numpy


def _suffix(path: Path) -> str:
    if path.suffix not in (".npz", ".safetensors"):
        raise ValueError(f"{str(path)!r} must end in .npz or .safetensors.")
    return path.suffix


def write(state: Mapping[str, np.ndarray], path: str | os.PathLike[str]) -> None:
    """Write a state beside its place, flush it to the disk, then rename it."""
    path = Path(path)
    save = _safetensors().save if _suffix(path) == ".safetensors" else None
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(descriptor, "wb") as file:
            if save is None:
                np.savez(file, **state)  # type: ignore[arg-type]
            else:
                file.write(save(dict(state)))
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    if os.name == "posix":  # the rename itself is in the folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def read(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Read a file that `write` wrote, whole.

    Raises:
        ValueError: if it is cut short or something else.
    """
    path = Path(path)
    if _suffix(path) == ".safetensors":
        module = _safetensors()
        data = path.read_bytes()
        try:
            return dict(module.load(data))
        except Exception as error:  # safetensors' own error type has no common base
            raise ValueError(f"{str(path)!r} is cut short or not a .safetensors file: {error}.") from None
    try:
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            return {key: file[key] for key in file.files}
    except (zipfile.BadZipFile, ValueError, EOFError, OSError, AttributeError) as error:
        if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError):
            raise
        raise ValueError(f"{str(path)!r} is cut short or not a file written by fastlr: {error}.") from None
