"""Plain warnings for runs without a learning signal."""

from __future__ import annotations

import logging

from transformers import TrainerCallback


logger = logging.getLogger(__name__)

# For each symptom: the metric, a test, the message, and whether it only counts at the start of a run, as a model may
# learn to do without triggers. Keys are those that TRL and the trainers log.
_SYMPTOMS = (
    (
        "frac_reward_zero_std",
        lambda value: value >= 0.99,
        "Every group of completions had equal rewards, so nothing was learned. Use problems that the model solves "
        "sometimes, a higher temperature or more num_generations, and look at a few completions: does the reward "
        "function find their answers?",
        False,
    ),
    (
        "completions/clipped_ratio",
        lambda value: value >= 0.95,
        "Nearly all completions were clipped: they did not end with the EOS token within max_completion_length. Raise "
        "max_completion_length, or check that the chat template and the EOS token fit the model.",
        False,
    ),
    (
        "step_grpo/steps/mean",
        lambda value: value <= 1.0,
        "No trigger word was found in any completion, so there are no steps to shorten. Set triggers to words with "
        "which this model opens a new line of thought.",
        True,
    ),
)


class SignalWarnings(TrainerCallback):
    """Warn once per symptom, at the first logging step that shows it."""

    def __init__(self):
        self.settled: set[str] = set()  # keys that are no longer checked

    def on_log(self, args, state, control, logs=None, **kwargs):
        for key, is_bad, message, only_from_start in _SYMPTOMS:
            value = (logs or {}).get(key)
            if value is None or key in self.settled:
                continue
            if is_bad(value) or only_from_start:
                self.settled.add(key)
            if is_bad(value) and state.is_world_process_zero:
                logger.warning("%s (%s = %.2f at step %d)", message, key, value, state.global_step)
