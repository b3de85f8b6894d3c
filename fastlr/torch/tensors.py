"""PyTorch tensors as memory: which can be updated where they are, and flat views of them."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch

from ..kernels.formats import FORMATS

PARAMETERS = (torch.float32, torch.float64)
HALVES = {getattr(torch, name): name for name in FORMATS}


def name_of(dtype: torch.dtype) -> str:
    """The name that NumPy and fastlr give to a dtype."""
    return str(dtype).removeprefix("torch.")


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether the elements fill a stretch of memory without gaps or overlaps, in whatever order of the dimensions."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def in_memory_order(tensor: torch.Tensor) -> torch.Tensor:
    """All elements of a dense tensor as they stand in memory, shape `(n,)`; a view without history."""
    return tensor.detach().as_strided((tensor.numel(),), (1,), tensor.storage_offset())


def like(tensor: torch.Tensor, flat: torch.Tensor, start: int) -> torch.Tensor:
    """A view of flat memory, from an element on, with the shape and strides of a dense tensor.

    To autograd it is a view, which is written when the memory is; but its storage is its own part only, since saving a
    tensor saves its storage.
    """
    view = flat.as_strided(tensor.shape, tensor.stride(), flat.storage_offset() + start)
    if view.numel():
        view.data = torch.from_dlpack(view)
    return view


def has_memory(tensor: torch.Tensor) -> bool:
    """Whether all elements are in memory: that of a storage can be given back, and that on the device meta is none."""
    if tensor.is_meta or tensor.layout is not torch.strided:
        return False
    if not tensor.numel():
        return True
    last = sum(stride * (size - 1) for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
    needed = (tensor.storage_offset() + last + 1) * tensor.element_size()
    return tensor.untyped_storage().nbytes() >= needed and tensor.data_ptr() != 0


class UserTensor:
    """A tensor of the user's that a step writes: its memory is kept alive, the tensor only as long as the user does.

    Args:
        tensor: the tensor.

    Attributes:
        memory: another tensor over its memory.
        kept: whether somebody else has the tensor; None: not known yet.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self.memory, self._reference = tensor.detach(), weakref.ref(tensor)
        self.kept: bool | None = None

    @property
    def tensor(self) -> torch.Tensor:
        """The tensor, or one over the same memory if nobody has it any more."""
        tensor = self._reference()
        return self.memory if tensor is None else tensor

    def now(self, called: str) -> torch.Tensor:
        """The tensor; if nobody else has ever kept it, one over the same memory.

        Raises:
            ValueError: if somebody kept it, and it is gone.
        """
        tensor = self._reference()
        if self.kept is None:
            self.kept = tensor is not None
        if tensor is not None:
            return tensor
        if self.kept:
            raise ValueError(
                f"the tensor given as ema_out for {called} no longer exists, so nobody would see the average: "
                "load_state_dict(assign=True), or a new module in its place? Give the optimizer the new ones: "
                "opt.ema_out = target.parameters()."
            )
        return self.memory


