"""The hooks of TRL that the trainers override: an upgrade that changes one fails here, loudly."""

import inspect
import logging
import runpy

import pytest
from trl import GRPOTrainer

from step_trl import EfficientReasoningTrainer, LAPOTrainer
from step_trl._compat import SUPPORTED_TRL, check_trl_version, silence_triton_check
from step_trl.trainers import METHODS


SIGNATURES = {
    "_generate_single_turn": "(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False)",
    "_calculate_rewards": "(self, inputs, prompts, completions, completion_ids_list)",
    "_compute_loss": "(self, model, inputs)",
}
WITH_ANNOTATIONS = {
    "train": ["self", "resume_from_checkpoint", "trial", "ignore_keys_for_eval"],
    "_save_checkpoint": ["self", "model", "trial"],
    "_load_optimizer_and_scheduler": ["self", "checkpoint"],
    "_get_train_sampler": ["self", "dataset"],
    "_generate_and_score_completions": ["self", "inputs"],
    "_prepare_inputs": ["self", "generation_batch"],
    "get_batch_samples": ["self", "epoch_iterator", "num_batches", "device"],
    "_tokenize_prompts": ["self", "prompts"],
    "_get_per_token_logps_and_entropies": [
        "self", "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size", "compute_entropy",
        "compute_aux_loss", "pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask", "spatial_shapes",
        "num_tiles", "image_sizes", "token_type_ids", "mm_token_type_ids", "image_position_ids",
    ],
    "create_model_card": ["self", "model_name", "dataset_name", "tags"],
    "_log_metric": ["self", "name", "value"],
    "_log_completion_extra": ["self", "column", "values"],
}  # fmt: skip


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name):
    assert str(inspect.signature(getattr(GRPOTrainer, name))) == SIGNATURES[name]


@pytest.mark.parametrize("name", WITH_ANNOTATIONS)
def test_parameters(name):
    assert list(inspect.signature(getattr(GRPOTrainer, name)).parameters) == WITH_ANNOTATIONS[name]


def overridden(kind):
    """Return the methods of TRL that one of our classes overrides."""
    parents = {name for cls in GRPOTrainer.__mro__ for name in vars(cls)}
    return {name for name in vars(kind).keys() & parents if callable(getattr(GRPOTrainer, name, None))} - {"__init__"}


def test_only_the_base_overrides_hooks_of_trl_and_they_are_pinned():
    """Except for LAPO, which changes prompts, and saves lengths beside a checkpoint."""
    pinned = SIGNATURES.keys() | WITH_ANNOTATIONS.keys()
    for trainer, _ in METHODS.values():
        for kind in (kind for kind in trainer.__mro__ if kind.__module__.startswith("step_trl")):
            own = {LAPOTrainer: {"_tokenize_prompts", "_load_optimizer_and_scheduler"}}.get(kind, set())
            assert overridden(kind) <= (pinned if kind is EfficientReasoningTrainer else own), kind


def test_the_loss_reads_advantages_and_reference_after_its_forward_pass():
    source = inspect.getsource(GRPOTrainer._compute_loss)
    assert source.index("self._get_per_token_logps_and_entropies(") < source.index('inputs["advantages"]')
    assert source.count('inputs["advantages"]') == 1
    assert source.index("self._get_per_token_logps_and_entropies(") < source.index('inputs["ref_per_token_logps"]')
    assert source.count('inputs["ref_per_token_logps"]') == 1


def test_the_loss_reads_old_log_probabilities_after_its_forward_pass():
    """Ratios are computed from the values that it reads then, so that `loss_as_advantages` can replace both."""
    source = inspect.getsource(GRPOTrainer._compute_loss)
    forward = source.index("self._get_per_token_logps_and_entropies(")
    advantages, old = source.index('inputs["advantages"]'), source.index('inputs.get("old_per_token_logps")')
    assert forward < advantages < old < source.index("log_ratio = per_token_logps - old_per_token_logps")
    assert source.count('inputs.get("old_per_token_logps")') == source.count('"old_per_token_logps"') == 1


def test_an_unsupported_trl_says_what_to_install():
    with pytest.raises(ImportError, match=r"found trl==0\.9\.1.*pip install 'trl>=1\.16"):
        check_trl_version("0.9.1")
    check_trl_version("1.16.3")
    assert "1.16" in SUPPORTED_TRL


def test_vllm_on_a_cpu_does_not_complain_of_triton(caplog):
    """Its check runs when TRL is imported. Here it runs once more, with and without our change."""
    logger = logging.getLogger("vllm.triton_utils.importing")
    logger.addHandler(caplog.handler)  # vLLM's loggers do not propagate
    try:
        logger.setLevel(logging.WARNING)
        runpy.run_module(logger.name)
        complaints = len(caplog.messages)
        silence_triton_check()
        runpy.run_module(logger.name)
    finally:
        logger.removeHandler(caplog.handler)
    assert complaints > 0, "This vLLM does not complain: silence_triton_check is no longer needed."
    assert len(caplog.messages) == complaints
