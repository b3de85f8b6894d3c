"""Hyperparameters: defaults, what groups of leaves override, and the table that a step reads."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any

import numpy as np

from . import arguments, checks
from .exclusive import Users, enter
from .hyperparameters import Hyper, follows
from .schedules import Schedule

__all__ = ["Group", "Groups", "everywhere", "plain", "somewhere"]


def everywhere(value: Any) -> bool:
    """Whether a hyperparameter is on, that is not 0, in all models; one that follows a schedule counts as on."""
    return isinstance(value, Schedule) or bool(np.all(value))


def somewhere(value: Any) -> bool:
    """Whether a hyperparameter is on, that is not 0, in some model; one that follows a schedule counts as on."""
    return isinstance(value, Schedule) or bool(np.any(value))


def matching(name: str, pattern: str, paths: Sequence[str]) -> list[str]:
    """The path that a pattern is, or else the paths that match it.

    Raises:
        ValueError: if none does.
    """
    if pattern in paths:  # then brackets in it do not mean a set of characters
        return [pattern]
    matched = [p for p in paths if fnmatchcase(p, pattern)]
    if not matched:
        shown = ", ".join(difflib.get_close_matches(pattern, paths, n=3) or paths[:5])
        more = ", ..." if len(paths) > 5 else ""
        hint = " In a pattern [[] stands for a bracket." if "[" in pattern else ""
        raise ValueError(
            f"{name}: the pattern {checks.shown(pattern)} matches no parameter. There are {shown}{more}.{hint}"
        )
    return matched


def plain(value: Any) -> Any:
    """A hyperparameter as JSON: numbers, lists, and dicts for schedules; for a function of the user's, its name."""
    if isinstance(value, Schedule):
        try:
            return value.to_dict()
        except TypeError:  # a function of the user's, or with one in it
            return {"type": None, "code": checks.shown(value)}
    if isinstance(value, tuple):
        return [plain(v) for v in value]
    return value.tolist() if isinstance(value, np.ndarray) else value


def from_plain(label: str, value: Any, like: Any, fallback: Any = None) -> Any:
    """What `plain` made, in the form in which a user would give it; it is not checked here.

    Args:
        label: what it is called in messages.
        value: as JSON has it.
        like: a value of the right kind: a tuple for pairs, anything else for one value.
        fallback: a function of the user's, in the place of one that was not saved.

    Raises:
        ValueError: if it cannot stand for a value of this kind, or is a function that was not saved.
    """
    if isinstance(value, dict):
        if value.get("type") is not None:
            return Schedule.from_dict(value)
        if isinstance(fallback, Schedule):
            return fallback
        raise ValueError(
            f"{label} followed {str(value.get('code'))[:100]}, a function of yours, which cannot be saved. Build "
            "the optimizer with that function and load with hyperparameters=False: then it keeps its own."
        )
    if not isinstance(value, list):
        return value
    if isinstance(like, tuple):
        parts = fallback if isinstance(fallback, tuple) and len(fallback) == len(value) else (None,) * len(value)
        return tuple(from_plain(f"{label}[{k}]", v, None, f) for k, (v, f) in enumerate(zip(value, parts, strict=True)))
    if value and all(isinstance(v, bool) for v in value):
        return np.array(value)
    try:
        return checks.reals(label, value)
    except TypeError as error:
        raise ValueError(str(error)) from None


def _label(pattern: str, name: str) -> str:
    """What a hyperparameter of a group is called in messages; of the optimizer itself if the pattern is empty."""
    return f"groups[{pattern!r}]: {name}" if pattern else name


class Group:
    """The hyperparameters of the leaves that match a pattern; read and set as attributes, between any two steps.

    Reading what the group does not override gives the optimizer's own value.

    Attributes:
        pattern: the path or `fnmatch` pattern, or "" for the optimizer's own values.
        paths: the leaves that match it.
    """

    pattern: str
    paths: tuple[str, ...]
    overrides: dict[str, Any]
    owner: Groups

    def __init__(self, owner: Groups, pattern: str, paths: Sequence[str]) -> None:
        vars(self).update(owner=owner, overrides={}, pattern=pattern, paths=tuple(paths))

    def __getattr__(self, name: str) -> Any:
        """A hyperparameter."""
        owner = self.owner.current()
        for values in (owner.like(self).overrides, owner.defaults.overrides):
            if name in values:
                return values[name]
        raise AttributeError(f"group {self.pattern!r} has no {name!r}; it has {', '.join(owner.names)}")

    def __setattr__(self, name: str, value: Any) -> None:
        """Set a hyperparameter; the next step uses it."""
        self.owner.set(self, name, value)

    def __repr__(self) -> str:
        """The pattern and what it overrides."""
        try:
            now = self.owner.current().like(self)
        except RuntimeError:
            return f"Group({self.pattern!r}: no longer there)"
        values = ", ".join(f"{k}={v!r}" for k, v in now.overrides.items())
        return f"Group({self.pattern!r}: {values or 'nothing overridden'})"


