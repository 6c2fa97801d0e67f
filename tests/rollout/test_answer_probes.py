"""Probes of answers on the testbed model."""

import math

import pytest
import torch
from rollout.scripted_engine import ScriptedEngine
from rollout.tiny_models import log_probabilities, run

from step_trl import testbed
from step_trl.rollout import AnswerProbes, ProbedThought, forced_answer
from step_trl.rollout.callbacks import answer_confidence
from step_trl.rollout.engines import TransformersEngine


INDUCE = "\n</think>\n\nThe final answer is \\boxed{"


@pytest.fixture(scope="module")
def model():
    return testbed.load_model().eval()


@pytest.fixture(scope="module")
def tokenizer():
    return testbed.load_tokenizer()


@pytest.fixture(scope="module")
def prompt(tokenizer):
    messages = [{"role": "user", "content": "Calculate 24 + 39."}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def thought_of(tokenizer, prompt, seed=None):
    steps = ["24 + 30 = 54.\n\n", "54 + 9 = 63.\n\n", "This gives 63 again.\n\n"]
    ids = [tokenizer.encode(step, add_special_tokens=False) for step in steps]
    cuts = [sum(map(len, ids[: number + 1])) for number in range(3)]
    induce, answer = forced_answer(tokenizer, INDUCE, "63")
    return ProbedThought(prompt, [*ids[0], *ids[1], *ids[2], 2], cuts, induce, answer, seed)


def test_accuracy_and_confidence_are_those_of_the_model(model, tokenizer, prompt):
    engine = TransformersEngine(model, tokenizer)
    thought = thought_of(tokenizer, prompt, seed=11)
    probes = AnswerProbes(engine, samples=3, max_tokens=6, temperature=0.8, stop="}")
    (found, none) = probes.run([thought, ProbedThought(prompt, [5, 2], [], [7], [8])])
    assert none == [] and len(found) == 3
    sampled = 0
    for cut, (accuracy, confidence) in zip(thought.cuts, found, strict=True):
        path = [*prompt, *thought.completion_ids[:cut], *thought.answer_prompt_ids]
        probabilities = log_probabilities(model, path, thought.answer_ids).exp()
        assert accuracy == pytest.approx(probabilities.mean().item(), abs=1e-5)
        answers = run(
            *(
                engine.generate(path, max_tokens=6, temperature=0.8, stop=("}",), seed=11 + 3 * cut + number)
                for number in range(3)
            )
        )
        sampled += sum(len(answer.token_ids) for answer in answers)
        expected = [answer_confidence(answer.logprobs) for answer in answers]
        assert confidence == pytest.approx(sum(expected) / 3, abs=1e-5)
    assert probes.sampled_tokens == sampled
    assert found[0][0] < found[1][0]  # the answer is known after the second step


def test_what_is_sampled_estimates_the_entropy(model, tokenizer, prompt):
    """At the temperature of the probes, without bias: the mean of many is within four standard errors."""
    thought = thought_of(tokenizer, prompt)
    path = [*prompt, *thought.completion_ids[: thought.cuts[0]], *thought.answer_prompt_ids]
    with torch.no_grad():
        logps = (model(torch.tensor([path])).logits[0, -1] / 0.6).log_softmax(-1)
    entropy = -(logps.exp() * logps).sum().item()
    engine = TransformersEngine(model, tokenizer)
    answers = run(*(engine.generate(path, max_tokens=1, temperature=0.6, seed=seed) for seed in range(300)))
    surprise = torch.tensor([-answer.logprobs[0] for answer in answers])
    assert entropy > 0.1
    assert surprise.mean().item() == pytest.approx(entropy, abs=4 * surprise.std().item() / math.sqrt(300))


@pytest.mark.parametrize(
    ("solution", "answer"),
    [("63", "63"), (" 63\n", "63"), ("So it is \\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"), ("x = 4", "x = 4")],
)
def test_the_answer_is_that_of_the_solution(tokenizer, solution, answer):
    induce, ids = forced_answer(tokenizer, INDUCE, solution)
    assert tokenizer.decode(induce + ids) == INDUCE + answer
    assert induce + ids == tokenizer.encode(INDUCE + answer, add_special_tokens=False)
    assert forced_answer(tokenizer, INDUCE, solution, most=1) == (induce, ids[:1])


def test_a_token_with_both_belongs_to_the_answer():
    """As in Qwen's vocabulary, where the brace and a backslash are one token."""

    class Merging:
        def encode(self, text, add_special_tokens):
            return [ord(character) for character in text.replace("{\\", "\1")]

    induce, answer = forced_answer(Merging(), "\\boxed{", "\\frac12")
    assert "".join(map(chr, induce)) == "\\boxed" and "".join(map(chr, answer)) == "\1frac12"


def test_an_engine_without_log_probabilities_is_named(tokenizer, prompt):
    engine = ScriptedEngine(tokenizer, {5: 1.0})
    with pytest.raises(ValueError, match="logprobs_of: ScriptedEngine does not support it"):
        AnswerProbes(engine, samples=1).run([thought_of(tokenizer, prompt)])
    assert engine.running == 0
