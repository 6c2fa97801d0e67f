from __future__ import annotations

import json
import logging
from pathlib import Path

import datasets
import pytest

from step_trl.data import load_problems, validate_rows


DAPO_TEXT = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem.\n\n{}\n\nRemember to put your answer on its "
    'own line after "Answer:".'
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def dapo_row(problem: str, answer: str | None, index: str) -> dict:
    return {
        "data_source": "math_dapo",
        "prompt": [{"content": DAPO_TEXT.format(problem), "role": "user"}],
        "ability": "MATH",
        "reward_model": {"ground_truth": answer, "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": index},
    }


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


LAYOUT_ROWS = {
    "DAPO-Math-17k": (
        dapo_row("What is 2 + 2?", "4", "0"),
        {"prompt": user(DAPO_TEXT.format("What is 2 + 2?")), "solution": "4"},
    ),
    "DAPO-Math-17k-Processed": (
        {"prompt": "What is 2 + 2?", "solution": "4", "ability": "MATH", "data_source": "math_dapo"},
        {"prompt": user("What is 2 + 2?"), "solution": "4"},
    ),
    "DeepScaleR": (
        {"problem": "Halve $1$.", "answer": r"\frac{1}{2}", "solution": "It is half, see above."},
        {"prompt": user("Halve $1$."), "solution": r"\frac{1}{2}"},
    ),
    "GSM8K": (
        {"question": "How many?", "answer": "He has 20 * 60 = <<20*60=1200>>1200.\n#### 1,200"},
        {"prompt": user("How many?"), "solution": "1200"},
    ),
    "plain questions": (
        {"question": "Which point?", "answer": "(1,2)"},
        {"prompt": user("Which point?"), "solution": "(1,2)"},
    ),
    "our own": (
        {"prompt": [{"role": "system", "content": "Think."}, *user("Größe √2?")], "solution": r"\sqrt{2}"},
        {"prompt": [{"role": "system", "content": "Think."}, *user("Größe √2?")], "solution": r"\sqrt{2}"},
    ),
    "integer answers": ({"problem": "2 + 2", "answer": 4}, {"prompt": user("2 + 2"), "solution": "4"}),
}


@pytest.mark.parametrize("layout", LAYOUT_ROWS)
def test_layouts(layout, tmp_path):
    published, expected = LAYOUT_ROWS[layout]
    dataset = load_problems(write_jsonl(tmp_path / "rows.jsonl", [published]))
    assert dataset.column_names == ["prompt", "solution"]
    assert dataset.to_list() == [expected]
    validate_rows(dataset, needs_solution=True)


@pytest.mark.parametrize("ending", ["jsonl", "json", "parquet", "csv"])
def test_file_formats(ending, tmp_path):
    path = tmp_path / f"problems.{ending}"
    dataset = datasets.Dataset.from_list([{"question": "1 + 1", "answer": "#### 2"}])
    write = {"parquet": dataset.to_parquet, "csv": dataset.to_csv}.get(ending, dataset.to_json)
    write(path)
    expected = [{"prompt": user("1 + 1"), "solution": "2"}]
    assert load_problems(path).to_list() == load_problems(str(path), "test").to_list() == expected


def test_several_files(tmp_path):
    files = [
        write_jsonl(tmp_path / f"{name}.jsonl", [{"problem": name, "answer": "1"}, {"problem": "same", "answer": "2"}])
        for name in ("a", "b")
    ]
    assert [row["prompt"][0]["content"] for row in load_problems(files)] == ["a", "same", "b"]


def test_folder_with_splits(tmp_path):
    for split, answer in (("train", "1"), ("test", "2")):
        write_jsonl(tmp_path / "set" / f"{split}.jsonl", [{"question": "q", "answer": f"#### {answer}"}])
    assert load_problems(tmp_path / "set")["solution"][:] == ["1"]
    assert load_problems(str(tmp_path / "set"), "test")["solution"][:] == ["2"]


