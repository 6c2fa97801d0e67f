"""Trainings whose server fails, whose processes differ, or whose servers do not load the weights."""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from contextlib import nullcontext
from pathlib import Path

import pytest
from rollout.faulty_proxy import FaultyProxy
from rollout.server_metrics import generated_tokens
from small_runs import every_other
from trainers.seeded_ranks import sample_two_steps
from trainers.two_processes import run_two_processes
from transformers import AutoConfig, AutoModelForCausalLM, TrainerCallback

from step_trl import testbed
from step_trl.rollout.engines import EngineUnavailableError
from step_trl.rollout.engines.vllm_process import VLLMServer
from step_trl.runtime.weight_sync import WeightSyncError


pytestmark = pytest.mark.timeout(600)


@pytest.fixture
def on_server(build):
    def on_server(method, url, **options):
        return build(
            method,
            use_vllm=True,
            vllm_mode="server",
            weight_sync="disk",
            weight_sync_check_every=1,
            vllm_server_base_url=url,
            **{"max_completion_length": 48, "learning_rate": 1e-3} | options,
        )

    return on_server


# Processes that differ


def completions_of(prompts_and_completions):
    """Return the completions of each prompt, in order."""
    completions = defaultdict(list)
    for prompt, completion in prompts_and_completions:
        completions[tuple(prompt)].append(completion)
    return {prompt: sorted(each) for prompt, each in completions.items()}


def test_seeded_completions_do_not_depend_on_processes_or_servers(vllm_server, mortal_server, tmp_path):
    """One process, two on a server, and two on two servers sample the same completions for the same prompts."""
    alone = sample_two_steps([vllm_server.url], 1, str(tmp_path / "alone"))
    before = [generated_tokens(server.url) for server in (vllm_server, mortal_server)]
    both = f"{vllm_server.url},{mortal_server.url}"
    script = Path(__file__).with_name("seeded_ranks.py")
    ended = run_two_processes(script, [str(tmp_path / "out"), vllm_server.url, both], tmp_path, seconds=240)
    assert [status for status, _ in ended] == [0, 0], ended
    assert generated_tokens(mortal_server.url) - before[1] > 100  # it was used as well
    assert generated_tokens(vllm_server.url) - before[0] > 100
    ranks = [json.loads((tmp_path / f"out.{rank}.json").read_text()) for rank in (0, 1)]
    for run in (0, 1):
        differences = 0
        for step in (0, 1):
            expected = completions_of(alone[step])
            found = completions_of([pair for rank in ranks for pair in rank[run][step]])
            assert len(expected) == 2 and found.keys() == expected.keys()
            assert all(len(completions) == 4 for completions in found.values())
            assert all(len({tuple(c) for c in completions}) > 1 for completions in found.values())
            differences += sum(
                sum(completion not in expected[prompt] for completion in completions)
                for prompt, completions in found.items()
            )
        assert differences <= 1  # of 16: rounding in other batches
    assert completions_of(alone[0]).keys() != completions_of(alone[1]).keys()


@pytest.fixture(scope="module")
def unlike_ranks(vllm_server, tmp_path_factory):
    """
    Three trainings in turn: on rank 1, the first has a small budget and then one plain generation more, and the others
    a callback that fails, in a batch that is sampled ahead and in the first one.
    """
    folder = tmp_path_factory.mktemp("unlike")
    script = Path(__file__).with_name("unlike_ranks.py")
    return folder, run_two_processes(script, [vllm_server.url, str(folder / "out")], folder, seconds=120)


def test_ranks_with_long_and_short_completions_wait_for_each_other(unlike_ranks):
    folder, _ = unlike_ranks
    first, second = (json.loads((folder / f"out.{rank}.json").read_text()) for rank in (0, 1))
    assert len(first) == len(second) == 2
    for longs, shorts in zip(first, second):
        assert len(longs) == len(shorts) == 4
        assert 2 * max(shorts) < min(longs)


