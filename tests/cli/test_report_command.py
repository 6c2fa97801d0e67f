"""`step-trl report` on folders of real evaluations and a training."""

import shutil

import pandas as pd
import pytest
from markdown_tables import unpadded
from small_runs import SMALL_RUN, refused

from step_trl import testbed
from step_trl.cli.main import main
from step_trl.evaluation import evaluate, load_benchmark
from step_trl.trainers import SASConfig, SASTrainer


pytestmark = pytest.mark.xdist_group("runs to report")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two evaluations, the second one in the folder of a training, and one of other problems."""
    folder = tmp_path_factory.mktemp("runs")
    tokenizer = testbed.load_tokenizer()
    trainer = SASTrainer(
        testbed.load_model(),
        args=SASConfig(
            str(folder / "ours"), **SMALL_RUN | {"max_steps": 2},
            max_completion_length=48, num_generations=2, per_device_train_batch_size=2,
        ),
        train_dataset=testbed.load_dataset("train").select(range(4)),
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    trainer.save_state()
    problems = {name: load_benchmark(f"testbed-{name}").select(range(3)) for name in ("easy", "hard")}
    for name, tokens, rows in (
        ("vanilla", 160, problems), ("ours", 80, problems), ("other", 80, {"easy": problems["easy"]}),
    ):  # fmt: skip
        evaluate(testbed.load_model(), rows, tokenizer=tokenizer, max_tokens=tokens, save_to=folder / name)
    return folder


def report(output_dir, *arguments):
    main(["report", *map(str, arguments), "--output-dir", str(output_dir)])


def test_evaluations_and_trainings_side_by_side(runs, tmp_path, capsys):
    report(tmp_path, runs / "vanilla", f"SAS={runs / 'ours'}", "--vanilla", "vanilla")
    assert {path.name for path in tmp_path.iterdir()} == {
        "results.md", "results.tex", "summary.csv", "evaluation.png", "training.png",
    }  # fmt: skip
    summary = pd.read_csv(tmp_path / "summary.csv", index_col=["model", "benchmark"])
    tokens = summary["tokens"]
    assert summary.loc[("SAS", "easy"), "cr"] == pytest.approx(tokens["SAS", "easy"] / tokens["vanilla", "easy"])
    table = (tmp_path / "results.md").read_text()
    assert [line.split(" | ")[0] for line in unpadded(table).splitlines()[2:]] == ["| vanilla", "| SAS"]
    assert table.strip() in capsys.readouterr().out
    assert r"\toprule" in (tmp_path / "results.tex").read_text()


def test_evaluations_alone(runs, tmp_path):
    report(tmp_path, runs / "vanilla", runs / "other")
    assert not (tmp_path / "training.png").exists()


def test_benchmarks_are_in_the_order_of_the_evaluation(runs, tmp_path):
    """Whichever samples were finished, and saved, first."""
    shutil.copytree(runs / "vanilla", tmp_path / "vanilla")
    paths = sorted((tmp_path / "vanilla").glob("samples-*.parquet"))
    backwards = pd.concat([pd.read_parquet(path) for path in paths])[::-1]
    for path in paths[1:]:
        path.unlink()
    backwards.to_parquet(paths[0], index=False)
    report(tmp_path / "out", tmp_path / "vanilla")
    summary = pd.read_csv(tmp_path / "out" / "summary.csv", index_col="benchmark")
    assert list(summary.index) == ["easy", "hard", "overall"]


def test_what_is_refused(runs, tmp_path, capsys):
    with refused(capsys, r"runs: two are called 'vanilla'"):
        report(tmp_path, runs / "vanilla", runs / "vanilla")
    with refused(capsys, r"runs: there is no folder .*nowhere"):
        report(tmp_path, runs / "nowhere")
    with refused(capsys, r"vanilla: 'SAS' has no samples. Choose from vanilla"):
        report(tmp_path, runs / "vanilla", "--vanilla", "SAS")
    with refused(capsys, "Evaluate both models on the same benchmarks"):
        report(tmp_path, runs / "vanilla", runs / "other", "--vanilla", "vanilla")
    (tmp_path / "empty").mkdir()
    with refused(capsys, r"empty contains no trainer_state.json"):
        report(tmp_path, tmp_path / "empty")
