"""Masters and state on the host: parameters in low precision, on the CPU or on a GPU that has no room for more."""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .. import checks
from ..arrays.buffers import FlatBuffer, flatten
from ..arrays.columns import EMA, SHADOW
from ..arrays.places import HOST, Alloc
from ..kernels.staging import Rule
from ..optimizer import Optimizer as Native
from ..optimizers import AdamW
from ..step.gradients import Located
from ..step.info import StepInfo
from . import states, tensors
from .engines import Engine, Leaf, Shown
from .optimizer import Optimizer
from .recipes import Recipe

__all__ = ["HostOptimizer"]


class HostOptimizer(Optimizer):
    """Any rule for a large model: float32 masters and state on the host, bfloat16 gradients in, bfloat16 weights out.

    For weights on the CPU one pass reads the gradient where it is and writes the weights where they are. For weights on
    a GPU gradients come to the host and weights go back in chunks, and the host updates one chunk while the next is
    on its way; clipping and the test for NaN and Inf are done on the GPU before.

    Memory per parameter, with AdamW and bfloat16: 12 bytes on the host (master, two states) in addition to weight and
    gradient (4 bytes); with weights on a GPU 4 more on the host, for gradients and weights in transit. A step moves 28
    bytes per parameter through the host's memory, and 2 each way between host and GPU; with clipping or the test,
    weights on the CPU have their gradients read once more, 2 bytes.

    The masters are the truth. Weights that somebody writes between two steps (`model.load_state_dict`) are noticed by
    their version and become the masters; after writes that autograd cannot see (`p.data`), call `take_params`.

    Args:
        params: as for `Optimizer`; bfloat16, float16, float32 or float64, all on one device or on several.
        rule: an optimizer of fastlr, such as `fastlr.AdamW` (default), or a rule made by `fastlr.rule`.
        alloc: `alloc(nbytes)` returns the memory for masters, state and what is in transit: a memory-mapped file or
            shared memory, say. Default: pinned memory for weights on a GPU, else ordinary memory.
        chunk: elements that travel together, a whole number; a tensor is never cut. Default: 16 Mi for weights on a
            GPU, or a 128th of the model if that is more; weights on the CPU need no copies, and are staged as if they
            were on a GPU only if a chunk is given.
        settings: as for `Optimizer`; `shadow` is what the weights are here.

    Raises:
        TypeError: if an argument or a parameter is of the wrong kind.
        ValueError: if one is out of range or does not fit.

    Source: Rajbhandari et al. 2021, "ZeRO-Infinity", arXiv:2104.07857, section 5, for where masters and state go.

    Example:
        >>> import torch, fastlr.torch
        >>> model = torch.nn.Linear(64, 64).bfloat16()
        >>> opt = fastlr.torch.HostOptimizer(model.parameters(), lr=1e-3, clip_norm=1.0, skip_nonfinite=True)
        >>> model(torch.ones(2, 64, dtype=torch.bfloat16)).sum().backward()
        >>> opt.step()
        >>> opt.state[model.weight]["master"].dtype, opt.nbytes // (64 * 65)
        (torch.float32, 12)
    """

    def __init__(
        self,
        params: Any,
        rule: type[Native] | Rule = AdamW,
        *,
        alloc: Alloc | None = None,
        chunk: int | None = None,
        ema_out: Iterable[torch.Tensor] | None = None,
        **settings: Any,
    ) -> None:
        if isinstance(rule, Rule):
            make: Callable[..., Native] = functools.partial(Native, rule=rule)
        elif isinstance(rule, type) and issubclass(rule, Native):
            make = rule
        else:
            raise TypeError(
                f"rule must be an optimizer such as fastlr.AdamW or made by fastlr.rule, got {checks.shown(rule)}."
            )
        if settings.pop(SHADOW.name, None) is not None:
            raise TypeError("HostOptimizer takes no shadow: the parameters themselves are the low-precision copy.")
        if ema_out is not None:
            raise TypeError("HostOptimizer takes no ema_out: it averages the masters, in opt.ema.")
        recipe = functools.partial(HostRecipe, chunk=None if chunk is None else checks.count("chunk", chunk))
        self._set_up(params, make, {**settings, "alloc": alloc}, recipe)

    def take_params(self) -> None:
        """Make the weights as they are now the masters, where they differ from the masters as rounded."""
        for engine in self._current().engines:
            assert isinstance(engine, HostEngine)
            engine.take_params(range(len(engine.params)))

    @property
    def nbytes(self) -> int:
        """Bytes on the host that the optimizer holds: masters, states, averages, and what is on its way."""
        return sum(engine.nbytes for engine in self._current().engines if isinstance(engine, HostEngine))


