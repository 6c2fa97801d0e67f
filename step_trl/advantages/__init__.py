"""How the methods change the advantages of a group, as functions of tensors."""

from .semantic_entropy import answer_clusters, cluster_answers, seed_advantages, seed_scale, semantic_entropy
from .step_selection import select_step_advantages, selection_statistics, step_confidences


__all__ = [
    "answer_clusters",
    "cluster_answers",
    "seed_advantages",
    "seed_scale",
    "select_step_advantages",
    "selection_statistics",
    "semantic_entropy",
    "step_confidences",
]
