"""Plain warnings for runs that carry no learning signal."""

from __future__ import annotations

import logging

from transformers import TrainerCallback


logger = logging.getLogger(__name__)

# Metric, test, what to tell the user, and whether only a run that was so from its start is ill: a model may well learn
# to do without triggers. Keys as TRL and the trainers log them.
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
    """Warns once per symptom, at the first logging step that shows it."""

    def __init__(self):
        self.settled: set[str] = set()  # warned of, or found well where that is enough

    def on_log(self, args, state, control, logs=None, **kwargs):
        for key, is_bad, message, only_from_start in _SYMPTOMS:
            value = (logs or {}).get(key)
            if value is None or key in self.settled:
                continue
            if is_bad(value) or only_from_start:
                self.settled.add(key)
            if is_bad(value) and state.is_world_process_zero:
                logger.warning("%s (%s = %.2f at step %d)", message, key, value, state.global_step)
