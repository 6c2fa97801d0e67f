"""The progress table of a notebook, line by line; `notebooks/` shows it in a real one."""

import pytest
from transformers import TrainerState, TrainingArguments

from step_trl.monitor import RunStatus
from step_trl.monitor.notebook import NotebookView


@pytest.mark.parametrize("strategy", ["no", "steps"])
def test_a_line_has_the_headline(tmp_path, strategy):
    args = TrainingArguments(str(tmp_path), eval_strategy=strategy, eval_steps=1, use_cpu=True)
    view, state = NotebookView(RunStatus("SAS", {"reward": "reward", "steps": "sas/steps/mean"})), TrainerState()
    state.max_steps, state.epoch = 2, 0.0
    view.on_train_begin(args, state, None)
    for step, reward in ((1, 0.25), (2, 0.5)):
        state.global_step = step
        state.log_history.append({"loss": 0.125 * step, "step": step})
        view.on_log(args, state, None, logs={"loss": 0.125 * step, "reward": reward, "kl": 1.0})
        if strategy == "steps":
            metrics = {"eval_loss": 3.0, "eval_reward": reward, "eval_sas/steps/mean": 2.0, "eval_kl": 1.0}
            view.on_evaluate(args, state, None, metrics=metrics)
    losses, evaluated = (
        (["Training Loss"], "") if strategy == "no" else (["Training Loss", "Validation Loss"], "2.000")
    )
    validation = [3.0] * (strategy == "steps")
    assert view.training_tracker.inner_table == [
        ["Step", *losses, "reward", "steps"],
        [1, 0.125, *validation, "0.250", evaluated],
        [2, 0.25, *validation, "0.500", evaluated],
    ]
