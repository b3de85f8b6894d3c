"""fastlr: fused optimizer updates in place over NumPy arrays, at memory speed."""

from . import bench
from ._version import __version__
from .buffers import FlatBuffer, flatten
from .groups import Group, Groups
from .kernels.staging import Rule, RuleError, Staged
from .optimizer import Optimizer, StepInfo, warmup
from .optimizers import SGD, Adadelta, Adagrad, Adam, AdamW, RMSprop
from .threads import get_num_threads, set_num_threads

rule = Rule


__all__ = [
    "SGD",
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "FlatBuffer",
    "Group",
    "Groups",
    "Optimizer",
    "RMSprop",
    "Rule",
    "RuleError",
    "Staged",
    "StepInfo",
    "__version__",
    "bench",
    "flatten",
    "get_num_threads",
    "rule",
    "set_num_threads",
    "warmup",
]
