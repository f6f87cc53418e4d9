"""Sparsifier, schedules, layer selection and reports."""

from feather_kernels.sparsify.layer_choice import Choice, PrunableWeight, SkippedLayer, select_weights
from feather_kernels.sparsify.report import LayerReport, Report
from feather_kernels.sparsify.schedules import ConstantSchedule, CubicSchedule, LambdaSchedule, Schedule
from feather_kernels.sparsify.sparsifier import Sparsifier

__all__ = [
    "Choice",
    "ConstantSchedule",
    "CubicSchedule",
    "LambdaSchedule",
    "LayerReport",
    "PrunableWeight",
    "Report",
    "Schedule",
    "SkippedLayer",
    "Sparsifier",
    "select_weights",
]