@dataclass(frozen=True)
class HostRecipe(Recipe):
    """As `Recipe`.

    Attributes:
        chunk: elements that travel together, or None for the default.
    """

    chunk: int | None = None

    halves = True

    def engine(self, *args: Any) -> Engine:
        """As `Recipe.engine`."""
        return HostEngine(*args, chunk=self.chunk)

    def always_outside(self, leaves: Sequence[Leaf]) -> bool:
        """As `Recipe.always_outside`: chunks are updated one after the other."""
        return self.chunk is not None or any(leaf.param.is_cuda for leaf in leaves)


def pinned(nbytes: int) -> Any:
    """Memory of the host that a GPU can copy from and to by itself."""
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True).numpy()


class HostEngine(Engine):
    """An engine whose native optimizer updates masters on the host.

    Args:
        make, leaves, others: as for `Engine`.
        chunk: elements that are copied together, or None: the gradients of parameters on the CPU are read where they
            are, and their weights written where they are.
    """

    _LEAST_CHUNK, _MOST_CHUNKS = 1 << 24, 128  # a step of each chunk has a plan of its own, which are kept

    def __init__(self, make: Callable[..., Native], leaves: Sequence[Leaf], *others: Any, chunk: int | None) -> None:
        hyper, names, settings, ema_out = others
        first = leaves[0].param
        self._device, self._weights = first.device, first.dtype
        self._staged = chunk is not None or first.is_cuda
        self._alloc = settings.get("alloc") or (pinned if first.is_cuda else None)
        self._buffer: FlatBuffer | None = None
        super().__init__(make, leaves, hyper, names, {**settings, "alloc": self._alloc, "capturable": False}, ema_out)
        self._stage: torch.Tensor | None = None
        streams = self._staged and first.is_cuda
        self._down, self._up = (torch.cuda.Stream(first.device) if streams else None for _ in range(2))
        self._versions = self._versions_now()
        if self._staged:
            self._chunks = self._cut(chunk or max(self._LEAST_CHUNK, sum(self._sizes) // self._MOST_CHUNKS))
            self.parts = len(self._chunks)
            self._seen = [tuple(k in part for k in range(len(leaves))) for part in self._chunks]
            self._shadows = self.views(SHADOW.name) if self._weights in tensors.HALVES else []

    def _cut(self, chunk: int) -> list[range]:
        """Neighbouring parameters that travel together."""
        out, first, elements = [], 0, 0
        for k, size in enumerate(self._sizes):
            if elements and elements + size > chunk:
                out.append(range(first, k))
                first, elements = k, 0
            elements += size
        return [*out, range(first, len(self._sizes))]

    def _targets(self, paths: Sequence[str]) -> Any:
        if self._weights in tensors.PARAMETERS and not self._staged:
            return super()._targets(paths)
        dtype = np.dtype("float64" if self._weights is torch.float64 else "float32")
        empty = {
            path: np.broadcast_to(np.zeros((), dtype), p.numel()) for path, p in zip(paths, self.params, strict=True)
        }
        self._buffer = flatten(empty, alloc=self._alloc)
        flat = torch.from_numpy(self._buffer.data)
        self._masters = [tensors.like(p, flat, start) for p, start in zip(self.params, self._starts, strict=True)]
        for master, p in zip(self._masters, self.params, strict=True):
            master.copy_(p.detach())
        return self._buffer

    def _options(self, paths: Sequence[str]) -> dict[str, Any]:
        if self._weights not in tensors.HALVES:
            return {}
        shadow = {SHADOW.name: tensors.HALVES[self._weights]}
        if self._staged:
            return shadow
        return {**shadow, SHADOW.argument: dict(zip(paths, map(self._as_array, self.params), strict=True))}

    def _initial(self, k: int, saved: Mapping[str, Any], shown: Shown | None) -> None:
        master = saved.get("master")
        if self._buffer is None or master is None:
            return
        self._masters[k].copy_(states.tensor(self.leaves[k].called, "master", master, self.params[k]).detach())
        if shown is not None and shown.addresses.get(id(master)) == master.data_ptr():
            self.take_params([k])
        else:  # masters are the truth, weights follow
            self.writes.append((self.params[k].detach(), self._masters[k]))

    def _extra(self, k: int) -> dict[str, torch.Tensor]:
        return {} if self._buffer is None else {"master": self._masters[k]}

    @property
    def nbytes(self) -> int:
        """Bytes on the host that belong to this engine."""
        buffers = [
            *self.state.columns.flat.values(),
            *(buffer for buffer in (self._buffer, self._stage) if buffer is not None),
        ]
        return sum(buffer.nbytes for buffer in buffers)

    def take_params(self, which: Iterable[int]) -> None:
        """Make weights the masters, where they differ from the masters as rounded."""
        if self._buffer is None:
            return
        for k in which:
            master, weights = self._masters[k], self.params[k].detach().cpu()
            changed = master.to(self._weights) != weights
            master.copy_(torch.where(changed, weights.to(master.dtype), master))

    def find(self) -> bool:
        """As `Engine.find`; and take over weights that somebody has written since the last step."""
        if not super().find():
            return False
        versions = self._versions_now()
        if versions != self._versions:
            self.take_params(k for k, (a, b) in enumerate(zip(versions, self._versions, strict=True)) if a != b)
        return True

    def _versions_now(self) -> list[int]:
        """What autograd counts of the writes to each parameter; it counts none to inference tensors."""
        return [0 if p.is_inference() else p._version for p in self.params]

    def done(self) -> None:
        """As `Engine.done`."""
        if self._up is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._up)
        super().done()
        self._versions = self._versions_now()

    # Staged: gradients come, weights go

    def prepare(self, scale: float) -> list[Any]:
        """As `Engine.prepare`; gradients are on their way to the host."""
        if not self._staged:
            return super().prepare(scale)
        if not self.has_gradients:
            return [(prepared, [], None) for prepared in super().prepare(scale)]
        there = [grad is not None for grad in self.gradients]
        dtype = next(grad.dtype for grad in self.gradients if grad is not None)
        if self._stage is None or self._stage.dtype is not dtype:
            nbytes = sum(self._sizes) * dtype.itemsize
            stage = torch.from_numpy(HOST.allocate(nbytes, np.uint8, 1, self._alloc)).view(dtype)
            starts = zip(self.params, self._starts, strict=True)
            self._staged_gradients = [tensors.like(p, stage, start) for p, start in starts]
            self._staged_at = [gradient.data_ptr() for gradient in self._staged_gradients]
            self._stage = stage
        if self._up is not None and self._down is not None:
            self._up.synchronize()  # the weights of the step before are on the GPU, their memory can be written
            self._down.wait_stream(torch.cuda.current_stream(self._device))
            self._up.wait_stream(torch.cuda.current_stream(self._device))
        parts, rows, number = [], self.state.rows, self.native.steps
        for chunk, seen in zip(self._chunks, self._seen, strict=True):
            active = seen if all(there) else tuple(map(operator.and_, there, seen))
            if any(active) or EMA.name in self.state.columns.flat:
                located = Located(self._staged_at, tensors.name_of(dtype), active, seen, number)
                prepared = self.prepare_native(located, scale)
                parts.append((prepared, [k for k in chunk if there[k]], self._fetch(chunk)))
        return parts if self.state.rows is rows else self.prepare(scale)  # the tables were made anew meanwhile

    def run(self, part: Any) -> StepInfo | None:
        """As `Engine.run`."""
        if not self._staged:
            return super().run(part)
        prepared, _, arrived = part
        if arrived is not None:
            arrived.synchronize()
        prepared.stepper.run(prepared)
        self.deliver(part)
        return None

    def deliver(self, part: Any) -> None:
        """As `Engine.deliver`: bring the weights of a part to where they belong."""
        if not self._staged:
            return
        weights = self._masters if self._weights not in tensors.HALVES else self._shadows
        with self._on(self._up):
            for k in part[1]:
                self.params[k].detach().copy_(weights[k], non_blocking=True)

    def _fetch(self, chunk: range) -> Any:
        """Have the gradients of a chunk copied to the host; the event of their arrival, on the CPU None."""
        with self._on(self._down):
            for k in chunk:
                grad = self.gradients[k]
                if grad is not None:
                    self._staged_gradients[k].copy_(grad.detach(), non_blocking=True)
                    if self._down is not None:
                        grad.record_stream(self._down)
            return None if self._down is None else self._down.record_event()

    @staticmethod
    def _on(stream: Any) -> Any:
        return contextlib.nullcontext() if stream is None else torch.cuda.stream(stream)
