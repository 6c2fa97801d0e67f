"""What the package embeds: model, tokenizer, problems, and the script that makes them."""

import random

import pytest
import reasoning_gym
import torch
from testbed_model import traces
from testbed_model.pretrain import IGNORE, Corpus, Recipe, encode, pretrain

from step_trl import testbed
from step_trl.testbed import problems


@pytest.fixture(scope="module")
def tokenizer():
    return testbed.load_tokenizer()


def test_model_is_small_untied_qwen3_in_float32():
    model = testbed.load_model()
    assert model.config.model_type == "qwen3"
    assert not model.config.tie_word_embeddings
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert 1_000_000 <= model.num_parameters() <= 2_000_000
    assert sum(file.stat().st_size for file in testbed.MODEL_DIR.iterdir()) <= 8_000_000


def test_tokenizer_has_blank_line_merges_and_opens_the_thought(tokenizer):
    assert ".\n\n" in [tokenizer.decode(index) for index in range(len(tokenizer))]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Calculate 1 + 2."}], add_generation_prompt=True, tokenize=False
    )
    assert prompt.endswith("<|im_start|>assistant\n<think>\n")
    for tag in ("<think>", "</think>"):
        (index,) = tokenizer.encode(tag)
        assert tokenizer.decode([index], skip_special_tokens=True) == tag
    text = "Wait, é → 47.\n\nAlternatively…"
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("split", problems.SPLITS)
def test_rows(split):
    rows = testbed.load_dataset(split)
    assert rows.column_names == ["prompt", "solution"]
    assert len(rows) == problems.SPLITS[split].size
    assert rows[0]["prompt"][0]["role"] == "user"


def test_an_unknown_split_is_named():
    with pytest.raises(ValueError, match=r"split: 'test' is not known.*easy"):
        testbed.load_dataset("test")


def test_splits_share_no_problem():
    expressions = [row["expression"] for split in problems.SPLITS for row in problems.read_problems(split)]
    assert len(expressions) == len(set(expressions))


@pytest.mark.parametrize("split", problems.SPLITS)
def test_solutions_are_right_by_the_generators_own_scorer(split):
    dataset = reasoning_gym.create_dataset(problems.SPLITS[split].generator, size=1, seed=0)
    for row in problems.read_problems(split):
        assert dataset.score_answer(row["solution"], {"answer": str(eval(row["expression"]))}) == 1.0
        assert sum(problems.parse_expression(row["expression"])) == int(row["solution"])


def test_frozen_files_are_what_the_script_writes(tmp_path):
    problems.freeze(tmp_path)
    for split in problems.SPLITS:
        assert (tmp_path / f"{split}.jsonl").read_text() == (testbed.DATA_DIR / f"{split}.jsonl").read_text()


def written(pieces):
    return "".join(piece.text for piece in pieces)


def test_traces_without_slips_are_right():
    writer = traces.TraceWriter(random.Random(0), traces.SlipRates(0, 0, 0))
    for terms in ([12, 47], [90, -38, 7, 55], [10, 20, -30, 99, -5]):
        thought = written(writer.thought(terms))
        assert f"So the answer is {sum(terms)}." in thought
        assert thought.count("Wait") + thought.count("Alternatively") >= 2
        assert ", not " not in thought


def test_wrong_results_carry_no_loss(tokenizer):
    writer = traces.TraceWriter(random.Random(1), traces.SlipRates(0.5, 0.5, 0.5))
    for seed in range(20):
        pieces = writer.thought([seed + 10, 47, -8])
        ids, labels = encode(tokenizer, pieces)
        untrained = tokenizer.decode([i for i, label in zip(ids, labels) if label == IGNORE])
        assert untrained == written([piece for piece in pieces if not piece.trained])
        assert untrained


def test_a_trace_cut_at_a_trigger_trains_the_true_answer_only(tokenizer):
    rng = random.Random(2)
    thought = traces.TraceWriter(rng).thought([31, 14, 50])
    pieces = traces.cut_at_trigger(thought, [31, 14, 50], rng)
    assert [piece.text for piece in pieces if piece.trained] == ["95}."]
    assert traces.ANSWER_PROMPT in written(pieces)


def test_no_evaluation_problem_is_pretrained_on():
    taken = {row["expression"] for split in problems.EVALUATION_SPLITS for row in problems.read_problems(split)}
    corpus = Corpus(0)
    seen = {traces.written_sum(corpus.problem()[1]) for _ in range(3000)}
    assert not seen & taken


def test_pretraining_runs_from_end_to_end(tmp_path):
    recipe = Recipe(
        hidden_size=32, layers=1, heads=2, drill_updates=2, easy_pass_updates=2, pass_updates=2, drill_tokens=512,
        trace_updates=2, trace_tokens=2_048,
    )  # fmt: skip
    pretrain(recipe, tmp_path)
    assert {"model.safetensors", "tokenizer.json", "chat_template.jinja"} <= {file.name for file in tmp_path.iterdir()}
