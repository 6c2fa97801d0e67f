"""Sampling and grading the testbed model."""

import json
import signal

import pandas as pd
import pytest
import torch
from peft import LoraConfig, get_peft_model
from preloaded import run_preloaded

from step_trl import testbed
from step_trl.evaluation import evaluate, load_benchmark
from step_trl.rollout import ConfidenceTruncation
from step_trl.rollout.engines import TransformersEngine


SAMPLING = {"max_tokens": 128, "temperature": 0.6, "top_p": 0.9}


@pytest.fixture(scope="module")
def benchmarks():
    return {name: load_benchmark(f"testbed-{name}").select(range(6)) for name in ("easy", "unseen")}


@pytest.fixture(scope="module")
def tokenizer():
    return testbed.load_tokenizer()


@pytest.fixture(scope="module")
def engine(tokenizer):
    return TransformersEngine(testbed.load_model(), tokenizer)


def test_one_tidy_row_per_sample_and_the_same_ones_again(engine, benchmarks):
    seen = []
    rows = evaluate(engine, benchmarks, n=2, on_sample=seen.append, **SAMPLING)
    assert len(rows) == len(seen) == 2 * 6 * 2
    assert rows[["benchmark", "problem", "sample"]].to_numpy().tolist() == [
        [name, str(problem), sample] for name in benchmarks for problem in range(6) for sample in range(2)
    ]
    assert rows["steps"].ge(1).all() and rows["tokens"].between(1, SAMPLING["max_tokens"]).all()
    assert not rows["exit"].any() and rows["correct"].any()
    assert rows["tokens"].sum() == rows["sampled_tokens"].sum()
    assert set(rows.loc[rows["tokens"] < SAMPLING["max_tokens"], "finish_reason"]) == {"eos"}
    again = evaluate(engine, benchmarks, n=2, max_in_flight=5, **SAMPLING)
    pd.testing.assert_frame_equal(again, rows)
    # A sample's draws do not depend on what else is asked for.
    one = evaluate(engine, {"unseen": benchmarks["unseen"].select([3])}, seeds=[1], **SAMPLING)
    expected = rows[(rows["benchmark"] == "unseen") & (rows["problem"] == "3") & (rows["sample"] == 1)]
    assert one["completion"].tolist() == expected["completion"].tolist()
    other = evaluate(engine, benchmarks, seeds=[7], **SAMPLING)
    assert not set(other["completion"]) <= set(rows["completion"])


def test_a_folder_and_a_loaded_model_are_the_same(engine, tokenizer, benchmarks):
    expected = evaluate(engine, benchmarks, **SAMPLING)
    pd.testing.assert_frame_equal(evaluate(testbed.MODEL_DIR, benchmarks, **SAMPLING), expected)
    loaded = evaluate(testbed.load_model(), benchmarks, tokenizer=tokenizer, **SAMPLING)
    pd.testing.assert_frame_equal(loaded, expected)


def test_an_adapter_is_part_of_the_model(tokenizer, benchmarks):
    easy = {"easy": benchmarks["easy"]}
    # Not zero, as adapters are by default: the model says something else.
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(testbed.load_model(), config)
    rows = evaluate(model, easy, tokenizer=tokenizer, **SAMPLING)
    merged = evaluate(model.merge_and_unload(), easy, tokenizer=tokenizer, **SAMPLING)
    assert rows["completion"].tolist() == merged["completion"].tolist()
    vanilla = evaluate(testbed.load_model(), easy, tokenizer=tokenizer, **SAMPLING)
    assert rows["completion"].tolist() != vanilla["completion"].tolist()


def test_every_eos_of_a_model_ends_a_completion(tokenizer, benchmarks):
    """A model may have two, like Qwen3. A completion that ends with the second one has not exhausted its budget."""
    model = testbed.load_model()
    (other,) = tokenizer.encode(" =", add_special_tokens=False)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, other]
    rows = evaluate(model, {"easy": benchmarks["easy"]}, tokenizer=tokenizer, **SAMPLING)
    assert rows["completion"].str.endswith(" =").all() and rows["tokens"].lt(20).all()
    assert set(rows["finish_reason"]) == {"eos"}


def test_truncation_at_inference_time(engine, tokenizer, benchmarks):
    plain = evaluate(engine, benchmarks, **SAMPLING)
    cut = evaluate(engine, benchmarks, callbacks=[ConfidenceTruncation(tokenizer, threshold=1e-9)], **SAMPLING)
    assert cut["exit"].mean() > 0.5
    assert cut["tokens"].mean() < plain["tokens"].mean()
    assert cut["completion"].str.contains("</think>\n\nThe final answer is", regex=False).mean() > 0.5


def test_each_problem_is_graded_its_own_way(engine, tokenizer, benchmarks):
    """The testbed model puts a number into a box: never the letter A, and the expected text if it is correct."""
    rows = evaluate(engine, benchmarks, **SAMPLING)
    easy = benchmarks["easy"].remove_columns("grader")
    for grader, expected in (("choice", False), ("text", rows[rows["benchmark"] == "easy"]["correct"].tolist())):
        own = easy.add_column("grader", [grader] * 6)
        found = evaluate(engine, {"easy": own}, **SAMPLING)["correct"].tolist()
        assert found == (expected or [False] * 6)


# On disk


class Stopped(Exception):
    pass


@pytest.fixture
def stop_after():
    def stop_after(number):
        ended = []

        def on_sample(rollout):
            ended.append(rollout)
            if len(ended) == number:
                raise Stopped

        return on_sample

    return stop_after