def test_duplicates_are_dropped_over_batches(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("step_trl.data.BATCH_SIZE", 16)
    rows = [dapo_row(f"Problem {index % 17}", str(index % 17), str(index)) for index in range(170)]
    with caplog.at_level(logging.INFO, "step_trl.data"):
        dataset = load_problems(write_jsonl(tmp_path / "dapo.jsonl", rows))
    assert dataset["solution"][:] == [str(index) for index in range(17)]
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert "17 problems of 170 rows" in caplog.text
    assert "153 duplicates" in caplog.text


def test_rows_without_an_answer_are_dropped_and_reported(tmp_path, caplog):
    answers = ["1", None, "", "  ", "2"]
    rows = [{"problem": f"p{index}", "answer": answer} for index, answer in enumerate(answers)]
    dataset = load_problems(write_jsonl(tmp_path / "rows.jsonl", [*rows, {"problem": "", "answer": "3"}]))
    assert dataset["solution"][:] == ["1", "2"]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "2 problems of 6 rows; 4 rows without a problem or an answer dropped, 0 duplicates" in caplog.text


def test_missing_numbers_of_a_csv(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("problem,answer\na,42\nb,\nc,-7\n")
    assert load_problems(path)["solution"][:] == ["42", "-7"]


def test_dapo_row_without_ground_truth(tmp_path):
    rows = [dapo_row("a", "1", "0"), dapo_row("b", None, "1"), {**dapo_row("c", "3", "2"), "reward_model": None}]
    assert load_problems(write_jsonl(tmp_path / "rows.jsonl", rows))["solution"][:] == ["1"]


def test_conflicting_duplicates_keep_the_first_solution(tmp_path, caplog):
    rows = [{"problem": "p ", "answer": "1"}, {"problem": "p", "answer": "2"}, {"problem": "p", "answer": "1"}]
    assert load_problems(write_jsonl(tmp_path / "rows.jsonl", rows))["solution"][:] == ["1"]
    assert "1 duplicates differ in their solution" in caplog.text


def test_no_usable_row_is_an_error(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"problem": "p", "answer": ""}])
    with pytest.raises(ValueError, match="no row with both"):
        load_problems(path)


def test_unknown_columns_are_listed_with_the_known_layouts(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"query": "q", "gold": "g"}])
    with pytest.raises(ValueError, match=r"found query, gold\.") as error:
        load_problems(path)
    for layout in ("prompt + solution", "prompt + reward_model", "problem + answer", "question + answer"):
        assert layout in str(error.value)


def test_prompt_template_and_system_prompt(tmp_path):
    published = [{"role": "system", "content": "old"}, *user(r"$\frac{1}{2}$?")]
    path = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": published, "solution": "1"}])
    row = load_problems(path, prompt_template=r"{problem} Use \boxed{}.", system_prompt="new")[0]
    assert row["prompt"] == [{"role": "system", "content": "new"}, *user(r"$\frac{1}{2}$? Use \boxed{}.")]
    with pytest.raises(ValueError, match="prompt_template"):
        load_problems(path, prompt_template="no place for it")


def test_files_are_checked(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.jsonl"):
        load_problems(tmp_path / "absent.jsonl")
    with pytest.raises(ValueError, match="endings"):
        load_problems([tmp_path / "a.jsonl", tmp_path / "b.csv"])


@pytest.mark.parametrize("streaming", [False, True])
def test_validate_rows(streaming):
    def rows(**row):
        dataset = datasets.Dataset.from_list([row])
        return dataset.to_iterable_dataset() if streaming else dataset

    validate_rows(rows(prompt=user("q"), solution="1"), needs_solution=True)
    validate_rows(rows(prompt="q"), needs_solution=False)
    with pytest.raises(ValueError, match=r"'prompt'.*columns found: problem, answer\..*load_problems"):
        validate_rows(rows(problem="q", answer="1"), needs_solution=False)
    with pytest.raises(ValueError, match=r"'solution'.*columns found: prompt, answer\..*reward_funcs"):
        validate_rows(rows(prompt="q", answer="1"), needs_solution=True)
    with pytest.raises(ValueError, match="must be text, got int"):
        validate_rows(rows(prompt="q", solution=1), needs_solution=True)
    with pytest.raises(ValueError, match="no rows"):
        validate_rows(datasets.Dataset.from_list([]), needs_solution=False)


def test_prompts_that_leave_no_room(tmp_path):
    from step_trl import testbed
    from step_trl.data import validate_prompt_lengths

    tokenizer = testbed.load_tokenizer()
    rows = datasets.Dataset.from_list(
        [{"prompt": [{"role": "user", "content": "1 + 1"}]}, {"prompt": [{"role": "user", "content": "7" * 60}]}]
    )
    length = len(tokenizer.apply_chat_template(rows[1]["prompt"], add_generation_prompt=True, return_dict=False))
    validate_prompt_lengths(rows, tokenizer, context=length + 10, max_completion_length=10)
    with pytest.raises(ValueError, match=rf"train: the prompt of row 1 has {length} tokens.*context of {length + 9}"):
        validate_prompt_lengths(rows, tokenizer, length + 9, max_completion_length=10, name="train")
    with pytest.raises(ValueError, match="max_completion_length: 64 leaves no room"):
        validate_prompt_lengths(rows, tokenizer, context=64, max_completion_length=64)
