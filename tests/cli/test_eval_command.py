"""`step-trl eval`, on a local folder in the published format and on the testbed model."""

import json
import shutil

import pandas as pd
import pytest
import torch
from small_runs import refused

from step_trl import testbed
from step_trl.cli.evaluate import load_problems, name_of
from step_trl.cli.main import main
from step_trl.evaluation import read_samples


@pytest.fixture
def source(tmp_path):
    """Problems of the testbed in the published format of GSM8K."""
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
    names = {path.name for path in deer.iterdir() if not path.name.startswith((".", "samples-"))}
    assert names == {"settings.json", "summary.csv", "summary.md", "report.png"}
    summary = pd.read_csv(deer / "summary.csv", index_col="benchmark")
    assert summary.index.tolist() == ["gsm8k", "testbed-unseen", "overall"]
    assert 0 < summary.loc["overall", "cr"] < 1
    assert "cr" not in pd.read_csv(vanilla / "summary.csv")
    samples = read_samples(deer)
    assert len(samples) == 16 and samples["exit"].any()
    assert "overall" in capsys.readouterr().out
    # Again: nothing is sampled; another setting is refused.
    run(deer, source, "--n", "2", "--truncate", "--vanilla", str(vanilla))
    pd.testing.assert_frame_equal(read_samples(deer), samples)
    with refused(capsys, r"save_to: .*callbacks"):
        run(deer, source, "--n", "2", "--truncate", "0.8")
    with refused(capsys, r"vanilla: .*nowhere holds no samples"):
        run(tmp_path / "other", source, "--vanilla", str(tmp_path / "nowhere"))


def test_at_budgets(tmp_path, source, capsys):
    vanilla, budgets = tmp_path / "vanilla", tmp_path / "budgets"
    run(vanilla, source)
    asked = ["--token-targets", "60", "150", "--at-most", "--system-prompt", "Be brief."]
    run(budgets, source, *asked, "--vanilla", str(vanilla))
    summary = pd.read_csv(budgets / "summary.csv", index_col="benchmark")
    names = ["gsm8k@60", "gsm8k@150", "testbed-unseen@60", "testbed-unseen@150"]
    assert summary.index.tolist() == [*names, "overall"]
    samples = read_samples(budgets)
    assert set(samples["benchmark"]) == set(names) and len(samples) == 16
    for name, rows in samples.groupby("benchmark"):
        target = int(name.partition("@")[2])
        assert set(rows["target_tokens"]) == {target}
        assert summary.loc[name, "deviation"] == pytest.approx(((rows["tokens"] - target).abs() / target).mean())
        assert summary.loc[name, "over_target"] == (rows["tokens"] > target).mean()
    for column in ("deviation", "over_target", "cr"):
        assert summary.loc["overall", column] == pytest.approx(summary.loc[names, column].mean())
    plain = pd.read_csv(vanilla / "summary.csv", index_col="benchmark")
    assert summary.loc["gsm8k@60", "cr"] == pytest.approx(
        summary.loc["gsm8k@60", "tokens"] / plain.loc["gsm8k", "tokens"]
    )
    lines = (budgets / "summary.md").read_text().splitlines()
    assert [line.split("|")[1].strip() for line in lines[-5:]] == summary.index.tolist()
    # A further budget is sampled, the others are not; other prompts under the same name are refused.
    run(budgets, source, "--token-targets", "60", "90", "--at-most", "--system-prompt", "Be brief.")
    assert len(read_samples(budgets)) == 24
    exact, without_system_prompt = [text for text in asked if text != "--at-most"], asked[:4]
    for other in (exact, without_system_prompt):
        with refused(capsys, "the problems of gsm8k@60 have changed"):
            run(budgets, source, *other)
    with refused(capsys, "at_most: there are no token_targets"):
        run(tmp_path / "other", source, "--at-most")


def test_models_that_do_not_think_and_seeds_of_ones_own(tmp_path, source):
    """The budget ends most thoughts. An answer without `</think>` may still be correct if that is not required."""
    arguments = ["--n", "2", "--seeds", "7", "3", "--max-tokens", "60"]
    run(tmp_path / "thinks", source, *arguments)
    run(tmp_path / "any", source, *arguments, "--no-require-end-of-thinking")
    thinks, any_text = read_samples(tmp_path / "thinks"), read_samples(tmp_path / "any")
    open_thoughts = ~thinks["completion"].str.contains("</think>", regex=False)
    assert not thinks.loc[open_thoughts, "correct"].any()
    assert thinks["completion"].equals(any_text["completion"])
    assert json.loads((tmp_path / "any" / "settings.json").read_text())["seeds"] == [7, 3]


def test_a_model_on_a_server_is_known_by_its_weights(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(testbed.MODEL_DIR, folder)
    before = name_of(str(folder))
    assert before == name_of(str(folder)) and before.startswith("model (")
    model = testbed.load_model()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.0001)
    model.save_pretrained(folder)
    assert name_of(str(folder)) != before
    assert name_of("Qwen/Qwen3-1.7B") == "Qwen/Qwen3-1.7B"


def test_prompts_ask_for_the_budget(source):
    problems = load_problems(["gsm8k"], source, 1, "Be brief.", [512], True)
    (row,) = problems["gsm8k@512"]
    assert row["prompt"][0] == {"role": "system", "content": "Be brief."}
    assert row["prompt"][1]["content"].endswith(" Think for maximum 512 tokens.") and row["target_tokens"] == 512
    (plain,) = load_problems(["gsm8k"], source, 1, None, None, False)["gsm8k"]
    assert row["prompt"][1]["content"].startswith(plain["prompt"][0]["content"])
    (exact,) = load_problems(["gsm8k"], source, 1, None, [512], False)["gsm8k@512"]
    assert exact["prompt"][0]["content"].endswith(" Think for 512 tokens.")


@pytest.mark.timeout(300)
def test_on_a_server(tmp_path, source, vllm_server, capsys):
    report = tmp_path / "report"
    run(report, source, "--engine", "vllm", "--urls", vllm_server.url, "--truncate")
    samples = read_samples(report)
    assert len(samples) == 8 and samples["exit"].any() and samples["correct"].any()
    # The same server under another address goes on; one with too short a context is refused.
    other = vllm_server.url.replace("127.0.0.1", "localhost")
    run(report, source, "--engine", "vllm", "--urls", other, "--truncate", "--n", "2")
    assert len(read_samples(report)) == 16
    with refused(capsys, r"max_length: .* up to 5001 tokens"):
        run(tmp_path / "long", source, "--engine", "vllm", "--urls", other, "--max-tokens", "5000")
