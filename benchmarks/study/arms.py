"""
The arms that are compared. An arm is a trainer with options; all share a number of updates and `demo.TRAINING`.

Tuning protocol, fixed before the runs: the learning rate, the schedule, the batch and the short context are those of
the demo. They were chosen once, for all arms together, on the last 128 problems of each evaluation set; the study
evaluates on the first 128. No arm has its own options except for the comparison itself, and for the contexts and the
price of `spo-tree-128` and `spo-tree-priced-160`, which `benchmarks/recommend.py` has chosen on the last 128 problems.
Constants that are numbers of tokens in the papers (L1, LAPO, ThinkPrune) are scaled by the ratio of the short
contexts, 224 to 4,096.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from step_trl.rollout import ConfidenceTruncation
from step_trl.text import THINK_END


SHORT_CONTEXT = 224  # tokens, about the vanilla model's mean length


@dataclass(frozen=True)
class Arm:
    """
    One way to train.

    Attributes:
        name (`str`), tables (`tuple[str, ...]`):
            The name of its folder and its row, and the tables in which it appears.
        method (`str`), options (`dict[str, Any]`):
            A key of [`~step_trl.trainers.METHODS`], `"distill"`, `"dpo"`, or `"prompts"` for
            [`~study.prompted.teach_prompts`], and the fields of its configuration. `easy_prompts` is a share of the
            prompts that the recorded rollouts of an arm that it starts from have solved, `reward_funcs` are dotted
            paths.
        budget (`float`):
            The number of updates, relative to that of the study.
        sweep (`bool`):
            Whether one seed is enough when time is short.
        checkpoints (`int`):
            How many times the model is evaluated during training, in addition to the end.
        stages (`tuple[dict[str, Any], ...]`):
            The options of stages that share the updates, each starting from the model of the previous one.
            `system_prompt` is one of them.
        targets (`tuple[int, int]`, *optional*):
            The range of the lengths that prompts ask for. In the evaluation, they ask for the middle.
        start (`Arm`, *optional*):
            The arm from whose model with the same seed it starts, by default the vanilla model.
    """

    name: str
    method: str
    options: dict[str, Any] = field(default_factory=dict)
    tables: tuple[str, ...] = ()
    budget: float = 1.0
    sweep: bool = False
    checkpoints: int = 0
    stages: tuple[dict[str, Any], ...] = ({},)
    targets: tuple[int, int] | None = None
    start: Arm | None = None


_STEP_GRPO, _PARTS, _THRESHOLD = "Step-GRPO, table 1", "Step-GRPO, table 2", "Step-GRPO, table 6"
_OPEN = "Step-GRPO, open choices"
_SAS, _SAS_PARTS, _RATIO, _LONG = "SAS, table 1", "SAS, tables 3 and 4", "SAS, ratio", "SAS, figures 2 and 3"
_FAMILY = "SEED-GRPO and NFT"
_SAMPLED = "SPO, Critique-GRPO and GVM"
_NEWER = "LEAD, DLER and SPAE"
_BETTER = "Better than both papers"
_THINK_OR_NOT, _VERIFIED = "TON", "VerIPO"
THOUGHT_TABLES = {_THINK_OR_NOT, _VERIFIED}  # tables about what thoughts are skipped or contradict their answers
METHODS = {_STEP_GRPO: "step-grpo", _SAS: "sas"}  # tables of the two papers, and their own arms
# One arm for each choice that a user has, all after as many updates from the vanilla model. Left out: parts of a
# method, sweeps, cold starts, and models that are told a number of tokens.
COMPARED = (
    *("grpo", "grpo-short", "dr-grpo", "step-grpo", "step-grpo-released", "sas", "step-grpo+sas"),
    *("grpo-lp", "grpo-sop", "grpo-lambda", "train-efficiently", "lapo-d", "s-grpo", "deer-sft"),
    *("seed-0.02", "nft-2x", "gvm-grpo", "critique-grpo", "spo-chain", "spo-tree", "spo-tree-128"),
    *("spo-tree-priced-160", "lead", "dler", "spae", "ton", "veripo-grpo-2"),
)
_LATER_RULE = {"failed_step_advantage": 0.0}
SHORT: dict[str, Any] = {"max_completion_length": SHORT_CONTEXT}
_DR_GRPO = SHORT | {"loss_type": "dr_grpo", "scale_rewards": "none"}
_TWICE = {"num_iterations": 2}  # where NFT differs from Dr.GRPO
CLOSED = {"require_end_of_thinking": True}  # the reward of SASTrainer, which its baselines share
_SCALE = SHORT_CONTEXT / 4096
_L1_ALPHA = {"alpha": 0.0003 / _SCALE}
_L1_TARGETS = (round(100 * _SCALE), round(4000 * _SCALE))
_LEAD = {"shortest_target": round(1000 * SHORT_CONTEXT / 8000)}  # of the limit of its paper
_SPAE = {"answer_prompt": f"\n{THINK_END}\n\nThe final answer is \\boxed{{"}  # how the testbed's model answers
_CHAIN = {"value_samples": 4, "max_segments": 2}
PRICED = {"reward_funcs": ["study.rewards.priced_reward"]}
TREE = {"structure": "tree", "branching": [3, 3, 3], "segment_tokens": 40}
_LAPO = (
    {"lapo_stage": "discovery", "length_reward_options": {"decay": 100 * _SCALE}},
    {"lapo_stage": "internalization", "length_reward_options": {"sigma": 120 * _SCALE}},
)
LIMIT_PROMPT = "Think, then answer, within {} tokens."
_LIMITS = tuple(round(limit * _SCALE) for limit in (4096, 3072, 2048))
_PROMPTED = Arm("prompted", "prompts", {"forms": ("none", "l1-exact", "l1-max", "thinkprune", "lapo-i")}, (_SAS,))
_PROMPTED_CUTS = Arm("prompted-cuts", "prompts", {"forms": ("none", "s-grpo")}, (_STEP_GRPO,))
_TON_SFT = Arm(
    "ton-sft", "distill", {"thought_dropout": 0.5, "confidence": 1.0, "num_train_epochs": 2}, (_THINK_OR_NOT,)
)
_VERIPO_GRPO = Arm("veripo-grpo-1", "grpo", {"record_rollouts": True}, (_VERIFIED,))
# Of 1e-5, 3e-5 and 1e-4, the largest learning rate that kept the accuracy on the last 128 problems of each set.
_VERIPO_DPO = Arm(
    "veripo-dpo", "dpo", {"reflection": True, "learning_rate": 1e-5, "num_train_epochs": 1}, (_VERIFIED,),
    start=_VERIPO_GRPO,
)  # fmt: skip

ARMS: tuple[Arm, ...] = (
    Arm("grpo", "grpo", {}, (_STEP_GRPO, _THINK_OR_NOT)),
    Arm("grpo-short", "grpo", SHORT, (_STEP_GRPO, _SAMPLED)),
    Arm("grpo-short-closed", "grpo", SHORT | CLOSED, (_SAS, _SAS_PARTS)),
    Arm("step-grpo", "step_grpo", {}, (_STEP_GRPO, _PARTS, _THRESHOLD, _OPEN, _BETTER)),
    Arm("step-grpo-released", "step_grpo", ConfidenceTruncation.released(), (_STEP_GRPO, _BETTER)),
    Arm("sas", "sas", _LATER_RULE, (_SAS, _SAS_PARTS, _RATIO, _BETTER)),
    Arm("sas-failed-1", "sas", {"failed_step_advantage": 1.0}, (_SAS, _SAS_PARTS)),
    Arm("step-grpo+sas", "step_grpo", {"advantage_selection": _LATER_RULE}, (_STEP_GRPO,)),
    Arm("step-grpo+sas-closed", "step_grpo", {"advantage_selection": _LATER_RULE, **CLOSED}, (_SAS,)),
    Arm("grpo-lp", "grpo", {"length_reward": "kimi"}, (_STEP_GRPO,)),
    Arm("grpo-sop", "grpo", {"length_reward": "soft_overlong"}, (_STEP_GRPO,)),
    Arm("grpo-lambda", "grpo", {"length_reward": "grpo_lambda"}, (_STEP_GRPO,)),
    _PROMPTED_CUTS,
    Arm("s-grpo", "s_grpo", {}, (_STEP_GRPO,), start=_PROMPTED_CUTS),
    Arm("deer-sft", "distill", {}, (_STEP_GRPO,)),
    Arm("train-efficiently", "grpo", {**SHORT, **CLOSED, "length_reward": "train_efficiently"}, (_SAS,)),
    _PROMPTED,
    Arm(
        "l1-exact", "grpo", {**SHORT, **CLOSED, "length_reward": "l1_exact", "length_reward_options": _L1_ALPHA},
        (_SAS,), targets=_L1_TARGETS, start=_PROMPTED,
    ),
    Arm(
        "l1-max", "grpo", {**SHORT, **CLOSED, "length_reward": "l1_max", "length_reward_options": _L1_ALPHA},
        (_SAS,), targets=_L1_TARGETS, start=_PROMPTED,
    ),
    Arm("lapo-d", "lapo", {**SHORT, **CLOSED, **_LAPO[0]}, (_SAS,)),
    Arm("lapo-i", "lapo", SHORT | CLOSED, (_SAS,), stages=_LAPO, start=_PROMPTED),
    Arm(
        "thinkprune", "grpo", CLOSED, (_SAS,),
        stages=tuple(
            {"max_completion_length": limit, "system_prompt": LIMIT_PROMPT.format(limit)} for limit in _LIMITS
        ),
        start=_PROMPTED,
    ),
    Arm("no-step-reward", "step_grpo", {"step_reward": False}, (_PARTS,)),
    Arm("no-truncation", "step_grpo", {"truncated_rollout": False}, (_PARTS,)),
    Arm("mean-of-all", "step_grpo", {"step_baseline": "all"}, (_PARTS,)),
    Arm("sas-correct", "sas", {**_LATER_RULE, "selection": "correct"}, (_SAS_PARTS,)),
    Arm("sas-random", "sas", {**_LATER_RULE, "criterion": "random"}, (_SAS_PARTS,)),
    Arm("sas-token", "sas", {**_LATER_RULE, "granularity": "token"}, (_SAS_PARTS,)),
    Arm("sas-released-slip", "sas", {**_LATER_RULE, "selection_bug_compatible": True}, (_SAS_PARTS,)),
    Arm("trigger-dropped", "step_grpo", {"keep_trigger": False}, (_OPEN,), sweep=True),
    Arm("injected-not-trained", "step_grpo", {"train_on_injected_tokens": False}, (_OPEN,), sweep=True),
    *(
        Arm(f"threshold-{threshold}", "step_grpo", {"confidence_threshold": threshold}, (_THRESHOLD,), sweep=True)
        for threshold in (0.8, 0.9, 0.99)
    ),
    *(
        Arm(f"ratio-{ratio}", "sas", {**_LATER_RULE, "selection_ratio": ratio}, (_RATIO,), sweep=True)
        for ratio in (0.1, 0.5, 0.7, 0.9)
    ),
    Arm("dr-grpo", "grpo", _DR_GRPO, (_FAMILY, _SAMPLED)),
    Arm("seed-0.02", "seed_grpo", SHORT | {"alpha": 0.02}, (_FAMILY,)),
    Arm("seed-1", "seed_grpo", SHORT | {"alpha": 1.0}, (_FAMILY,)),
    Arm("dr-grpo-2x", "grpo", _DR_GRPO | _TWICE, (_FAMILY,)),
    Arm("nft-2x", "nft", SHORT | _TWICE, (_FAMILY,)),
    Arm("gvm-grpo", "gvm", SHORT | {"loss": "grpo"}, (_SAMPLED,)),
    Arm("gvm-grpo-half", "gvm", SHORT | {"loss": "grpo"}, (_SAMPLED,), 0.5),
    Arm("critique-grpo", "critique_grpo", SHORT, (_SAMPLED,)),
    Arm("spo-tree", "spo", SHORT | TREE, (_SAMPLED, _BETTER)),
    # The two best of benchmarks/recommend.py.
    Arm("spo-tree-128", "spo", TREE | {"max_completion_length": 128}, (_BETTER,)),
    Arm("spo-tree-priced-160", "spo", TREE | PRICED | {"max_completion_length": 160}, (_BETTER,)),
    Arm("spo-chain", "spo", SHORT | _CHAIN, (_SAMPLED,)),
    Arm("spo-chain-all-tokens", "spo", SHORT | _CHAIN | {"probability_mask": None}, (_SAMPLED,)),
    Arm("lead", "lead", SHORT | _LEAD, (_NEWER,)),
    Arm("dler", "dler", SHORT, (_NEWER,)),
    Arm("spae", "spae", _SPAE, (_NEWER,)),
    _TON_SFT,
    Arm("ton", "grpo", {}, (_THINK_OR_NOT,), start=_TON_SFT),
    _VERIPO_GRPO,
    _VERIPO_DPO,
    Arm("veripo-grpo-2", "grpo", {"easy_prompts": 0.2}, (_VERIFIED,), start=_VERIPO_DPO),
    Arm("grpo-short-long", "grpo", SHORT | CLOSED, (_LONG,), 5.0, True, 4),
    Arm("sas-long", "sas", _LATER_RULE, (_LONG,), 5.0, True, 4),
)  # fmt: skip


def jobs(seeds: Sequence[int], names: Sequence[str] = ()) -> list[tuple[Arm, int]]:
    """
    Return arms and seeds in running order: first the arms of the tables, one seed at a time, then the sweeps.

    `names` are the arms to run, by default all.
    """
    unknown = set(names) - {arm.name for arm in ARMS}
    if unknown:
        raise ValueError(f"arms: {sorted(unknown)} are not known. Choose from {', '.join(arm.name for arm in ARMS)}.")
    chosen = [arm for arm in ARMS if not names or arm.name in names]
    tables, sweeps = [arm for arm in chosen if not arm.sweep], [arm for arm in chosen if arm.sweep]
    order = [(arm, seed) for seed in seeds for arm in tables]
    return order + [(arm, seed) for seed in seeds for arm in sweeps]
