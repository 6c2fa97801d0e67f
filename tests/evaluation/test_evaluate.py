"""Sampling and grading the testbed model."""

import pandas as pd
import pytest

from step_trl import testbed
from step_trl.evaluation import evaluate, summarize
from step_trl.rollout import ConfidenceTruncation, SamplingParams


@pytest.fixture(scope="module")
def parts():
    benchmarks = {name: testbed.load_dataset(name).select(range(6)) for name in ("easy", "unseen")}
    return testbed.load_model(), testbed.load_tokenizer(), benchmarks


SAMPLING = SamplingParams(320, temperature=0.6, top_p=0.9)


def test_one_tidy_row_per_sample_and_the_same_ones_again(parts):
    seen = []
    rows = evaluate(*parts, n=2, sampling=SAMPLING, on_batch=lambda *counts: seen.append(counts), batch_size=16)
    assert len(rows) == 2 * 6 * 2
    assert rows.groupby(["benchmark", "problem"], sort=False).size().eq(2).all()
    assert rows["steps"].ge(1).all() and rows["tokens"].between(1, 320).all()
    assert not rows["truncated"].any()
    assert [completions for completions, _ in seen] == [16, 8]
    assert rows["correct"].any()
    again = evaluate(*parts, n=2, sampling=SAMPLING, batch_size=24)
    assert again["completion"].tolist() == rows["completion"].tolist()
    other = evaluate(*parts, n=2, sampling=SAMPLING, seed=1)
    assert other["completion"].tolist() != rows["completion"].tolist()


def test_truncation_at_inference_time(parts):
    plain = evaluate(*parts, sampling=SAMPLING)
    callback = ConfidenceTruncation(parts[1], threshold=1e-9)
    cut = evaluate(*parts, sampling=SAMPLING, callbacks=[callback])
    assert cut["truncated"].mean() > 0.5
    assert cut["tokens"].mean() < plain["tokens"].mean()
    assert cut["completion"].str.contains("</think>\n\nThe final answer is", regex=False).mean() > 0.5


def test_aes_is_undefined_where_the_vanilla_model_solves_nothing():
    columns = {"problem": [0, 1, 0, 1], "correct": [True, False, False, False], "tokens": 10, "steps": 2}
    vanilla = pd.DataFrame({"benchmark": ["easy", "easy", "hard", "hard"], **columns})
    table = summarize(vanilla.assign(tokens=5), vanilla)
    assert table["aes"].isna().to_dict() == {"easy": False, "hard": True, "overall": False}
    assert table.loc["overall", "aes"] == pytest.approx(0.5)
