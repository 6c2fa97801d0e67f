"""A real model, tokenizer and chat template, and rows as they are published."""

import json
import math

import pytest
from small_runs import SMALL_RUN
from transformers import AutoModelForCausalLM

from step_trl import SASConfig, SASTrainer, StepGRPOConfig, StepGRPOTrainer, testbed
from step_trl.data import load_problems


PUBLISHED = {
    "DAPO-Math-17k": [
        {
            "data_source": "math_dapo",
            "prompt": [{"role": "user", "content": f"Solve the problem. Answer: $Answer\n\nWhat is {a} + {b}?"}],
            "ability": "MATH",
            "reward_model": {"ground_truth": str(a + b), "style": "rule-lighteval/MATH_v2"},
            "extra_info": {"index": str(a)},
        }
        for a, b in ((3, 4), (3, 4), (20, 22), (5, 6))
    ],
    "DeepScaleR": [
        {"problem": f"What is {a} + {b}?", "answer": str(a + b), "solution": "Add."} for a, b in ((31, 14), (20, 22))
    ]
    + [{"problem": "Without an answer", "answer": "", "solution": ""}],
    "GSM8K": [
        {
            "question": f"Tom has {a} apples and buys {b}. How many has he?",
            "answer": f"{a} + {b} apples.\n#### {a + b}",
        }
        for a, b in ((3, 4), (20, 22))
    ],
}
OPTIONS = SMALL_RUN | {
    "num_generations": 2,
    "per_device_train_batch_size": 2,
    "max_completion_length": 24,
}


def load(tmp_path, name):
    path = tmp_path / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PUBLISHED[name]))
    return load_problems(path)


@pytest.mark.parametrize(
    ("trainer_class", "config", "data"),
    [
        # Triggers that any English text has, so that probes run.
        (
            StepGRPOTrainer,
            lambda path: StepGRPOConfig(
                path, triggers=["the", "is", "of", "a", "to", "and"], **OPTIONS | {"max_completion_length": 40}
            ),
            "DAPO-Math-17k",
        ),
        (SASTrainer, lambda path: SASConfig(path, **OPTIONS), "GSM8K"),
    ],
    ids=["step_grpo", "sas"],
)
@pytest.mark.xdist_group("smollm2")
def test_one_step_on_smollm2(tmp_path, smollm2, trainer_class, config, data):
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype="float32")
    trainer = trainer_class(model, args=config(str(tmp_path)), train_dataset=load(tmp_path, data))
    trainer.train()
    logs = trainer.state.log_history[0]
    assert math.isfinite(logs["loss"])
    if trainer_class is StepGRPOTrainer:
        assert logs["step_grpo/probes_per_completion"] > 0


@pytest.mark.parametrize("name", PUBLISHED)
def test_one_step_on_published_columns(tmp_path, name):
    rows = load(tmp_path, name)
    assert len(rows) == {"DAPO-Math-17k": 3, "DeepScaleR": 2, "GSM8K": 2}[name]
    trainer = StepGRPOTrainer(
        testbed.load_model(),
        args=StepGRPOConfig(str(tmp_path), **OPTIONS),
        train_dataset=rows,
        processing_class=testbed.load_tokenizer(),
    )
    trainer.train()
    assert math.isfinite(trainer.state.log_history[0]["loss"])
