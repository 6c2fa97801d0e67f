"""The main job at its smallest, through the command."""

import json

import matplotlib.image
import pytest

from step_trl.cli import demo
from step_trl.cli.main import main


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_demo_writes_summary_and_picture(tmp_path, capsys, monkeypatch, engine):
    monkeypatch.setitem(demo.TRAINING, "gradient_accumulation_steps", 1)
    monkeypatch.setitem(demo.EVALUATION, "max_tokens", 160)
    monkeypatch.setattr(demo, "MAX_COMPLETION_LENGTH", 160)
    folder = tmp_path / "demo"
    folder.mkdir()
    (folder / "mine.txt").write_text("an earlier run")
    main(["demo", "--output-dir", str(folder), "--problems", "2", "--max-steps", "1", "--engine", engine])
    summary = json.loads((folder / "summary.json").read_text())
    assert summary.keys() == {"vanilla", "step_grpo", "sas", "seconds"}
    for name in ("vanilla", "step_grpo", "sas"):
        assert 0 <= summary[name]["accuracy"] <= 1
        assert summary[name]["tokens"] > 0 and summary[name]["steps"] >= 1
    assert summary["vanilla"]["cr"] == 1 and summary["vanilla"]["aes"] == 0
    assert matplotlib.image.imread(folder / "report.png").shape[1] > 1000
    assert (folder / "step_grpo" / "model.safetensors").exists()
    assert (tmp_path / "demo.1" / "mine.txt").read_text() == "an earlier run"
    table = capsys.readouterr().out
    assert all(word in table for word in ("easy", "hard", "unseen", "overall", "accuracy", "cr", "aes"))
