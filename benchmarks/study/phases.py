"""Measure where the seconds of an update go."""

from __future__ import annotations

import functools
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback


class PhaseTimer(TrainerCallback):
    """
    Measures the seconds per update of generation, reward, log-probabilities of the old policy and of the reference,
    and of the rest, which is the update itself. `seconds` has one entry per update.

    The trainer is timed from now on, through the methods that its own code calls.
    """

    def __init__(self, trainer: Any):
        self.seconds: list[dict[str, float]] = []
        self._running: defaultdict[str, float] = defaultdict(float)
        self._began = 0.0
        self._scored = 0
        trainer._generate_single_turn = self._timed(trainer._generate_single_turn, lambda *_: "generation")
        trainer._calculate_rewards = self._timed(trainer._calculate_rewards, lambda *_: "reward")
        trainer._get_per_token_logps_and_entropies = self._timed(
            trainer._get_per_token_logps_and_entropies,
            lambda model, *_: (
                None if torch.is_grad_enabled() else "reference" if model is trainer.ref_model else "old"
            ),
        )
        trainer.add_callback(self)

    def on_step_begin(self, args, state, control, **kwargs):
        self._began = time.perf_counter()
        self._running.clear()

    def on_step_end(self, args, state, control, **kwargs):
        whole = time.perf_counter() - self._began
        self.seconds.append({**self._running, "update": whole - sum(self._running.values())})

    def _timed(self, method: Callable, phase_of: Callable[..., str | None]) -> Callable:
        @functools.wraps(method)
        def timed(*args, **kwargs):
            phase, began = phase_of(*args), time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                if phase is not None:
                    self._running[phase] += time.perf_counter() - began

        return timed
