"""Train on pairs of recorded rollouts by direct preference optimisation (VerIPO, arXiv 2505.19000)."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pandas as pd
from accelerate import PartialState
from transformers import AutoProcessor
from trl import ModelConfig, get_peft_config, get_quantization_config

from ..evaluation.consistency import ConsistencyJudge
from ..preferences import (
    RolloutDPOTrainer,
    RolloutVerifier,
    latest_groups,
    preference_pairs,
    read_rollouts,
    summarize_verification,
    tokenize_pairs,
    visual_pairs,
)
from ..text import tokenizer_of
from .arguments import DPOArguments, PreferenceConfig
from .fine_tuning import print_figures, starting_model, train_and_save
from .sources import load_rows


PAIRS, VERIFICATION = "pairs.parquet", "verification.json"


def prefer(rollouts: Path, arguments: DPOArguments, model: ModelConfig, config: PreferenceConfig) -> None:
    """
    Verify the last recorded rollouts of each prompt, pair them, and train on the pairs.

    The pairs are written to `pairs.parquet` in `config.output_dir`, and what was found to `verification.json`. The
    policy that the training starts from is its reference. The first process verifies; the others wait for it for up to
    `ddp_timeout` seconds.

    Args:
        rollouts (`Path`):
            The folder of a training that has recorded rollouts.
        arguments ([`DPOArguments`]), model ([`~trl.ModelConfig`]), config ([`PreferenceConfig`]):
            The fields of a recipe.
    """
    name, output_dir = starting_model(model, config), Path(str(config.output_dir))
    state = PartialState()
    if state.is_main_process:
        make_pairs(rollouts, arguments, output_dir)
    state.wait_for_everyone()
    processor = AutoProcessor.from_pretrained(name, trust_remote_code=config.trust_remote_code)
    pairs = pd.read_parquet(output_dir / PAIRS)
    about_images = pairs["images"].ne("").any()
    trainer = RolloutDPOTrainer(
        name,
        args=config,
        train_dataset=visual_pairs(pairs, load_rows(arguments))
        if about_images
        else tokenize_pairs(pairs, tokenizer_of(processor)),
        processing_class=processor,
        quantization_config=get_quantization_config(model),
        peft_config=get_peft_config(model),
    )
    train_and_save(trainer)


def make_pairs(rollouts: Path, arguments: DPOArguments, output_dir: Path) -> None:
    """Write the pairs of the rollouts in a folder, and what was found, and print the latter."""
    judge = None
    if arguments.judge_url is not None and arguments.judge_model is not None:
        judge = ConsistencyJudge(arguments.judge_url, arguments.judge_model, api_key=os.environ.get("JUDGE_API_KEY"))
    verifier = RolloutVerifier(arguments.max_repetition, arguments.max_length_ratio, judge)
    verified = verifier.verify(latest_groups(read_rollouts(rollouts)))
    pairs = preference_pairs(verified, reuse_chosen=arguments.reuse_chosen, reflection=arguments.reflection)
    output_dir.mkdir(parents=True, exist_ok=True)
    found = report_verification(verified, output_dir, pairs)
    pairs.to_parquet(output_dir / PAIRS, index=False)
    if pairs.empty:
        raise ValueError(
            f"rollouts: none of {found['groups']} groups in {rollouts} gives a pair: it needs a clean completion and "
            "one that is not. Record more rollouts, or set other limits (max_repetition, max_length_ratio)."
        )


def report_verification(verified: pd.DataFrame, output_dir: Path, pairs: pd.DataFrame | None = None) -> dict[str, Any]:
    """Print and return what was found in verified rollouts, and write it to `verification.json` in `output_dir`."""
    found = summarize_verification(verified, pairs)
    print_figures(found)
    (output_dir / VERIFICATION).write_text(json.dumps(found, indent=1) + "\n")
    return found
