"""A group that is split over two processes is scored as one."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from step_trl.steps import TriggerSegmenter


def test_a_group_split_over_ranks(tmp_path, tokenizer):
    script = Path(__file__).with_name("split_group.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([*command, str(tmp_path / "out")], check=True, env=environment, timeout=600)
    first, second = (json.loads((tmp_path / f"out.{rank}.json").read_text()) for rank in (0, 1))

    assert first["columns"] == second["columns"]
    assert len(first["columns"]) == 8
    correct = [row[0] > 0.5 for row in first["columns"]]
    assert first["correct"] + second["correct"] == correct
    assert any(correct)
    segmenter = TriggerSegmenter(tokenizer)
    steps = [1 + segmenter.count(ids) for ids in first["ids"] + second["ids"]]
    mu = sum(k for k, right in zip(steps, correct) if right) / sum(correct)
    efficiency = [-0.5 * math.tanh((k - mu) / mu) if right else 0.0 for k, right in zip(steps, correct)]
    assert [row[2] for row in first["columns"]] == pytest.approx(efficiency, abs=1e-6)
    lengths = [len(ids) for ids in first["ids"] + second["ids"]]
    lam = [0.5 - (length - min(lengths)) / (max(lengths) - min(lengths)) for length in lengths]
    kimi = [value if right else min(0.0, value) for value, right in zip(lam, correct)]
    assert [row[1] for row in first["columns"]] == pytest.approx(kimi, abs=1e-6)

    rewards = [sum(w * r for w, r in zip(first["weights"], row)) for row in first["columns"]]
    mean = sum(rewards) / 8
    std = math.sqrt(sum((reward - mean) ** 2 for reward in rewards) / 7)
    advantages = [(reward - mean) / (std + 1e-4) for reward in rewards]
    assert first["advantages"] + second["advantages"] == pytest.approx(advantages, abs=1e-4)
