"""A method from outside the package: as `CONTRIBUTING.md` says, it takes a trainer, a configuration, and a line."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from small_runs import TESTBED_RUN, flags

from step_trl import EfficientReasoningConfig, EfficientReasoningTrainer
from step_trl.cli.main import main
from step_trl.monitor.workspace import merged_charts
from step_trl.trainers import METHODS


@dataclass
class ToyConfig(EfficientReasoningConfig):
    patience: float = field(default=0.5, metadata={"help": "Factor on the advantages of failed completions."})

    def describe(self):
        return [*super().describe(), f"failures count {self.patience:g}"]


class ToyTrainer(EfficientReasoningTrainer):
    """A trainer with all four hooks."""

    _name = "Toy"
    config_class = ToyConfig
    metric_prefixes = ("toy",)
    charts = {"Efficient reasoning": {"toys": ["toy/seen"]}}

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._add_reward_column("brevity", 0.1)
        self.called = []

    def sample(self, batch):
        self.called.append("sample")
        assert len(batch.prompt_ids) == len(batch.rows) == 10
        return None

    def reward_columns(self, batch):
        self.called.append("reward_columns")
        assert batch.groups.tolist() == [0] * 5 + [1] * 5
        return {"brevity": -batch.gather([float(len(ids)) for ids in batch.completion_ids])}

    def credit(self, batch, advantages):
        self.called.append("credit")
        return advantages * torch.where(batch.local(batch.correct), 1, self.args.patience)

    def before_loss(self, inputs, logps):
        self.called.append("before_loss")
        self.log_masked_means({"toy/seen": (inputs["correct"].float(), torch.ones_like(inputs["correct"]))})


def test_a_method_from_outside_trains(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(METHODS, "toy", (ToyTrainer, ToyConfig))
    made = []
    monkeypatch.setattr(ToyTrainer, "train", lambda self, **how: made.append(self) or super(ToyTrainer, self).train())
    options = TESTBED_RUN | {"output_dir": tmp_path / "run", "patience": 0.25, "save_strategy": "steps"}
    arguments = ["train", "--trainer", "toy", *flags(options), "--save_steps", "1"]
    for dry_run in (True, False):
        try:
            main([*arguments, "--dry-run"] if dry_run else arguments)
        except SystemExit as ended:
            assert not ended.code
    assert "failures count 0.25" in capsys.readouterr().out
    (trainer,) = made
    assert trainer.called == ["sample", "reward_columns", "credit", "before_loss"]
    logs = trainer.state.log_history[0]
    assert logs["rewards/brevity/mean"] == -logs["completions/mean_length"] and "toy/seen" in logs
    card = (Path(trainer.args.output_dir) / "README.md").read_text()
    assert "| `patience` | `0.25` |" in card and "`toy/seen`" in card
    assert merged_charts([trainer])["Efficient reasoning"]["toys"] == ["toy/seen"]
