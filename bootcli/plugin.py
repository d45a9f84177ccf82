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
    from bootcli.teachers.feature_folder import load_feature_space
    from bootcli.teachers.protocol import (
        Clock,
        Cond,
        Exporter,
        FeatureSpace,
        Head,
        LoraExporter,
        LoraWeights,
        Teacher,
        TeacherSpec,
    )
    from bootcli.teachers.recipe import read_recipe
    from bootcli.teachers.registry import locate
    from bootcli.teachers.weights import misfit, read_archive
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
    "bootcli.teachers.feature_folder": ("load_feature_space",),
    "bootcli.teachers.protocol": (
        "Clock",
        "Cond",
        "Exporter",
        "FeatureSpace",
        "Head",
        "LoraExporter",
        "LoraWeights",
        "Teacher",
        "TeacherSpec",
    ),
    "bootcli.teachers.recipe": ("read_recipe",),
    "bootcli.teachers.registry": ("locate",),
    "bootcli.teachers.weights": ("misfit", "read_archive"),
    "bootcli.testing": ("check_teacher",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "Alias",
    "BootError",
    "Clip",
    "Clock",
    "Coefficients",
    "Cond",
    "CosineVP",
    "DiscreteVP",
    "Dynamic",
    "Exporter",
    "FeatureSpace",
    "Head",
    "LinearPath",
    "LoraExporter",
    "LoraWeights",
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
    "load_feature_space",
    "locate",
    "misfit",
    "read_archive",
    "read_recipe",
    "vp_table",
]


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME_OF[name]), name)
