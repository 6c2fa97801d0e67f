"""Loaders of the published benchmarks, on local folders in the published format."""

import json

import pandas as pd
import pytest

from step_trl.evaluation import BENCHMARKS, load_benchmark
from step_trl.evaluation.benchmarks import BBH_TASKS


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def questions(benchmark):
    return [prompt[-1]["content"] for prompt in benchmark["prompt"]]


def test_gsm8k(tmp_path):
    rows = [{"question": "How many?", "answer": "First 1,000, then 234.\n#### 1,234"}]
    path = tmp_path / "main" / "test-00000-of-00001.parquet"
    path.parent.mkdir()
    pd.DataFrame(rows).to_parquet(path)
    pd.DataFrame(rows * 3).to_parquet(tmp_path / "main" / "train-00000-of-00001.parquet")
    loaded = load_benchmark("gsm8k", tmp_path)
    assert loaded["solution"] == ["1234"] and loaded["problem"] == ["0"] and loaded["grader"] == ["math"]
    assert questions(loaded)[0].startswith("How many?\n\n") and r"\boxed{}" in questions(loaded)[0]


def test_math500(tmp_path):
    row = {
        "problem": "Find $x$ in {1}.",
        "solution": "long",
        "answer": r"\frac{1}{2}",
        "unique_id": "test/algebra/1.json",
    }
    write_jsonl(tmp_path / "test.jsonl", [row])
    loaded = load_benchmark("math500", tmp_path)
    assert loaded["problem"] == ["test/algebra/1.json"]
    assert loaded["solution"] == [r"\frac{1}{2}"]
    assert questions(loaded)[0].startswith("Find $x$ in {1}.")


def test_amc_has_two_years_and_amc23_one(tmp_path):
    url = "https://artofproblemsolving.com/wiki/index.php/{}_AMC_12A_Problems/Problem_1"
    rows = [
        {"id": number, "problem": f"problem {year}", "answer": 27.0 + number, "url": url.format(year)}
        for number, year in enumerate((2022, 2023, 2023))
    ]
    pd.DataFrame(rows).to_parquet(tmp_path / "train-00000-of-00001.parquet")
    assert load_benchmark("amc", tmp_path)["solution"] == ["27", "28", "29"]
    late = load_benchmark("amc23", tmp_path)
    assert late["solution"] == ["28", "29"]
    assert all(question.startswith("problem 2023") for question in questions(late))


@pytest.mark.parametrize(("name", "answer"), [("aime24", "073"), ("aime25", 588)])
def test_aime(tmp_path, name, answer):
    write_jsonl(tmp_path / "train.jsonl", [{"id": 60, "problem": "Every morning", "answer": answer}])
    assert load_benchmark(name, tmp_path)["solution"] == [str(answer)]


def test_gpqa_puts_its_options_in_an_order_of_their_own(tmp_path):
    rows = [
        {
            "Record ID": f"rec{number}", "Question": f"Which? {number}", "Correct Answer": "right\n",
            **{f"Incorrect Answer {wrong}": f"wrong {wrong}" for wrong in (1, 2, 3)},
        }
        for number in range(40)
    ]  # fmt: skip
    pd.DataFrame(rows).to_csv(tmp_path / "gpqa_diamond.csv", index=False)
    pd.DataFrame(rows * 2).to_csv(tmp_path / "gpqa_extended.csv", index=False)
    loaded = load_benchmark("gpqa_diamond", tmp_path)
    assert len(loaded) == 40 and set(loaded["grader"]) == {"choice"}
    for question, letter in zip(questions(loaded), loaded["solution"]):
        assert f"({letter}) right\n" in question
        assert sorted(line[4:] for line in question.splitlines()[1:5]) == ["right", "wrong 1", "wrong 2", "wrong 3"]
    assert {letter: loaded["solution"][:].count(letter) > 3 for letter in "ABCD"} == dict.fromkeys("ABCD", True)
    # The order is the problem's, whatever its place.
    pd.DataFrame(rows[::-1]).to_csv(tmp_path / "gpqa_diamond.csv", index=False)
    again = load_benchmark("gpqa_diamond", tmp_path)
    assert dict(zip(again["problem"], again["solution"])) == dict(zip(loaded["problem"], loaded["solution"]))


