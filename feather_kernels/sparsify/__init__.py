"""Sparsifier, schedules, layer selection and reports."""

from feather_kernels.sparsify.report import LayerReport, Report
from feather_kernels.sparsify.schedules import ConstantSchedule, CubicSchedule, LambdaSchedule, Schedule
from feather_kernels.sparsify.selection import PrunableWeight, SkippedLayer, select_layers
from feather_kernels.sparsify.sparsifier import Sparsifier

__all__ = [
    "ConstantSchedule",
    "CubicSchedule",
    "LambdaSchedule",
    "LayerReport",
    "PrunableWeight",
    "Report",
    "Schedule",
    "SkippedLayer",
    "Sparsifier",
    "select_layers",
]
