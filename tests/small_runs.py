"""Training options of the smallest run on a CPU, for all trainers, and how a command refuses what is wrong."""

import re
from contextlib import contextmanager

import pytest


SMALL_RUN = {
    "max_steps": 1,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "use_cpu": True,
}
# The testbed in place of the model and data of a recipe, and lengths that fit it.
TESTBED_RUN = SMALL_RUN | {
    "model_name_or_path": "testbed",
    "dtype": "float32",
    "dataset": "testbed",
    "dataset_split": "easy",  # which is read faster than thousands of problems
    "max_completion_length": 32,
    "per_device_train_batch_size": 10,
    "gradient_accumulation_steps": 1,
    "steps_per_generation": 1,
    "num_generations": 5,
    "use_vllm": False,
}
# Of a recipe that samples and then trains on what is right.
DISTILL_RUN = SMALL_RUN | {
    "model_name_or_path": "testbed",
    "dtype": "float32",
    "dataset": "testbed",
    "dataset_split": "easy",
    "limit": 8,
    "n": 2,
    "max_tokens": 200,
    "engine": "transformers",
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
}


def every_other(completions, **_):
    """A reward that gives every group a learning signal."""
    return [float(number % 2) for number in range(len(completions))]


def flags(options):
    """Return options as command-line arguments."""
    lists = {name: value if isinstance(value, list) else [value] for name, value in options.items()}
    return [text for name, values in lists.items() for text in (f"--{name}", *map(str, values))]


@contextmanager
def refused(capsys, message):
    """Check that `step-trl` exits with status 2 and a matching message, in one line without a traceback."""
    with pytest.raises(SystemExit) as ended:
        yield
    told = capsys.readouterr().err
    assert ended.value.code == 2
    assert re.search(rf"^step-trl \w+: error: .*{message}", told, re.MULTILINE | re.DOTALL) and "Traceback" not in told