def test_olympiadbench(tmp_path):
    rows = [
        {"id": 1606, "question": "Find all.", "final_answer": ["$2$"], "is_multiple_answer": False},
        {"id": 1610, "question": "Find both.", "final_answer": ["$1,-1$"], "is_multiple_answer": True},
        {"id": 1611, "question": "Find them.", "final_answer": ["$3$", "$\\frac{1}{3}$"], "is_multiple_answer": True},
        {"id": 1612, "question": "Find all.", "final_answer": ["$69$,$84$"], "is_multiple_answer": True},
    ]
    path = tmp_path / "OE_TO_maths_en_COMP" / "OE_TO_maths_en_COMP.parquet"
    path.parent.mkdir()
    pd.DataFrame(rows).to_parquet(path)
    assert load_benchmark("olympiadbench", tmp_path)["solution"] == ["2", "1,-1", r"3, \frac{1}{3}", "69,84"]


def test_lsat_answers_run_from_a_to_e(tmp_path):
    choices = [f"({letter})option {letter}" for letter in "ABCDE"]
    query = f"Q: Of the eight students... Answer Choices: {' '.join(choices)}\nA: Among A through E, the answer is"
    rows = [{"query": query, "choices": choices, "gold": [gold]} for gold in range(5)]
    write_jsonl(tmp_path / "test.jsonl", rows)
    loaded = load_benchmark("lsat_ar", tmp_path)
    assert loaded["solution"] == list("ABCDE")
    assert questions(loaded)[0].startswith("Of the eight students") and "(E)option E" in questions(loaded)[0]
    assert "A: Among" not in questions(loaded)[0]
    assert questions(loaded)[0].count("option B") == 1


def test_mmlu_draws_the_same_500(tmp_path):
    rows = [
        {"question": f"What is {n}?", "subject": "algebra", "choices": [str(n + k) for k in range(4)], "answer": n % 4}
        for n in range(700)
    ]
    path = tmp_path / "all" / "test-00000-of-00001.parquet"
    path.parent.mkdir()
    pd.DataFrame(rows).to_parquet(path)
    loaded = load_benchmark("mmlu", tmp_path)
    assert len(loaded) == len(set(loaded["problem"])) == 500
    assert loaded["problem"] == load_benchmark("mmlu", tmp_path)["problem"]
    for problem, question, letter in zip(loaded["problem"], questions(loaded), loaded["solution"]):
        number = int(problem)
        assert question.startswith(f"What is {number}?\n(A) {number}\n(B) {number + 1}\n")
        assert letter == "ABCD"[number % 4]


def test_bbh_has_all_its_tasks(tmp_path):
    for task in BBH_TASKS:
        path = tmp_path / task / "test-00000-of-00001.parquet"
        path.parent.mkdir()
        pd.DataFrame([{"input": f"{task}?", "target": "(A)"}, {"input": "second?", "target": "True"}]).to_parquet(path)
    loaded = load_benchmark("bbh", tmp_path)
    assert len(BBH_TASKS) == 27 and len(loaded) == 54
    assert loaded["problem"][:2] == ["boolean_expressions/0", "boolean_expressions/1"]
    assert set(loaded["grader"]) == {"text"}


def test_the_testbed_has_four():
    names = [name for name in BENCHMARKS if name.startswith("testbed-")]
    assert len(names) == 4
    for name in names:
        assert set(load_benchmark(name).column_names) == {"problem", "prompt", "solution", "grader"}


def test_what_is_wrong_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"name: 'gsm9k' .*gsm8k, math500"):
        load_benchmark("gsm9k")
    with pytest.raises(FileNotFoundError, match=r"source: .*nowhere is not a folder"):
        load_benchmark("math500", tmp_path / "nowhere")
    write_jsonl(tmp_path / "columns" / "test.jsonl", [{"question": "?", "answer": "1"}])
    with pytest.raises(ValueError, match="lacks the column problem; it has question, answer"):
        load_benchmark("math500", tmp_path / "columns")
    write_jsonl(tmp_path / "empty" / "test.jsonl", [{"problem": "?", "answer": " "}])
    with pytest.raises(ValueError, match="math500: row 0 has no question or no answer"):
        load_benchmark("math500", tmp_path / "empty")
    for split in ("train", "validation"):
        write_jsonl(tmp_path / "splits" / f"{split}.jsonl", [{"problem": "?", "answer": "1"}])
    with pytest.raises(ValueError, match="has the splits train, validation, but not test"):
        load_benchmark("math500", tmp_path / "splits")


def test_a_data_set_that_cannot_be_loaded_is_named(monkeypatch):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'HuggingFaceH4/MATH-500' on the Hub")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(
        ValueError, match=r"math500: HuggingFaceH4/MATH-500 cannot be loaded: Couldn't .* Set `source`"
    ):
        load_benchmark("math500")
