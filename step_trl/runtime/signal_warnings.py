"""Plain warnings for runs without a learning signal."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

from transformers import TrainerCallback


logger = logging.getLogger(__name__)


class Symptom(NamedTuple):
    """A metric that tells of a run without a learning signal."""

    metric: str  # as TRL and the trainers log it
    is_bad: Callable[[float], bool]
    advice: str
    only_from_start: bool = False  # whether it is a symptom only if it was bad from the start


SYMPTOMS = (
    Symptom(
        "frac_reward_zero_std",
        lambda value: value >= 0.99,
        "Every group of completions had equal rewards, so nothing was learned. Use problems that the model solves "
        "sometimes, a higher temperature or more num_generations, and look at a few completions: does the reward "
        "function find their answers?",
    ),
    Symptom(
        "completions/clipped_ratio",
        lambda value: value >= 0.95,
        "Nearly all completions were clipped: they did not end with the EOS token within max_completion_length. Raise "
        "max_completion_length, or check that the chat template and the EOS token fit the model.",
    ),
)


class SignalWarnings(TrainerCallback):
    """Warns once per symptom, the method's own included, at the first logging step that shows it."""

    def __init__(self, symptoms: Sequence[Symptom] = ()):
        self.symptoms = (*SYMPTOMS, *symptoms)
        self.settled: set[str] = set()  # keys that are no longer checked

    def on_log(self, args, state, control, logs=None, **kwargs):
        for symptom in self.symptoms:
            value = (logs or {}).get(symptom.metric)
            if value is None or symptom.metric in self.settled:
                continue
            is_bad = symptom.is_bad(value)
            if is_bad or symptom.only_from_start:
                self.settled.add(symptom.metric)
            if is_bad and state.is_world_process_zero:
                logger.warning("%s (%s = %.2f at step %d)", symptom.advice, symptom.metric, value, state.global_step)
