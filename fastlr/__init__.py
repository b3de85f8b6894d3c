"""fastlr: fused optimizer updates in place over NumPy arrays, at memory speed."""

from . import bench, optimizers, schedules
from ._version import __version__
from .arrays.buffers import FlatBuffer, flatten
from .gpu.arrays import DeviceArray
from .gpu.driver import DeviceError
from .groups import Group, Groups
from .kernels.primitives import norm, total
from .kernels.staging import Rule, RuleError, Staged
from .loss_scale import LossScale
from .optimizer import Optimizer, warmup
from .optimizers import *  # noqa: F403 - the optimizers are listed there and nowhere else
from .search.find_lr import RangeTest, find_lr
from .search.lbfgs import LBFGS, LBFGSInfo
from .search.line_search import LineSearch, line_search
from .step.info import LeafInfo, StepInfo
from .step.threads import get_num_threads, set_num_threads

rule = Rule

__all__ = [
    "LBFGS",
    "DeviceArray",
    "DeviceError",
    "FlatBuffer",
    "Group",
    "Groups",
    "LBFGSInfo",
    "LeafInfo",
    "LineSearch",
    "LossScale",
    "Optimizer",
    "RangeTest",
    "Rule",
    "RuleError",
    "Staged",
    "StepInfo",
    "__version__",
    "bench",
    "find_lr",
    "flatten",
    "get_num_threads",
    "line_search",
    "norm",
    "rule",
    "schedules",
    "set_num_threads",
    "total",
    "warmup",
]
__all__ += optimizers.__all__
