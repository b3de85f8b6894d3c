"""Trees of arrays: nested dicts, lists, tuples, named tuples, dataclasses and None, and the paths of their leaves."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from .. import checks

__all__ = ["Structure", "is_container", "leaves_with_paths"]

_DEEPEST = 100  # containers in each other; copy.deepcopy takes six calls for each, of the 1,000 that Python allows


_CONTAINERS = (dict, list, tuple)  # the usual ones; `dict | list` at each call would make a type each time


def _children(node: Any) -> list[tuple[Any, Any]] | None:
    """Keys and children of a container, or None for a leaf."""
    if node is None:
        return []
    if isinstance(node, Mapping):
        return list(node.items())
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        return list(zip(node._fields, node, strict=True))
    if isinstance(node, list | tuple):
        return list(enumerate(node))
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        return [(f.name, getattr(node, f.name)) for f in dataclasses.fields(node)]
    return None


def is_container(node: Any) -> bool:
    """Whether something is part of a tree rather than a leaf."""
    return isinstance(node, _CONTAINERS) or _children(node) is not None


def _join(prefix: str, key: Any) -> str:
    return f"{prefix}.{key}" if prefix else str(key)


def leaves_with_paths(
    tree: Any, prefix: str = "", around: tuple[tuple[str, Any], ...] = ()
) -> Iterator[tuple[str, Any]]:
    """Every leaf of a tree with its path, in order.

    Args:
        tree: the tree.
        prefix: its own path.
        around: the containers that it stands in, with their paths.

    Raises:
        ValueError: if a container is in itself, or containers are nested too deep.
    """
    children = _children(tree)
    if children is None:
        yield prefix, tree
        return
    for path, container in around:
        if container is tree:
            raise ValueError(f"{checks.called(prefix)} is {checks.called(path)} itself: a tree cannot hold itself.")
    if len(around) == _DEEPEST:
        raise ValueError(f"params is nested more than {_DEEPEST} deep. Pass the arrays in fewer dicts or lists.")
    for key, child in children:
        yield from leaves_with_paths(child, _join(prefix, key), (*around, (prefix, tree)))


class Structure:
    """The shape of a tree without its leaves.

    Args:
        tree: the tree to take it from.

    Raises:
        ValueError: if two leaves have the same path.

    Attributes:
        paths: path of each leaf, in order; a tree that is one leaf has the path "".
    """

    def __init__(self, tree: Any) -> None:
        self.paths: tuple[str, ...] = tuple(path for path, _ in leaves_with_paths(tree))
        seen: set[str] = set()
        for path in self.paths:
            if path in seen:
                raise ValueError(f"params has two leaves with the path {path!r}. Rename a key: paths must be unique.")
            seen.add(path)
        counter = iter(range(len(self.paths)))
        self._node = _Node(tree, "", counter)
        self._flat_keys = self._node.flat_keys()

    def leaves(self, tree: Any, name: str = "grads") -> list[Any]:
        """The leaves of a tree of this structure, in this structure's order; None where the tree has none.

        Args:
            tree: a tree with the same containers; `None` may stand for any part of it.
            name: what the caller calls it, for errors.

        Raises:
            ValueError: if the structure differs; the message names the path.
        """
        keys = self._flat_keys
        if keys is not None and type(tree) is self._node.type and len(tree) == len(keys):  # the usual cases, fast
            if type(tree) is not dict:
                return list(tree)
            try:
                return [tree[key] for key in keys]
            except KeyError:
                pass
        out: list[Any] = []
        self._node.take(tree, out, name)
        return out

    def build(self, leaves: Iterable[Any]) -> Any:
        """A tree of this structure with other leaves."""
        return self._node.build(list(leaves))

    def below(self, path: str) -> Structure:
        """The part of the structure that stands below a path.

        Raises:
            KeyError: if no container stands there.
        """
        node = self._node.find(path)
        if node is None or node.keys is None:
            raise KeyError(path)
        return Structure(node.build([_LEAF] * len(self.paths)))


_LEAF = object()


class _Node:
    """One container or leaf."""

    def __init__(self, tree: Any, path: str, counter: Iterator[int]) -> None:
        self.path = path
        self.type = type(tree)
        children = _children(tree)
        self.none = tree is None
        self.keys = None if children is None else [key for key, _ in children]
        self.index = next(counter) if children is None else -1
        self.children = [_Node(child, _join(path, key), counter) for key, child in children or ()]

    def make(self, parts: dict[Any, Any]) -> Any:
        """A container like this one with other children."""
        if issubclass(self.type, Mapping):
            return parts
        if issubclass(self.type, tuple) and hasattr(self.type, "_fields"):
            return self.type(**parts)
        if issubclass(self.type, list):
            return list(parts.values())
        if issubclass(self.type, tuple):
            return tuple(parts.values())
        made = object.__new__(self.type)  # a dataclass; frozen or not
        for key, part in parts.items():
            object.__setattr__(made, key, part)
        return made

    def flat_keys(self) -> list[Any] | None:
        """The keys, if this is a dict, list or tuple of leaves."""
        flat = self.type in (dict, list, tuple) and all(child.keys is None for child in self.children)
        return self.keys if flat else None

    def take(self, tree: Any, out: list[Any], name: str) -> None:
        if self.keys is None:
            out.append(tree)
            return
        if tree is None:
            out.extend([None] * self._size())
            return
        given = _children(tree)
        where = checks.called(self.path, name)
        if given is None:
            raise ValueError(
                f"{where} is a {type(tree).__name__}, expected a {self._kind()} with {self._described()}. "
                "Pass the same structure as params."
            )
        parts = dict(given)
        if parts.keys() != set(self.keys):
            missing = [str(k) for k in self.keys if k not in parts]
            extra = [str(k) for k in parts if k not in self.keys]
            problem = "; ".join(
                f"{word} {', '.join(keys)}" for word, keys in (("missing", missing), ("unexpected", extra)) if keys
            )
            advice = "Pass one gradient per parameter."
            if name != "grads":
                advice = "Pass the same structure as params."
            elif missing:
                advice += " Where there is none, even with only=, pass None in its place."
            raise ValueError(f"{where} does not have the structure of params: {problem}. {advice}")
        for key, child in zip(self.keys, self.children, strict=True):
            child.take(parts[key], out, name)

    def build(self, leaves: list[Any]) -> Any:
        if self.keys is None:
            return leaves[self.index]
        if self.none:
            return None
        return self.make({key: child.build(leaves) for key, child in zip(self.keys, self.children, strict=True)})

    def find(self, path: str) -> _Node | None:
        if self.path == path:
            return self
        for child in self.children:
            if child.path == path or path.startswith(child.path + "."):
                return child.find(path)
        return None

    def _size(self) -> int:
        return 1 if self.keys is None else sum(child._size() for child in self.children)

    def _kind(self) -> str:
        return self.type.__name__

    def _described(self) -> str:
        keys = self.keys or []
        return ", ".join(map(str, keys[:5])) + (", ..." if len(keys) > 5 else "") if keys else "nothing in it"