def check_parameter(called: str, tensor: torch.Tensor, halves: bool) -> None:
    """Check that a parameter can be updated where it is.

    Args:
        called: what messages call it.
        tensor: the parameter.
        halves: whether bfloat16 and float16 are fine as well.

    Raises:
        TypeError: if it is of a dtype, layout or kind that cannot be updated.
        ValueError: if it is on a device that fastlr does not know, or its elements are not dense in memory.
    """
    if type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        raise TypeError(
            f"{called} is a {type(tensor).__name__}, a tensor that has its memory elsewhere. Pass the local tensor "
            "(for a DTensor: p.to_local())."
        )
    if tensor.layout is not torch.strided:
        raise TypeError(f"{called} has the layout {tensor.layout}. Pass a dense parameter (p.to_dense()).")
    if tensor.dtype in HALVES and not halves:
        raise TypeError(
            f"{called} is {name_of(tensor.dtype)}, whose updates would be lost in rounding. Keep it in float32, or use "
            "fastlr.torch.HostOptimizer, which keeps masters in float32."
        )
    if tensor.dtype not in (*PARAMETERS, *HALVES):
        hint = " Optimize torch.view_as_real(p)." if tensor.is_complex() else ""
        raise TypeError(f"{called} is {name_of(tensor.dtype)}, expected float32 or float64.{hint}")
    if tensor.device.type not in ("cpu", "cuda", "meta"):
        raise ValueError(f"{called} is on {tensor.device}; fastlr updates parameters on the CPU and on NVIDIA GPUs.")
    if not tensor.is_meta and not has_memory(tensor):
        raise ValueError(f"{called} has no memory: its storage has been given back, or is too small for its shape.")
    if not is_dense(tensor) or tensor.is_neg():
        raise ValueError(
            f"{called} is not dense in memory: shape {tuple(tensor.shape)}, strides {tensor.stride()}. "
            "Pass a parameter that owns its memory, such as torch.nn.Parameter(p.contiguous())."
        )


def check_gradient(called: str, grad: torch.Tensor, param: torch.Tensor) -> None:
    """Check that a gradient goes with its parameter.

    Raises:
        TypeError: if it is sparse, masked, or of a dtype that cannot be read.
        ValueError: if it has another shape or is on another device.
    """
    if type(grad).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        raise TypeError(
            f"the gradient of {called} is a {type(grad).__name__}, whose value is not just the numbers in its memory. "
            "Pass a plain tensor (for a MaskedTensor: grad.to_tensor(0))."
        )
    if grad.layout is not torch.strided:
        raise TypeError(
            f"the gradient of {called} is sparse, fastlr.torch takes dense ones. Use sparse=False in the embedding, "
            "or torch.optim.SparseAdam for this parameter."
        )
    if grad.dtype is not param.dtype and grad.dtype not in (*HALVES, *PARAMETERS):
        raise TypeError(f"the gradient of {called} is {name_of(grad.dtype)}, the parameter {name_of(param.dtype)}.")
    if grad.shape != param.shape:
        raise ValueError(f"the gradient of {called} has shape {tuple(grad.shape)}, the parameter {tuple(param.shape)}.")
    if grad.device != param.device:
        raise ValueError(f"the gradient of {called} is on {grad.device}, the parameter on {param.device}.")
    if not has_memory(grad):
        raise ValueError(f"the gradient of {called} has no memory: its storage has been given back.")


def with_strides_of(param: torch.Tensor, grad: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A gradient with its elements in the order of the parameter's, in a dtype; a copy if it is not so already."""
    if grad.dtype is dtype and grad.stride() == param.stride() and not grad.is_neg():
        return grad.detach()
    out = torch.empty_strided(param.shape, param.stride(), dtype=dtype, device=param.device)
    return out.copy_(grad.detach())


def number(name: str, value: Any) -> Any:
    """A hyperparameter with tensors as numbers; reading one on a GPU waits for it.

    Raises:
        ValueError: if a tensor has more than one element.
    """
    if isinstance(value, torch.Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name} must be one number: Tensor {name} must be 1-element, got {value.numel()}.")
        return value.item()
    if isinstance(value, tuple | list):
        return tuple(number(f"{name}[{k}]", part) for k, part in enumerate(value))
    return value


def norm_of(gradients: Sequence[torch.Tensor]) -> float:
    """The norm of several tensors together, which may be on several devices and of several dtypes."""
    norms: dict[torch.device, list[torch.Tensor]] = {}
    for gradient in gradients:
        wide = torch.float64 if gradient.dtype is torch.float64 else torch.float32
        norms.setdefault(gradient.device, []).append(torch.linalg.vector_norm(gradient.detach(), dtype=wide).double())
    return float(sum(float(torch.stack(each).square().sum()) for each in norms.values()) ** 0.5)
