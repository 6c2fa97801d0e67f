"""Means, ratios and intervals of samples."""

import numpy as np
import pandas as pd
import pytest
from markdown_tables import unpadded

from step_trl.evaluation import summarize
from step_trl.report import budgets_table


def made_samples(correct, tokens, benchmark="easy", n=1):
    count = len(correct)
    return pd.DataFrame(
        {
            "benchmark": benchmark,
            "problem": [str(place // n) for place in range(count)],
            "sample": [place % n for place in range(count)],
            "correct": correct,
            "tokens": tokens,
            "steps": [token // 10 for token in tokens],
        }
    )


def test_by_hand():
    """Two benchmarks; the second has two samples per problem."""
    vanilla = pd.concat(
        [
            made_samples([True, False], [100, 200]),
            made_samples([True, True, True, False], [100, 100, 300, 300], "hard", n=2),
        ]
    )
    samples = pd.concat(
        [
            made_samples([True, True], [100, 50]),
            made_samples([True, False, True, False], [50, 50, 50, 150], "hard", n=2),
        ]
    )
    table = summarize(samples, vanilla)
    assert table.index.tolist() == ["easy", "hard", "overall"]
    assert table["accuracy"].tolist() == [1.0, 0.5, 0.75]
    assert table["tokens"].tolist() == [75, 75, 75]
    assert table["cr"].tolist() == pytest.approx([0.5, 0.375, 0.4375])
    # easy: 0.5 + 3 * (1 - 0.5) / 0.5; hard: 0.625 - 5 * 0.25 / 0.75; overall: accuracy 0.625 -> 0.75, tokens 175 -> 75
    expected = [0.5 + 3.0, 0.625 - 5 / 3, 100 / 175 + 3 * 0.2]
    assert table["aes"].tolist() == pytest.approx(expected)
    alone = summarize(samples)
    assert "cr" not in alone and alone["accuracy"].tolist() == [1.0, 0.5, 0.75]


def test_distance_from_the_length_that_was_asked_for():
    """By hand. A benchmark that asks for no length has no distance, and only counts in the other columns."""
    samples = pd.concat(
        [
            made_samples([True, True], [50, 150]).assign(target_tokens=100),
            made_samples([True, False], [100, 400], "hard").assign(target_tokens=200),
            made_samples([True], [7], "free"),
        ]
    )
    table = summarize(samples, pd.concat([made_samples([True, True], [100, 100]), samples.iloc[2:]]))
    assert table["deviation"].tolist()[:2] == [0.5, 0.75] and table["over_target"].tolist()[:2] == [0.5, 0.5]
    assert table.loc["free", ["deviation", "over_target"]].isna().all()
    assert table.loc["overall", "deviation"] == 0.625 and table.loc["overall", "over_target"] == 0.5
    assert table.loc["overall", "tokens"] == pytest.approx((100 + 250 + 7) / 3)
    assert (table["deviation_low"].dropna() <= table["deviation"].dropna()).all()
    assert table["cr"].tolist() == [1.0, 1.0, 1.0, 1.0]
    assert "deviation" not in summarize(made_samples([True], [5]))
    lines = unpadded(budgets_table(table)).splitlines()
    assert lines[2] == "| easy | 100.0 | 100 | 50.0 % | 50.0 % |" and lines[4].endswith("| – % | – % |")


def test_the_vanilla_model_is_its_own_measure():
    vanilla = made_samples([True, False, True], [100, 200, 300])
    table = summarize(vanilla, vanilla)
    assert (table[["cr", "cr_low", "cr_high"]] == 1).all(axis=None)
    assert (table[["aes", "aes_low", "aes_high"]] == 0).all(axis=None)


def test_aes_is_undefined_where_the_vanilla_model_solves_nothing():
    vanilla = pd.concat([made_samples([True, False], [10, 10]), made_samples([False, False], [10, 10], "hard")])
    table = summarize(vanilla.assign(tokens=5), vanilla)
    assert table["aes"].isna().to_dict() == {"easy": False, "hard": True, "overall": False}
    assert table.loc["overall", "aes"] == pytest.approx(0.5)


def test_intervals_are_those_of_the_binomial():
    generator = np.random.default_rng(0)
    correct = generator.random(400) < 0.7
    table = summarize(made_samples(correct, [100] * 400), resamples=4000)
    error = 1.96 * np.sqrt(correct.mean() * (1 - correct.mean()) / 400)
    row = table.loc["easy"]
    assert row["accuracy_low"] == pytest.approx(correct.mean() - error, abs=0.006)
    assert row["accuracy_high"] == pytest.approx(correct.mean() + error, abs=0.006)
    assert row["tokens_low"] == row["tokens_high"] == 100
    narrow = summarize(made_samples(correct, [100] * 400), confidence=0.5).loc["easy"]
    assert narrow["accuracy_high"] - narrow["accuracy_low"] < 0.5 * (row["accuracy_high"] - row["accuracy_low"])


def test_samples_of_one_problem_do_not_narrow_the_interval():
    once = made_samples([True, False] * 20, [100] * 40)
    often = made_samples([value for value in [True, False] * 20 for _ in range(16)], [100] * 640, n=16)
    widths = [summarize(rows).loc["easy", ["accuracy_low", "accuracy_high"]].tolist() for rows in (once, often)]
    assert widths[0] == pytest.approx(widths[1])


def test_models_are_compared_on_the_same_problems():
    """If a model uses half the tokens on every problem, CR has no spread, however much lengths differ."""
    generator = np.random.default_rng(0)
    tokens = generator.integers(100, 4000, 50)
    vanilla = made_samples([True] * 50, tokens.tolist())
    shuffled = vanilla.assign(tokens=tokens / 2).sample(frac=1, random_state=1)
    row = summarize(shuffled, vanilla).loc["easy"]
    assert row["cr_low"] == pytest.approx(0.5) and row["cr_high"] == pytest.approx(0.5)
    with pytest.raises(ValueError, match="samples, vanilla: the 49 and 50 problems"):
        summarize(vanilla.iloc[1:], vanilla)
    with pytest.raises(ValueError, match=r"confidence: 1\.5"):
        summarize(vanilla, confidence=1.5)
