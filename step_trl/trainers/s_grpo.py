"""
S-GRPO: groups of exits from one thought (arXiv 2505.07686).

Departures from GRPO:
1. Rollout: a group is one whole completion and answers from random places of its thought, in the order of the places.
2. Reward: the first correct answer of a group earns 1, each later one half of the one before, a wrong one 0.
3. Advantage: the reward less the group's mean, not divided by its standard deviation.
"""

from __future__ import annotations

import textwrap

from ..rollout import SerialGroupRollout
from .s_grpo_config import SGRPOConfig
from .step_grpo import StepGRPOTrainer


class SGRPOTrainer(StepGRPOTrainer):
    """
    Trainer for S-GRPO.

    S-GRPO (arXiv 2505.07686) rewards the earliest point of a thought from which the model answers correctly. Changes
    with respect to [`~trl.GRPOTrainer`]: how training completions are generated, and one more reward column,
    `s_grpo_length_reward`.

    Takes the arguments of [`EfficientReasoningTrainer`], with `args` an [`SGRPOConfig`], except for `rollout_func`.
    """

    _tag_names = ["trl", "s-grpo"]
    _name = "S-GRPO"
    _paper = {
        "title": "S-GRPO: Early Exit via Reinforcement Learning in Reasoning Models",
        "id": "2505.07686",
        "citation": textwrap.dedent("""\
            @article{dai2025sgrpo,
                title        = {{S-GRPO: Early Exit via Reinforcement Learning in Reasoning Models}},
                author       = {Dai, Muzhi and Yang, Chenxu and Si, Qingyi},
                year         = 2025,
                eprint       = {arXiv:2505.07686},
            }
            """),
    }
    _samples_with_images = False
    config_class = SGRPOConfig
    args: SGRPOConfig

    def _check_who_samples(self, truncation_callbacks):
        for name, given in (("rollout_func", self.rollout_func), ("truncation_callbacks", truncation_callbacks)):
            if given is not None:
                raise ValueError(f"{name}: S-GRPO samples whole groups itself. Leave it out, or use StepGRPOTrainer.")

    def sample(self, batch):
        with self.policy_engine() as engine:
            rollout = SerialGroupRollout(engine, self.sampling_params, max_in_flight=self.args.max_rollouts_in_flight)
            rollouts = rollout.run(batch.prompt_ids, batch.num_generations, self.seeds(len(batch.prompt_ids)))
        self._log_rollouts(rollouts)
        return rollouts
