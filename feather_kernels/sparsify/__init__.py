"""The sparsifier, its schedules, the choice of layers, and reports."""

from feather_kernels.sparsify.layer_choice import LayerChoice, SkippedLayer, choose_weights
from feather_kernels.sparsify.prunable import PrunableWeight
from feather_kernels.sparsify.report import LayerReport, Report
from feather_kernels.sparsify.schedules import ConstantSchedule, CubicSchedule, LambdaSchedule, Schedule
from feather_kernels.sparsify.sparsifier import Sparsifier

__all__ = [
    "ConstantSchedule",
    "CubicSchedule",
    "LambdaSchedule",
    "LayerChoice",
    "LayerReport",
    "PrunableWeight",
    "Report",
    "Schedule",
    "SkippedLayer",
    "Sparsifier",
    "choose_weights",
]
