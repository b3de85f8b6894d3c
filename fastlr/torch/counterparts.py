"""The optimizers of fastlr as classes for PyTorch, with the signatures of their counterparts in `torch.optim`."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch

from .. import arguments
from ..optimizer import Optimizer as Native
from .engines import hyper_names
from .optimizer import IMPLEMENTATIONS, OFFERED, Optimizer

__all__ = ["counterpart"]


def counterpart(native: type[Native]) -> type[Optimizer]:
    """The class for PyTorch of a native optimizer, with the arguments of the one in `torch.optim` of the same name.

    Args:
        native: such as `fastlr.AdamW`.
    """
    name = native.__name__
    signature = _signature(native, getattr(torch.optim, name, None))

    def construct(self: Optimizer, params: Any, *args: Any, **settings: Any) -> None:
        arguments.check("argument", settings, signature.parameters)
        bound = signature.bind(params, *args, **settings).arguments
        self._set_up(bound.pop("params"), native, bound)

    construct.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY), *signature.parameters.values()]
    )
    first, _, rest = (native.__doc__ or "").partition("\n")
    described = f"{first}\n\n    For PyTorch: see `fastlr.torch.Optimizer`, and `fastlr.{name}` for the rule.\n"
    source = rest[rest.index("Source:") :].partition("\n\n")[0] if "Source:" in rest else ""
    return type(
        name,
        (Optimizer,),
        {
            "__init__": construct,
            "_counterpart": name if hasattr(torch.optim, name) else None,
            "__doc__": f"{described}\n    {source}\n    ",
            "__module__": __package__,
        },
    )


def _signature(native: type[Native], theirs: type | None) -> inspect.Signature:
    """The arguments of a native optimizer for PyTorch: those of `torch.optim` in their order, then what fastlr adds."""
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = dict(inspect.signature(theirs or native).parameters)
    options = inspect.signature(Native.__init__).parameters
    for p in (*inspect.signature(native.__init__).parameters.values(), *(options[n] for n in OFFERED)):
        if p.kind is keyword:
            parameters.setdefault(p.name, p)
    for n, default in {**IMPLEMENTATIONS, "ema_out": None}.items():
        parameters.setdefault(n, inspect.Parameter(n, keyword, default=default))
    probe = native(np.zeros(1, np.float32))  # type: ignore[call-arg]
    for n in hyper_names(probe):
        if n in parameters:
            parameters[n] = parameters[n].replace(default=getattr(probe, n))
    taken = (p for p in parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD)
    return inspect.Signature(
        sorted((p.replace(annotation=inspect.Parameter.empty) for p in taken), key=lambda p: p.kind)
    )
