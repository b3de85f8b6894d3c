"""Optimizers for PyTorch: every rule of fastlr as a `torch.optim.Optimizer`, on the CPU and on NVIDIA GPUs.

`fastlr.torch.AdamW(model.parameters(), lr=3e-4)` takes the arguments of `torch.optim.AdamW`, and options of its own;
`Optimizer` takes a rule of the user's; `HostOptimizer` keeps masters and state of a large model on the host.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

try:
    import torch as _torch
except ImportError:
    raise ImportError("fastlr.torch needs PyTorch: pip install torch, or see pytorch.org for your system.") from None
if not hasattr(_torch.Tensor, "__dlpack_c_exchange_api__"):
    raise ImportError(
        f"fastlr.torch needs PyTorch 2.10 or later, this is {_torch.__version__}: pip install --upgrade torch, or see "
        "pytorch.org for your system."
    )

from .. import optimizers as _optimizers
from .counterparts import counterpart
from .host import HostOptimizer
from .optimizer import Optimizer

__all__ = ["HostOptimizer", "Optimizer", *_optimizers.__all__]

globals().update({name: counterpart(getattr(_optimizers, name)) for name in _optimizers.__all__})

if TYPE_CHECKING:

    def __getattr__(name: str) -> type[Optimizer]: ...