def test_a_stopped_evaluation_goes_on(engine, benchmarks, tmp_path, stop_after):
    on_sample = stop_after(9)
    options = {"n": 2, "max_in_flight": 4, "save_to": tmp_path, **SAMPLING}
    with pytest.raises(Stopped):
        evaluate(engine, benchmarks, on_sample=on_sample, **options)
    assert sum(len(pd.read_parquet(path)) for path in tmp_path.glob("samples-*.parquet")) == 9
    resumed = []
    rows = evaluate(engine, benchmarks, on_sample=resumed.append, **options)
    assert len(resumed) == 24 - 9
    pd.testing.assert_frame_equal(rows, evaluate(engine, benchmarks, n=2, **SAMPLING))
    untouched = []
    again = evaluate(engine, benchmarks, on_sample=untouched.append, **options)
    assert untouched == []
    pd.testing.assert_frame_equal(again, rows)


def test_a_killed_evaluation_goes_on(engine, benchmarks, tmp_path):
    """The run is killed with SIGKILL, after which it cannot write anything."""
    script = (
        "import os, signal, sys\n"
        "from datasets import load_from_disk\n"
        "from step_trl import testbed\n"
        "from step_trl.evaluation import evaluate\n"
        "sys.modules['step_trl.evaluation.evaluate']._SECONDS_PER_FILE = 0\n"
        "ended = []\n"
        "def on_sample(rollout):\n"
        "    ended.append(rollout)\n"
        "    if len(ended) == 5:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "rows = {name: load_from_disk(f'{sys.argv[1]}/{name}') for name in ('easy', 'unseen')}\n"
        "evaluate(testbed.load_model(), rows, tokenizer=testbed.load_tokenizer(), save_to=sys.argv[1] + '/samples',\n"
        "         on_sample=on_sample, max_in_flight=4, **eval(sys.argv[2]))\n"
    )
    for name, rows in benchmarks.items():
        rows.save_to_disk(tmp_path / name)
    killed = run_preloaded(["-c", script, str(tmp_path), repr(SAMPLING)], tmp_path / "output")
    assert killed[0] == -signal.SIGKILL, killed[1][-2000:]
    resumed = []
    rows = evaluate(engine, benchmarks, save_to=tmp_path / "samples", on_sample=resumed.append, **SAMPLING)
    assert len(rows) == 12 and len(resumed) == 12 - 5


def test_two_processes_do_not_share_a_folder(engine, benchmarks, tmp_path):
    def second(rollout):
        with pytest.raises(ValueError, match=r"save_to: another process is writing to"):
            evaluate(engine, benchmarks, save_to=tmp_path, **SAMPLING)

    rows = evaluate(engine, benchmarks, save_to=tmp_path, on_sample=second, **SAMPLING)
    assert len(rows) == 12


def test_more_samples_and_benchmarks_are_added(engine, benchmarks, tmp_path):
    evaluate(engine, {"easy": benchmarks["easy"]}, save_to=tmp_path, **SAMPLING)
    made = []
    rows = evaluate(engine, benchmarks, n=2, save_to=tmp_path, on_sample=made.append, **SAMPLING)
    assert len(rows) == 24 and len(made) == 24 - 6
    assert set(json.loads((tmp_path / "settings.json").read_text())["benchmarks"]) == {"easy", "unseen"}


def test_other_settings_are_refused_and_nothing_is_lost(engine, tokenizer, benchmarks, tmp_path):
    evaluate(engine, benchmarks, save_to=tmp_path, **SAMPLING)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    changes = [
        ({"temperature": 0.7}, "sampling: .*0.6.*0.7"),
        ({"max_tokens": 100}, "sampling: "),
        ({"callbacks": [ConfidenceTruncation(tokenizer)]}, "callbacks: "),
        ({"triggers": ["Wait"]}, "triggers: "),
        ({"require_end_of_thinking": False}, "require_end_of_thinking: "),
        ({"seeds": [5]}, "seeds: "),
    ]
    for change, message in changes:
        with pytest.raises(ValueError, match=rf"save_to: .* other settings \({message}"):
            evaluate(engine, benchmarks, save_to=tmp_path, **SAMPLING | change)
    others = {"easy": benchmarks["unseen"]}
    with pytest.raises(ValueError, match="the problems of easy have changed"):
        evaluate(engine, others, save_to=tmp_path, **SAMPLING)
    trained = testbed.load_model()
    with torch.no_grad():
        trained.get_output_embeddings().weight[0] += 1
    with pytest.raises(ValueError, match=r"\(model: "):
        evaluate(trained, benchmarks, tokenizer=tokenizer, save_to=tmp_path, **SAMPLING)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    moved = testbed.load_model()  # the same weights, from a folder elsewhere
    moved.config.name_or_path = f"/elsewhere/{testbed.MODEL_DIR.name}"
    evaluate(moved, benchmarks, tokenizer=tokenizer, save_to=tmp_path, **SAMPLING)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 2, "seeds": [1]}, "seeds: "),
        ({"n": 2, "seeds": [1, 1]}, "seeds: "),
        ({"n": 0}, "seeds: "),
        ({"benchmarks": "testbed-easy"}, "benchmarks: 'testbed-easy' is a single name"),
        ({"benchmarks": []}, "benchmarks: is empty"),
    ],
)
def test_bad_options_are_named(engine, benchmarks, options, message):
    with pytest.raises(ValueError, match=message):
        evaluate(engine, **{"benchmarks": benchmarks} | options)


def test_a_model_without_its_tokenizer_is_refused(engine, benchmarks):
    with pytest.raises(ValueError, match="tokenizer: is missing"):
        evaluate(engine.model, benchmarks)
