"""
A start for arms that ask for a length in words (L1, ThinkPrune, LAPO).

The testbed model has never read such words and fails under them; the models that those papers train do not.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, cast

import datasets
from transformers import PreTrainedTokenizerBase

from .. import testbed
from ..budgets import ask_for_tokens
from ..data import build_prompt
from ..demo import MAX_COMPLETION_LENGTH
from ..distill import fine_tune, training_row
from ..evaluation import evaluate
from ..trainers.lapo import state_length
from .arms import LIMIT_PROMPT, SHORT_CONTEXT


FORMS = ("none", "l1-exact", "l1-max", "thinkprune", "lapo-i")


def prompt_ids(form: str, messages: list[dict], tokens: int, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a prompt that asks for `tokens` as the arm `form` does, up to where the completion begins."""
    if form in ("l1-exact", "l1-max"):
        messages = ask_for_tokens(messages, tokens, at_most=form == "l1-max")
    elif form == "thinkprune":
        messages = build_prompt(messages, None, LIMIT_PROMPT.format(tokens))
    ids = cast("list[int]", tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
    return state_length(ids, tokens, tokenizer) if form == "lapo-i" else ids


def teach_prompts(output_dir: Path, seed: int, problems: int, **training: Any) -> None:
    """
    Fine-tune the vanilla model on its own right completions, behind prompts with lengths.

    The lengths are drawn at random, whatever the completion's is: the model is to keep its answers under such prompts,
    and to learn nothing about lengths before it is rewarded for them.

    Args:
        output_dir (`Path`):
            For the model; the samples go to `samples/` in it.
        seed (`int`):
            Of samples, lengths and training.
        problems (`int`):
            First problems of the training set, one sample each.
        **training:
            Fields of [`~trl.SFTConfig`].
    """
    rows = testbed.load_dataset("train").select(range(problems))
    samples = evaluate(
        testbed.MODEL_DIR, {"train": rows}, seeds=[seed], temperature=1.0, top_p=1.0,
        max_tokens=MAX_COMPLETION_LENGTH, save_to=output_dir / "samples",
    )  # fmt: skip
    right = samples[samples["correct"].astype(bool) & (samples["finish_reason"] == "eos")]
    rng, tokenizer = random.Random(seed), testbed.load_tokenizer()
    taught = []
    for problem, completion in right[["problem", "completion"]].itertuples(index=False):
        prompt = rows[int(problem)]["prompt"]
        ids = prompt_ids(rng.choice(FORMS), prompt, rng.randint(1, SHORT_CONTEXT), tokenizer)
        taught.append(training_row(ids, completion, tokenizer))
    model = str(testbed.MODEL_DIR)
    fine_tune(model, datasets.Dataset.from_list(taught), tokenizer, output_dir, seed=seed, **training)
