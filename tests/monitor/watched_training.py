"""A short training, to be watched from outside: `watched_training.py FOLDER [fail]`."""

import sys

from small_runs import SMALL_RUN
from transformers import TrainerCallback

from step_trl import StepGRPOConfig, StepGRPOTrainer, testbed


class Failure(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        raise RuntimeError("no more")


args = StepGRPOConfig(
    sys.argv[1],
    **SMALL_RUN | {"max_steps": 2, "disable_tqdm": False},
    max_completion_length=256,
    num_generations=4,
    per_device_train_batch_size=8,
)
trainer = StepGRPOTrainer(
    testbed.load_model(),
    args=args,
    train_dataset=testbed.load_dataset("easy"),
    processing_class=testbed.load_tokenizer(),
    callbacks=[Failure()] if "fail" in sys.argv else None,
)
trainer.train()
