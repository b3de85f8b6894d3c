"""What the reference shows of a class whose arguments come from a table: those that Python itself tells."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import griffe


class FromTables(griffe.Extension):
    """Put the docstring and the arguments of `Optimizer`, as they are at run time, in place of what the source says."""

    def on_class_members(self, *, cls: griffe.Class, **unused: Any) -> None:
        """Look at a class once its methods are known."""
        if cls.docstring is None or "{options}" not in cls.docstring.value:
            return
        thing = getattr(importlib.import_module(cls.module.path), cls.name)
        cls.docstring.value = inspect.getdoc(thing) or ""
        kinds = {kind.value: kind for kind in griffe.ParameterKind}
        cls.members["__init__"].parameters = griffe.Parameters(
            *(
                griffe.Parameter(
                    p.name,
                    kind=kinds[p.kind.description],
                    default=None if p.default is p.empty else repr(p.default),
                )
                for p in inspect.signature(thing.__init__).parameters.values()
            )
        )
