"""`step-trl eval`, on a local folder in the published format and on the testbed model."""

import json

import pandas as pd
import pytest

from step_trl import testbed
from step_trl.cli import main
from step_trl.rollout.engines import EngineError


@pytest.fixture
def source(tmp_path):
    """Problems of the testbed as GSM8K is published."""
    rows = testbed.load_dataset("easy").select(range(5))
    folder = tmp_path / "source" / "gsm8k" / "main"
    folder.mkdir(parents=True)
    lines = [
        json.dumps({"question": row["prompt"][0]["content"], "answer": f"worked\n#### {row['solution']}"})
        for row in rows
    ]
    (folder / "test.jsonl").write_text("\n".join(lines))
    return folder.parents[1]


def run(report, source, *further):
    arguments = ["--model", str(testbed.MODEL_DIR), "--benchmarks", "gsm8k", "testbed-unseen", "--limit", "4"]
    arguments += ["--source", str(source), "--max-tokens", "320", "--report", str(report), *further]
    main(["eval", *arguments])


def test_in_process(tmp_path, source, capsys):
    vanilla, deer = tmp_path / "vanilla", tmp_path / "deer"
    run(vanilla, source, "--n", "2")
    run(deer, source, "--n", "2", "--truncate", "--vanilla", str(vanilla))
    names = {path.name for path in deer.iterdir()}
    assert names == {"samples-000000.parquet", "settings.json", "summary.csv", "summary.md", "report.png"}
    summary = pd.read_csv(deer / "summary.csv", index_col="benchmark")
    assert summary.index.tolist() == ["gsm8k", "testbed-unseen", "overall"]
    assert 0 < summary.loc["overall", "cr"] < 1
    assert "cr" not in pd.read_csv(vanilla / "summary.csv")
    samples = pd.read_parquet(deer / "samples-000000.parquet")
    assert len(samples) == 16 and samples["exit"].any()
    assert "overall" in capsys.readouterr().out
    # Again: nothing is sampled; another setting is refused.
    before = (deer / "samples-000000.parquet").read_bytes()
    run(deer, source, "--n", "2", "--truncate", "--vanilla", str(vanilla))
    assert (deer / "samples-000000.parquet").read_bytes() == before
    with pytest.raises(ValueError, match=r"save_to: .*callbacks"):
        run(deer, source, "--n", "2", "--truncate", "0.8")
    with pytest.raises(ValueError, match=r"vanilla: .*nowhere holds no samples"):
        run(tmp_path / "other", source, "--vanilla", str(tmp_path / "nowhere"))


@pytest.mark.timeout(300)
def test_on_a_server(tmp_path, source, vllm_server):
    report = tmp_path / "report"
    run(report, source, "--engine", "vllm", "--urls", vllm_server.url, "--truncate")
    samples = pd.read_parquet(report / "samples-000000.parquet")
    assert len(samples) == 8 and samples["exit"].any() and samples["correct"].any()
    # The same server under another address goes on; one with too short a context is refused.
    other = vllm_server.url.replace("127.0.0.1", "localhost")
    run(report, source, "--engine", "vllm", "--urls", other, "--truncate", "--n", "2")
    assert len(pd.read_parquet(report / "samples-000001.parquet")) == 8
    with pytest.raises(EngineError, match=r"max_length: .* up to 5001 tokens"):
        run(tmp_path / "long", source, "--engine", "vllm", "--urls", other, "--max-tokens", "5000")
