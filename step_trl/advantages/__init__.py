"""Advantages of the methods: what each does to the group's advantages, as functions of tensors."""

from .step_selection import select_step_advantages, selection_statistics, step_confidences


__all__ = ["select_step_advantages", "selection_statistics", "step_confidences"]
