"""
Train a start for arms that add text to what the model reads: a length (L1, ThinkPrune, LAPO) or a cut (S-GRPO).

The testbed model has never seen such text and fails after it; the models that those papers train do not.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

import datasets
from testbed_model.traces import TRIGGERS
from transformers import PreTrainedTokenizerBase

from step_trl import testbed
from step_trl.cli.arguments import FineTuningConfig
from step_trl.cli.demo import MAX_COMPLETION_LENGTH
from step_trl.cli.distill import keep_right
from step_trl.cli.fine_tuning import fine_tune
from step_trl.data import build_prompt, training_example
from step_trl.evaluation import evaluate
from step_trl.rollout import RandomCut
from step_trl.text import THINK_END
from step_trl.token_targets import ask_for_tokens
from step_trl.trainers.lapo import state_length

from .arms import LIMIT_PROMPT, SHORT_CONTEXT


Form = Literal["none", "l1-exact", "l1-max", "thinkprune", "lapo-i", "s-grpo"]


def prompt_ids(form: Form, messages: list[dict], tokens: int, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the token ids of a prompt that asks for `tokens` as the arm `form` does, up to the completion."""
    if form in ("l1-exact", "l1-max"):
        messages = ask_for_tokens(messages, tokens, at_most=form == "l1-max")
    elif form == "thinkprune":
        messages = build_prompt(messages, None, LIMIT_PROMPT.format(tokens))
    ids = cast("list[int]", tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
    return state_length(ids, tokens, tokenizer) if form == "lapo-i" else ids


def cut_off(completion: str, rng: random.Random) -> tuple[str, str]:
    """
    Return a correct completion that S-GRPO's words end early, followed by the answer.

    The cut is before a trigger word, after the problem has been worked through, or at the end of the thought.
    """
    thought, _, answer = completion.partition(f"\n{THINK_END}\n\n")
    ends = [match.start() for match in re.finditer(TRIGGERS, thought)] or [len(thought)]
    return thought[: rng.choice(ends)].rstrip() + RandomCut.closing, answer


def teach_prompts(output_dir: Path, seed: int, problems: int, forms: Sequence[Form], **training: Any) -> None:
    """
    Fine-tune the vanilla model on its own correct completions, after such text.

    Lengths are drawn at random, independent of the completion's length: the model should keep its answers with such
    prompts, but learn nothing about lengths before it is rewarded for them.

    The first `problems` of the training set are sampled once each, to `samples/` in `output_dir`; one of the `forms`
    is drawn for each completion. `training` are fields of [`~step_trl.cli.arguments.FineTuningConfig`].
    """
    rows = testbed.load_dataset("train").select(range(problems))
    samples = evaluate(
        testbed.MODEL_DIR, {"train": rows}, seeds=[seed], temperature=1.0, top_p=1.0,
        max_tokens=MAX_COMPLETION_LENGTH, save_to=output_dir / "samples",
    )  # fmt: skip
    rng, tokenizer = random.Random(seed), testbed.load_tokenizer()
    taught = []
    for problem, completion in keep_right(samples)[["problem", "completion"]].itertuples(index=False):
        prompt = rows[int(problem)]["prompt"]
        form = rng.choice(forms)
        ids = prompt_ids(form, prompt, rng.randint(1, SHORT_CONTEXT), tokenizer)
        if form == "s-grpo":
            thought, completion = cut_off(completion, rng)
            ids += tokenizer.encode(thought, add_special_tokens=False)
        answer = [*tokenizer.encode(completion, add_special_tokens=False), tokenizer.eos_token_id]
        taught.append(training_example(ids, answer))
    config = FineTuningConfig(str(output_dir), seed=seed, **training)
    fine_tune(str(testbed.MODEL_DIR), datasets.Dataset.from_list(taught), tokenizer, config)