class Groups(Mapping[str, Group]):
    """The groups of an optimizer by pattern, in order; later ones win.

    Args:
        values: the optimizer's own hyperparameters, already checked; their names are those that exist.
        overrides: pattern to hyperparameters.
        paths: the leaves.
        population: number of models, or None.
        table: every hyperparameter by its name, more of them than exist here perhaps.

    Attributes:
        table: as given.
        names: the hyperparameters that exist.
        version: grows whenever one is set.
        listener: called after one was set.
        users: the optimizer's, see `exclusive`.
        examine: a weak reference to what refuses values that do not fit the optimizer, as
            `examine(label, hyperparameter, value, several)`; see `Stepper.examine`.
        successor: the groups that have replaced these in the optimizer, or None.
        configuration: for each leaf, the index of its configuration: leaves that match the same patterns share one.

    Raises:
        TypeError: if a hyperparameter is unknown or of the wrong kind.
        ValueError: if a value is outside its range, or a pattern matches nothing.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        overrides: Mapping[str, Mapping[str, Any]] | None,
        paths: Sequence[str],
        population: int | None,
        table: Mapping[str, Hyper[Any]],
    ) -> None:
        self._population = population
        self.table = table
        self.version = 0
        self._set_in: dict[str, int] = {}  # the version in which each was set last
        self.users: Users = {}
        self.successor: Groups | None = None
        self.listener: Callable[[], None] | None = None
        self.examine: Callable[[], Callable[[str, Hyper[Any], Any, bool | None], None] | None] | None = None
        self.names = (*values, "frozen")
        self.defaults = Group(self, "", paths)
        self.defaults.overrides.update(values, frozen=False)
        self._groups: dict[str, Group] = {}
        if overrides is not None and not isinstance(overrides, Mapping):
            raise TypeError(f"groups must be a dict of pattern: hyperparameters, got {checks.shown(overrides)}.")
        for pattern, override in (overrides or {}).items():
            if not isinstance(pattern, str) or not pattern:
                raise ValueError(f'groups: a pattern must be a string such as "*.bias" or "*", got {pattern!r}.')
            matched = matching("groups", pattern, paths)
            if not isinstance(override, Mapping):
                raise TypeError(f"groups[{pattern!r}] must be a dict of hyperparameters, got {checks.shown(override)}.")
            group = self._groups[pattern] = Group(self, pattern, matched)
            for name, value in override.items():
                self.set(group, name, value)
        members = {p: set(g.paths) for p, g in self._groups.items()}
        matches = [tuple(p for p, m in members.items() if path in m) for path in paths]
        self._configurations = list(dict.fromkeys(matches))
        index = {c: k for k, c in enumerate(self._configurations)}
        self.configuration = np.array([index[m] for m in matches], np.int64)

    def __getitem__(self, pattern: str) -> Group:
        """The group of a pattern."""
        try:
            return self._groups[pattern]
        except KeyError:
            raise KeyError(checks.shown(pattern)) from None

    def __iter__(self) -> Iterator[str]:
        """The patterns."""
        return iter(self._groups)

    def __len__(self) -> int:
        """Number of patterns."""
        return len(self._groups)

    def __repr__(self) -> str:
        """What the optimizer's own group and each other one sets."""
        return f"Groups({', '.join(map(repr, (self.defaults, *self._groups.values())))})"

    def current(self) -> Groups:
        """The groups that the optimizer has now: loading, restoring and rebuilding replace them."""
        now = self
        while now.successor is not None:
            now = now.successor
        return now

    def like(self, group: Group) -> Group:
        """The group here that has the pattern of another one.

        Raises:
            RuntimeError: if there is none.
        """
        if group.owner is self:
            return group
        if group.pattern not in {"", *self._groups}:
            raise RuntimeError(f"there is no group {group.pattern!r} any more: what was loaded has other groups.")
        return self._groups[group.pattern] if group.pattern else self.defaults

    def set(self, group: Group, name: str, value: Any, alone: bool = True) -> None:
        """Check and set one hyperparameter of a group; what is refused leaves the old value.

        Args:
            group: the group.
            name: of the hyperparameter.
            value: what the user gave.
            alone: whether it must fit the others as they are now; False: the next step checks whether they all fit.
        """
        token = enter(self.users)  # noqa: F841  (a frame that holds it is what shows that the call is in)
        try:
            now = self.current()
            now.enter_value(now.like(group), name, value, alone)
        finally:
            self.users.clear()

    def enter_value(self, group: Group, name: str, value: Any, alone: bool = True) -> None:
        """As `set`, for a caller who keeps others out: a user's number can do anything while it is read."""
        arguments.check(_label(group.pattern, "hyperparameter"), [name], self.names)
        hyper, label, before = self.table[name], _label(group.pattern, name), group.overrides
        normal = hyper.normal(label, value, self._population)
        several = any(name in other.overrides for other in self._groups.values())
        try:
            self.touch(name)  # first: an interrupt in between must not leave a value that nobody takes over
            vars(group)["overrides"] = {**before, name: normal}
            examine = self.examine() if self.examine is not None else None
            if examine is not None and (alone or follows(normal)):
                examine(label, hyper, normal, several if alone else None)
            if self.listener is not None:
                self.listener()
        except BaseException:
            vars(group)["overrides"] = before
            raise

    def touch(self, name: str) -> None:
        """Let the next step take over a hyperparameter again."""
        self._set_in[name] = self.version + 1
        self.version += 1

    def changed_since(self, version: int) -> frozenset[str]:
        """The hyperparameters that were set after a version."""
        return frozenset(name for name, when in self._set_in.items() if when > version)

    def schedules(self) -> Iterator[tuple[str, Schedule]]:
        """The schedules among the values that were set, each with what it is for."""
        for group in (self.defaults, *self._groups.values()):
            for name, value in group.overrides.items():
                for k, part in enumerate(value if isinstance(value, tuple) else [value]):
                    if isinstance(part, Schedule):
                        yield _label(group.pattern, f"{name}[{k}]" if isinstance(value, tuple) else name), part

    def uniforms(self) -> list[dict[str, Any]]:
        """For each configuration, the values under the rule's names; what is None has no limit."""
        out = []
        for configuration in self._configurations:
            values = dict(self.defaults.overrides)
            for pattern in configuration:
                values.update(self._groups[pattern].overrides)
            parts = {n: v for k, value in values.items() for n, v in self.table[k].by_part(value)}
            out.append({n: math.inf if v is None else v for n, v in parts.items()})
        return out

    @property
    def lr(self) -> Mapping[str, Any]:
        """The learning rate of the optimizer, under "", and of each group; None if the rule has none."""
        own = self.defaults.overrides.get("lr")
        return MappingProxyType({"": own, **{p: g.overrides.get("lr", own) for p, g in self._groups.items()}})

    def everything(self) -> dict[str, dict[str, Any]]:
        """What each group sets; `""` stands for the optimizer."""
        return {p: dict(g.overrides) for p, g in {"": self.defaults, **self._groups}.items()}

    def export(self) -> dict[str, dict[str, Any]]:
        """What each group sets, as plain numbers, lists and dicts; `""` stands for the optimizer."""
        return {p: {k: plain(v) for k, v in values.items()} for p, values in self.everything().items()}

    def read(self, exported: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
        """What `export` returned, as `everything` has it; not checked yet.

        Raises:
            ValueError: if something in it cannot be a hyperparameter.
        """
        kinds = self.defaults.overrides
        return {
            pattern: {name: from_plain(_label(pattern, name), value, kinds.get(name)) for name, value in values.items()}
            for pattern, values in exported.items()
        }

    def with_values(self, values: Mapping[str, Mapping[str, Any]], paths: Sequence[str]) -> Groups:
        """Groups of the same optimizer with other values, checked as those of a user.

        Args:
            values: as `everything` has them.
            paths: the leaves.

        Raises:
            TypeError: if a hyperparameter is unknown or of the wrong kind.
            ValueError: if a value is outside its range, or a pattern matches nothing.
        """
        own = {name: value for name, value in self.defaults.overrides.items() if name != "frozen"}
        overrides = {pattern: override for pattern, override in values.items() if pattern}
        new = Groups(own, overrides, paths, self._population, self.table)
        for name, value in values[""].items():
            new.set(new.defaults, name, value)
        new.users, new.examine = self.users, self.examine
        return new
