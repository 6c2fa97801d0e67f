"""How the methods change the advantages of a group, as functions of tensors."""

from .step_selection import select_step_advantages, step_confidences


__all__ = ["select_step_advantages", "step_confidences"]
