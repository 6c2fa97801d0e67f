"""How the methods change the advantages of a group, as functions of tensors."""

from .batch_normalised import centred_rewards
from .efficiency_balance import (
    Signal,
    batch_signal,
    correctness_share,
    group_advantages,
    length_efficiency,
    length_targets,
)
from .ragged import prompt_weights, ragged_advantages
from .segments import moments, segment_advantages, segment_boundaries, thin_boundaries, whiten
from .semantic_entropy import answer_clusters, cluster_answers, seed_advantages, seed_scale, semantic_entropy
from .step_potential import credit_steps, potential_bonuses, saturation_factors, step_potential, steps_at_cuts
from .step_selection import select_step_advantages, selection_statistics, step_confidences
from .tree import edge_advantages, tree_values


__all__ = [
    "Signal",
    "answer_clusters",
    "batch_signal",
    "centred_rewards",
    "cluster_answers",
    "correctness_share",
    "credit_steps",
    "edge_advantages",
    "group_advantages",
    "length_efficiency",
    "length_targets",
    "moments",
    "potential_bonuses",
    "prompt_weights",
    "ragged_advantages",
    "saturation_factors",
    "seed_advantages",
    "seed_scale",
    "segment_advantages",
    "segment_boundaries",
    "select_step_advantages",
    "selection_statistics",
    "semantic_entropy",
    "step_confidences",
    "step_potential",
    "steps_at_cuts",
    "thin_boundaries",
    "tree_values",
    "whiten",
]
