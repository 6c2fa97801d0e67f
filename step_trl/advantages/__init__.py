"""How the methods change the advantages of a group, as functions of tensors."""

from .ragged import prompt_weights, ragged_advantages
from .segments import moments, segment_advantages, segment_boundaries, thin_boundaries, whiten
from .semantic_entropy import answer_clusters, cluster_answers, seed_advantages, seed_scale, semantic_entropy
from .step_selection import select_step_advantages, selection_statistics, step_confidences
from .tree import edge_advantages, tree_values


__all__ = [
    "answer_clusters",
    "cluster_answers",
    "edge_advantages",
    "moments",
    "prompt_weights",
    "ragged_advantages",
    "seed_advantages",
    "seed_scale",
    "segment_advantages",
    "segment_boundaries",
    "select_step_advantages",
    "selection_statistics",
    "semantic_entropy",
    "step_confidences",
    "thin_boundaries",
    "tree_values",
    "whiten",
]