def test_a_callback_that_fails_on_one_rank_ends_both(unlike_ranks):
    """Rank 1 ends with its own traceback, rank 0 with an error that names rank 1."""
    _, (first, second) = unlike_ranks
    assert first[0] != 0 and second[0] != 0
    assert "in at_boundary" in second[1]
    assert second[1].rstrip().endswith("ZeroDivisionError: the callback of rank 1")
    assert "RuntimeError: Process 1 failed. ZeroDivisionError: the callback of rank 1" in first[1]


def test_a_callback_that_fails_in_the_background_ends_both_when_its_batch_is_needed(unlike_ranks):
    folder, _ = unlike_ranks
    (first, first_step), (second, second_step) = (
        json.loads((folder / f"out.ahead.{rank}.json").read_text()) for rank in (0, 1)
    )
    assert second == "ZeroDivisionError: the callback of rank 1"
    assert first == f"RuntimeError: Process 1 failed. {second}"
    assert first_step == second_step == 1


# A server goes away


@pytest.mark.parametrize(("method", "how"), [("step_grpo", "killed"), ("sas", "cut off")])
def test_a_training_goes_on_where_its_server_left_it(
    method, how, on_server, vllm_server, mortal_server, mixed_problems, caplog, tmp_path
):
    """If it is away for longer than the time-out, a checkpoint is saved. A new trainer resumes when it is back."""

    class EndOfServer(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                mortal_server.kill() if how == "killed" else proxy.go_away()

    with FaultyProxy(vllm_server.url) if how == "cut off" else nullcontext() as proxy:
        url = mortal_server.url if proxy is None else proxy.url
        options = {"max_steps": 4, "vllm_server_timeout": 1.0, "train_dataset": mixed_problems}
        arguments = {"reward_funcs": every_other}
        trainer = on_server(method, url, trainer_options=arguments | {"callbacks": [EndOfServer()]}, **options)
        with caplog.at_level(logging.ERROR, logger="step_trl"), pytest.raises(EngineUnavailableError) as caught:
            trainer.train()
        for part in (url, "step-trl serve MODEL", "--logprobs-mode processed_logprobs"):
            assert part in str(caught.value)
        assert trainer.state.global_step == 2
        checkpoint = tmp_path / method / "checkpoint-2"
        assert (checkpoint / "trainer_state.json").exists() and (checkpoint / "optimizer.pt").exists()
        assert f"Saved {checkpoint}" in caplog.text

        # Back with the weights of its start.
        mortal_server.start() if how == "killed" else proxy.come_back()
        resumed = on_server(method, url, trainer_options=arguments, **options)
        resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
    logs = [entry for entry in resumed.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in logs] == [1, 2, 3, 4]
    # At a learning rate this high, a server with old weights would be far off.
    assert all(entry["sampling/sampling_logp_difference/max"] < 1e-3 for entry in logs)
    trained = zip(trainer.model.parameters(), testbed.load_model().parameters(), strict=True)
    assert max((ours - theirs).abs().max().item() for ours, theirs in trained) > 1e-4


# A server that does not take the weights


def test_a_model_with_tied_embeddings_is_found_out(on_server, tokenizer, tmp_path):
    """vLLM's CPU server keeps the old lm_head of such a model: weights are equal at first, but not after an update."""
    folder = tmp_path / "tied"
    config = AutoConfig.from_pretrained(testbed.MODEL_DIR)
    config.tie_word_embeddings = True
    model = AutoModelForCausalLM.from_config(config)
    weights = {name: tensor for name, tensor in testbed.load_model().state_dict().items() if "lm_head" not in name}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    assert model.lm_head.weight is model.get_input_embeddings().weight
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

    log_file = tmp_path / "tied.log"
    with VLLMServer(folder, max_model_len=1024, log_file=log_file, start_timeout=240) as server:
        trainer = on_server(
            "sas",
            server.url,
            model=AutoModelForCausalLM.from_pretrained(folder, dtype="float32"),
            max_steps=2,
            learning_rate=1e-2,
            max_completion_length=64,
            trainer_options={"reward_funcs": every_other},
        )
        with pytest.raises(
            WeightSyncError, match=r"differ from the policy's .*set tie_word_embeddings=False"
        ) as caught:
            trainer.train()
    assert server.url in str(caught.value)
    assert trainer.state.global_step == 1
