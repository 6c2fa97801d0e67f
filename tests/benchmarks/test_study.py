"""The study at its smallest: two arms, one update each."""

import importlib
import json
import random
import sys
from dataclasses import replace

import pandas as pd
import pytest
import study
import torch
from filelock import FileLock
from markdown_tables import unpadded
from study import prompted, run
from study.arms import ARMS, COMPARED, Arm, jobs
from study.claims import CHOICES, CLAIMS, verdict
from study.page import write_page
from study.pictures import draw
from study.prompted import cut_off, prompt_ids
from study.records import collect_records, read_records
from study.results import Difference, Results
from study.rewards import priced_reward

from step_trl import testbed
from step_trl.evaluation import classify_testbed_steps, read_samples


def test_tables_come_before_sweeps_and_seeds_one_after_another():
    order = [(arm.name, seed) for arm, seed in jobs([5, 6])]
    assert len(order) == len(set(order)) == 2 * len(ARMS)
    tables = sum(not arm.sweep for arm in ARMS)
    assert [seed for _, seed in order[: 2 * tables]] == [5] * tables + [6] * tables
    assert [name for name, _ in order[: tables // 2]] == [arm.name for arm in ARMS if not arm.sweep][: tables // 2]
    with pytest.raises(ValueError, match=r"arms: \['dapo'\] are not known"):
        jobs([0], ["dapo"])


def test_an_unknown_arm_is_an_error_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["study", "--arms", "dapo", "--page", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        importlib.import_module("study.__main__").main()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "python benchmarks/study: error: arms: ['dapo'] are not known. Choose from grpo, grpo-short"
    )


def test_arms_are_valid_configurations_with_names_of_their_own(tmp_path, few_rows):
    assert len({arm.name for arm in ARMS}) == len(ARMS)
    (tmp_path / "lapo_lengths.json").write_text("{}")  # as the first stage leaves it
    for arm in ARMS:
        if arm.method in ("distill", "dpo", "prompts"):
            continue
        for stage, further in enumerate(arm.stages):
            options = arm.options | further
            if options.get("lapo_stage") == "internalization":
                arm = replace(arm, options=arm.options | {"lapo_lengths": str(tmp_path / "lapo_lengths.json")})
            trainer = run.build_trainer(arm, 3, str(tmp_path / arm.name), 36, stage)
            assert len(arm.stages) * trainer.args.max_steps == 36 * arm.budget and trainer.args.seed == 3
            assert trainer.model.dtype == torch.float32
            for name, value in options.items():
                if name == "reward_funcs":
                    assert [f"{one.__module__}.{one.__name__}" for one in trainer.reward_funcs] == value
                elif name not in ("system_prompt", "easy_prompts"):
                    assert getattr(trainer.args, name) == value


def test_a_price_is_for_tokens_of_correct_completions():
    inputs = {"completions": [r"<think>7</think>\boxed{7}"] * 3, "solution": ["7", "7", "8"]}
    assert priced_reward([[0] * 224, [0] * 112, [0] * 112], **inputs) == pytest.approx([0.6, 0.8, 0])


def test_claims_are_about_arms():
    names = {arm.name for arm in ARMS} | {run.VANILLA}
    assert all({claim.left, claim.right} <= names for claim in CLAIMS)
    assert all(set(arms) <= names for _, *arms in CHOICES)
    assert set(COMPARED) <= names


@pytest.mark.parametrize(
    ("interval", "direction", "expected"),
    [
        ((1, 2), "higher", "holds"),
        ((-1, 2), "higher", "cannot be told"),
        ((-2, -1), "higher", "does not hold"),
        ((-2, -1), "lower", "holds"),
        ((1, 2), "lower", "does not hold"),
        ((-0.01, 0.03), "kept", "holds"),
        ((-0.05, 0.03), "kept", "cannot be told"),
        ((-0.05, -0.03), "kept", "does not hold"),
    ],
)
def test_verdicts(interval, direction, expected):
    assert verdict(Difference(sum(interval) / 2, *interval), direction) == expected


@pytest.fixture
def few_rows(monkeypatch):
    """A trainer looks at all rows of its data set."""
    load_dataset = testbed.load_dataset
    monkeypatch.setattr(testbed, "load_dataset", lambda split: load_dataset(split).select(range(32)))


@pytest.fixture
def tokens():
    """The length of completions."""
    return 40


@pytest.fixture
def small(monkeypatch, few_rows, tokens):
    def in_a_short_context(configure):
        return lambda *args, **options: configure(*args, **options | {"max_completion_length": tokens})

    monkeypatch.setattr(run, "PROBLEMS", 2)
    monkeypatch.setattr(run, "COMPLETIONS", 16)
    monkeypatch.setitem(run.EVALUATION, "max_tokens", tokens)
    monkeypatch.setitem(run.TRAINING, "gradient_accumulation_steps", 1)
    monkeypatch.setitem(run.TRAINING, "per_device_train_batch_size", 8)
    for module in (run, prompted):
        monkeypatch.setattr(module, "MAX_COMPLETION_LENGTH", tokens)
    methods = {name: (trainer, in_a_short_context(config)) for name, (trainer, config) in run.METHODS.items()}
    monkeypatch.setattr(run, "METHODS", methods)


@pytest.mark.timeout(600)
def test_a_study_is_run_once_and_makes_its_page(small, tmp_path, monkeypatch):
    folder, page = tmp_path / "runs", tmp_path / "page"
    study.study(folder, page, ["grpo-short-closed", "sas"], [0, 1], max_steps=1)
    records = collect_records(folder)
    results = Results(records)
    assert results.seeds == {"vanilla": [0], "grpo-short-closed": [0, 1], "sas": [0, 1]}
    samples = results.samples["sas"]
    assert len(samples) == 2 * 4 * 2 * run.SAMPLES and not samples.duplicated(["benchmark", "problem", "sample"]).any()
    text = unpadded((page / "README.md").read_text())
    assert "| sas | 2 |" in text and "SAS is shorter than GRPO in a short context. **" in text
    assert "Not run yet: " in text
    found = results.difference("grpo-short-closed", "sas", "tokens")
    row = next(line for line in text[text.index("| against `sas`") :].splitlines() if "grpo-short-closed" in line)
    assert f"| {found.value:+.1f} ({found.low:+.1f} to {found.high:+.1f}) |" in row
    assert ("longer" in row) == (found.low > 0) and ("shorter" in row) == (found.high < 0)
    assert {path.name for path in page.iterdir()} == {
        *("README.md", "summary.csv", "samples.parquet", "updates.parquet", "study.json"),
        *("accuracy.png", "budgets.png", "steps.png", "training.png"),
    }
    assert f"| sas | 2 | {100 * results.at_budget('sas', 128)['accuracy']:.1f} |" in text
    cut = [(row.benchmark, row.correct and row.tokens <= 40, min(row.tokens, 40)) for row in samples.itertuples()]
    means = pd.DataFrame(cut, columns=["benchmark", "accuracy", "tokens"]).groupby("benchmark").mean().mean()
    assert results.at_budget("sas", 40).to_dict() == pytest.approx(means.to_dict())
    raw = pd.read_parquet(page / "samples.parquet")
    means = raw[raw["arm"] == "sas"].astype({"correct": float}).groupby("benchmark")[["correct", "tokens"]].mean()
    overall = pd.read_csv(page / "summary.csv").set_index(["arm", "benchmark"]).loc[("sas", "overall")]
    assert means["correct"].mean() == pytest.approx(overall["accuracy"], abs=1e-4)
    assert means["tokens"].mean() == pytest.approx(overall["tokens"], rel=1e-4)
    assert raw.groupby(["arm", "seed"]).size().eq(len(samples) // 2).all()
    assert set(pd.read_csv(page / "summary.csv")["arm"]) == {"vanilla", "grpo-short-closed", "sas"}
    # Intervals know problems and trainings: of an arm against itself only trainings are left.
    trained = raw[raw["arm"] != "vanilla"].groupby(["arm", "seed", "benchmark"])["tokens"].mean()
    squares = [seeds.std() ** 2 for _, seeds in trained.groupby(["arm", "seed"]).mean().groupby("arm")]
    pooled = (sum(squares) / 2 / (7 / 9) ** 3) ** 0.5  # of two arms, the median is the mean
    assert results.pooled_spread("tokens") == pytest.approx(pooled)
    for name, square in zip(("grpo-short-closed", "sas"), squares, strict=True):
        same = results.difference(name, name, "tokens")
        expected = 1.96 * max(pooled, square**0.5)
        assert same.value == 0 and (same.high - same.low) / 2 == pytest.approx(expected, rel=0.1)
    one, other = (results.difference(*pair, "tokens") for pair in (("sas", "vanilla"), ("vanilla", "sas")))
    assert (one.value, one.low, one.high) == pytest.approx((-other.value, -other.high, -other.low))
    untrained = results.difference("vanilla", "vanilla", "tokens")
    assert untrained.low == untrained.high == 0
    timings = [json.loads((folder / "sas" / seed / "model" / "phases.json").read_text()) for seed in ("0", "1")]
    updates = min((timing["updates"] for timing in timings), key=lambda updates: sum(updates[0].values()))
    assert results.phases("sas").at["early", "update"] == pytest.approx(updates[0]["update"])
    assert len(updates) == 1 and all(updates[0][phase] > 0 for phase in ("generation", "reward", "update"))
    assert updates[0]["reference"] > 0  # beta is above 0
    # Nothing is done again; an arm that is under way is left out.
    monkeypatch.setattr(run, "build_trainer", None)
    study.study(folder, page, ["grpo-short-closed", "sas"], [0, 1], max_steps=1)
    assert unpadded((page / "README.md").read_text()) == text
    # On another machine there is only the page with its records, and they say all that it says.
    monkeypatch.setattr(run, "evaluate", None)
    study.study(tmp_path / "elsewhere", page, ["grpo-short-closed", "sas"], [0, 1], max_steps=1)
    assert unpadded((page / "README.md").read_text()) == text
    # What is run again replaces what was known of it; what is under way is left out.
    tables = {name: getattr(records, name) for name in ("samples", "updates")}
    again = replace(
        records,
        **{name: rows[(rows["arm"] == "sas") & (rows["seed"] == 1)].head(1) for name, rows in tables.items()},
    )
    merged = records.updated_by(again)
    for name, rows in tables.items():
        assert len(getattr(merged, name)) == len(rows) - (rows["arm"] == "sas").sum() // 2 + 1
    next((folder / "sas" / "1" / "samples").glob("samples-*.parquet")).unlink()
    assert Results(collect_records(folder)).seeds == {"vanilla": [0], "grpo-short-closed": [0, 1], "sas": [0]}
    with pytest.raises(ValueError, match=r"page: .* holds a study"):
        study.study(folder, page, ["sas"], [0], max_steps=2)
    with pytest.raises(ValueError, match=r"output_dir: .* holds a study"):
        study.study(folder, tmp_path / "new", ["sas"], [0], max_steps=2)
    others = [replace(arm, options=arm.options | {"epsilon": 0.1}) if arm.name == "sas" else arm for arm in ARMS]
    monkeypatch.setattr(run, "ARMS", others)
    with pytest.raises(ValueError, match=r"output_dir: .* other settings \(sas: .*'epsilon': 0.1"):
        study.study(folder, page, ["sas"], [0], max_steps=1)


@pytest.mark.timeout(600)
def test_arms_with_other_settings_are_marked_until_they_are_run_again(small, tmp_path, monkeypatch):
    page = tmp_path / "page"
    study.study(tmp_path / "first", page, ["grpo-short-closed", "sas"], [0], max_steps=1)
    text = unpadded((page / "README.md").read_text())
    assert "†" not in text
    others = [replace(arm, options=arm.options | {"epsilon": 0.1}) if arm.name == "sas" else arm for arm in ARMS]
    monkeypatch.setattr(run, "ARMS", others)
    study.study(tmp_path / "second", page, [], [0], max_steps=1, page_only=True)
    marked = unpadded((page / "README.md").read_text())
    assert "- `sas`: `epsilon` is 0.1, was the default." in marked
    assert "| sas † | 1 |" in marked and "| grpo-short-closed | 1 |" in marked
    assert "`sas` † against `grpo-short-closed` (seeds: 1 and 1)" in marked
    kept = [line for line in marked.replace(" †", "").splitlines() if line in text.splitlines()]
    assert len(kept) >= len(text.splitlines()) - 1  # the same numbers
    study.study(tmp_path / "second", page, ["sas"], [1], max_steps=1)
    again = unpadded((page / "README.md").read_text())
    assert "†" not in again and "| sas | 1 |" in again  # the old training of seed 0 is not among those of today
    records = read_records(page)
    assert records.done == {("vanilla", 0), ("grpo-short-closed", 0), ("sas", 1)}
    assert json.loads((page / "study.json").read_text())["sas"]["options"]["epsilon"] == 0.1


def test_what_was_lost_is_left_out(small, tmp_path):
    """Records of samples whose texts and logs are missing."""
    run.run_study(tmp_path, [], max_steps=1)
    vanilla = collect_records(tmp_path).samples
    names = ("step-grpo", "sas", "trigger-dropped")
    arms = [vanilla.assign(arm=name, seed=seed) for name in names for seed in range(3)]
    rows = pd.concat([vanilla, *arms], ignore_index=True)
    lost = rows["arm"].isin(["sas", "trigger-dropped"]) | ((rows["arm"] == "step-grpo") & (rows["seed"] > 0))
    rows.loc[lost, ["forward", "verification", "redundancy"]] = pd.NA
    records = replace(read_records(tmp_path), samples=rows)
    write_page(records, tmp_path / "page", 1)
    text = (tmp_path / "page" / "README.md").read_text()
    assert "are redundant. **does not hold**: `step-grpo` against `vanilla` (seeds: 1 and 1), +0.0 points" in text
    assert "vanilla model. **does not hold**: `step-grpo` against `vanilla` (seeds: 3 and 1), +0.0 tokens" in text
    assert "`trigger-dropped` against `step-grpo` (seeds: 3 and 3), +0.0 points (+0.0 to +0.0), +0.0 tokens" in text
    assert "` against `sas`" not in text  # neither other version of SAS was run
    assert "trainings whose seconds" not in text and "training.png" not in text and "steps.png" in text
    labels = Results(records).labels
    assert len(labels("sas")) == 0 and len(labels("step-grpo")) == len(labels("vanilla")) > 0


@pytest.mark.timeout(600)
@pytest.mark.parametrize("tokens", [64])  # from which each update learns enough to change completions
def test_a_long_arm_is_evaluated_while_it_is_trained(small, tmp_path, monkeypatch):
    monkeypatch.setitem(run.TRAINING, "per_device_train_batch_size", 16)
    monkeypatch.setitem(run.EVALUATION, "max_tokens", 200)  # some are right
    arm = Arm("long", "sas", {"learning_rate": 1e-3}, budget=1.5, checkpoints=2)
    run.run_study(tmp_path, [(arm, 0)], max_steps=2)
    records = collect_records(tmp_path)
    results = Results(records)
    progress = results.progress("long")
    assert progress.index.tolist() == [0, 1, 2, 3]
    assert progress["tokens"].nunique() == 4  # no two of them are the same model
    assert progress.at[0, "accuracy"] == results.table(run.VANILLA).at["overall", "accuracy"]
    assert progress.at[3, "tokens"] == results.table("long").at["overall", "tokens"]
    tables = {name: results.table(name) for name in (run.VANILLA, "long")}
    assert draw(results, tables, [arm], tmp_path) == ["long"]
    assert draw(results, tables, [replace(arm, tables=("SAS, table 1",))], tmp_path) == ["accuracy", "long"]

    # Differences are of any measure and benchmark.
    texts = read_samples(tmp_path / "long" / "0" / "samples").query("benchmark == 'unseen'")
    solutions = testbed.load_dataset("unseen")["solution"]
    shares = []
    for problem, completion in zip(texts["problem"], texts["completion"], strict=True):
        labels = classify_testbed_steps(completion, solutions[int(problem)])
        shares.append(labels.count("redundancy") / len(labels))
    assert results.difference("long", "long", "redundancy", "unseen").value == 0
    results.samples["none"] = results.samples["long"].assign(forward=1, verification=0, redundancy=0)
    difference = results.difference("long", "none", "redundancy", "unseen")
    assert difference.value == pytest.approx(sum(shares) / len(shares))
    right = results.samples[run.VANILLA].query("correct")["tokens"].sort_values()
    assert results.cut_off(right.iloc[0]) == (right > right.iloc[0]).mean() < 1 and results.cut_off(512) == 0


@pytest.mark.timeout(600)
@pytest.mark.parametrize("tokens", [128])  # some are right, from which to learn
def test_stages_budgets_and_distillation(small, tmp_path, monkeypatch):
    """Arms that are not a plain training: several models in turn, prompts with a token target, SFT, and DPO."""
    monkeypatch.setitem(run.EVALUATION, "max_tokens", 40)
    chosen = {arm.name: arm for arm in ARMS if arm.name in ("lapo-i", "thinkprune", "l1-max", "ton-sft")}
    chosen |= {arm.name: arm for arm in ARMS if arm.tables == ("VerIPO",)}
    asked = {}
    original = run.evaluate

    def recording(model, benchmarks, **options):
        asked[str(options["save_to"].relative_to(tmp_path))] = benchmarks["easy"][0]["prompt"]
        return original(model, benchmarks, **options)

    monkeypatch.setattr(run, "evaluate", recording)
    run.run_study(tmp_path, [(arm, 0) for arm in chosen.values()], max_steps=3)
    question = asked["vanilla/samples"][0]["content"]
    plain = ("prompted/0/samples", "ton-sft/0/samples", "lapo-i/0/before", "lapo-i/0/samples")
    assert all(asked[path] == asked["vanilla/samples"] for path in plain)
    for when in ("before", "samples"):
        assert asked[f"thinkprune/0/{when}"][0]["content"] == "Think, then answer, within 112 tokens."
        assert asked[f"l1-max/0/{when}"][0]["content"] == f"{question} Think for maximum 112 tokens."
    for name, stages in (("lapo-i", 1), ("thinkprune", 2), ("l1-max", 0), ("ton-sft", 0), ("veripo-dpo", 0)):
        model = tmp_path / name / "0" / "model"
        assert len(list(model.glob("stage-*/model.safetensors"))) == stages
        assert (model / "model.safetensors").is_file() and json.loads((model / "phases.json").read_text())[
            "seconds"
        ] > 0
    records = collect_records(tmp_path)
    assert set(Results(records).samples) == {"vanilla", "prompted", *chosen}
    numbers = records.updates.groupby("arm")["number"].apply(list)
    one_stage = {key: [1, 2, 3] for key in ("thinkprune", "l1-max", "veripo-grpo-1", "veripo-grpo-2")}
    assert numbers.to_dict() == one_stage | {"lapo-i": [1, 2, 3, 4]}
    verified = json.loads((tmp_path / "veripo-dpo" / "0" / "model" / "verification.json").read_text())
    assert verified["rollouts"] == 24 and verified["accuracy pairs"] > 0
    write_page(records, tmp_path / "page", 3)
    page = unpadded((tmp_path / "page" / "README.md").read_text())
    asked_for = page[page.index("## Spoken to") : page.index("## Seconds")]
    assert [line.split(" | ")[0] for line in asked_for.splitlines()[6:] if line] == [
        "| l1-max", "| lapo-i", "| thinkprune"
    ]  # fmt: skip
    thoughts = page[page.index("## Thoughts that are skipped") : page.index("## Spoken to")]
    assert [line.split(" | ")[0] for line in thoughts.splitlines()[6:] if line] == [
        "| vanilla", "| ton-sft", "| veripo-grpo-1", "| veripo-dpo", "| veripo-grpo-2"
    ]  # fmt: skip


def test_a_job_of_another_process_is_left_to_it(small, tmp_path, capsys):
    arm = next(arm for arm in ARMS if arm.name == "grpo-short")
    (tmp_path / "grpo-short" / "0").mkdir(parents=True)
    with FileLock(tmp_path / "grpo-short" / "0" / "lock"):
        run.run_study(tmp_path, [(arm, 0)], max_steps=1)
    assert "under way in another process" in capsys.readouterr().out
    assert not (tmp_path / "grpo-short" / "0" / "model").exists()


def test_prompts_ask_as_the_arms_do():
    tokenizer = testbed.load_tokenizer()
    messages = testbed.load_dataset("easy")[0]["prompt"]
    question = messages[0]["content"]
    forms = ("none", "l1-exact", "l1-max", "thinkprune", "lapo-i")
    texts = {form: tokenizer.decode(prompt_ids(form, messages, 50, tokenizer)) for form in forms}
    turn = "<|im_end|>\n<|im_start|>assistant\n<think>\n"
    assert texts == {
        "none": f"<|im_start|>user\n{question}{turn}",
        "l1-exact": f"<|im_start|>user\n{question} Think for 50 tokens.{turn}",
        "l1-max": f"<|im_start|>user\n{question} Think for maximum 50 tokens.{turn}",
        "thinkprune": "<|im_start|>system\nThink, then answer, within 50 tokens.<|im_end|>\n"
        f"<|im_start|>user\n{question}{turn}",
        "lapo-i": f"<|im_start|>user\n{question}{turn}I will answer the question with 50 tokens.",
    }


def test_thoughts_are_cut_off_before_a_trigger():
    closing = "Time is limited, stop thinking and start answering.\n</think>\n\n"
    whole = "1 + 2 = 3.\n\nWait, 2 + 1 = 3.\n\nAlternatively, 3.\n</think>\n\nThe final answer is 3."
    cuts = {cut_off(whole, random.Random(seed)) for seed in range(20)}
    answer = "The final answer is 3."
    assert cuts == {
        ("1 + 2 = 3." + closing, answer),
        ("1 + 2 = 3.\n\nWait, 2 + 1 = 3." + closing, answer),
    }
    without = "1 + 2 = 3.\n</think>\n\nThe final answer is 3."
    assert cut_off(without, random.Random(0)) == ("1 + 2 = 3." + closing, answer)
