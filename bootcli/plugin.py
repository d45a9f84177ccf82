"""Everything a teacher plugin may import, and the only module of bootcli it should.

Names are resolved on first use, so a plugin's module that needs only `TeacherFamily` and `Alias` costs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from bootcli.errors import BootError, UsageError
from bootcli.teachers.family import Alias, TeacherFamily

if TYPE_CHECKING:
    from bootcli.maths.prediction import PredictionType
    from bootcli.maths.schedule import (
        Coefficients,
        CosineVP,
        DiscreteVP,
        LinearPath,
        Schedule,
        VarianceExploding,
        vp_table,
    )
    from bootcli.maths.threshold import Clip, Dynamic, NoThreshold, Threshold
    from bootcli.teachers.protocol import Cond, Exporter, FeatureSpace, Head, Teacher, TeacherSpec
    from bootcli.testing import check_teacher

_HOMES = {
    "bootcli.maths.prediction": ("PredictionType",),
    "bootcli.maths.schedule": (
        "Coefficients",
        "CosineVP",
        "DiscreteVP",
        "LinearPath",
        "Schedule",
        "VarianceExploding",
        "vp_table",
    ),
    "bootcli.maths.threshold": ("Clip", "Dynamic", "NoThreshold", "Threshold"),
    "bootcli.teachers.protocol": ("Cond", "Exporter", "FeatureSpace", "Head", "Teacher", "TeacherSpec"),
    "bootcli.testing": ("check_teacher",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "Alias",
    "BootError",
    "Clip",
    "Coefficients",
    "Cond",
    "CosineVP",
    "DiscreteVP",
    "Dynamic",
    "Exporter",
    "FeatureSpace",
    "Head",
    "LinearPath",
    "NoThreshold",
    "PredictionType",
    "Schedule",
    "Teacher",
    "TeacherFamily",
    "TeacherSpec",
    "Threshold",
    "UsageError",
    "VarianceExploding",
    "check_teacher",
    "vp_table",
]


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME_OF[name]), name)
