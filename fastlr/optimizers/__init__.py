"""The optimizers: each a rule with its defaults, its checks and the names of its states."""

from .adagrad import Adadelta, Adagrad, RMSprop
from .adam import LAMB, Adam, AdamW, NAdam
from .parameter_free import DoG, Prodigy
from .schedule_free import ScheduleFreeAdamW, ScheduleFreeSGD
from .sgd import LARS, SGD

__all__ = [
    "LAMB",
    "LARS",
    "SGD",
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "DoG",
    "NAdam",
    "Prodigy",
    "RMSprop",
    "ScheduleFreeAdamW",
    "ScheduleFreeSGD",
]
