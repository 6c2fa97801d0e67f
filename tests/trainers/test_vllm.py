"""The trainers on a real vLLM server, with weights sent over the disk."""

import asyncio
import json
import math
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from small_runs import every_other
from trainers.two_processes import run_two_processes
from transformers import AutoConfig, AutoModelForCausalLM

from step_trl import StepGRPOConfig, testbed
from step_trl.evaluation.chat import ChatClient
from step_trl.rollout.engines import EngineError, EngineUnavailableError
from step_trl.rollout.engines.vllm_process import free_port
from step_trl.runtime.weight_sync import WeightSyncError, check_log_probabilities


pytestmark = pytest.mark.timeout(600)


@pytest.fixture
def on_server(build, vllm_server):
    def on_server(method, **options):
        servers = {"vllm_mode": "server", "weight_sync": "disk", "vllm_server_base_url": vllm_server.url}
        lengths = {"max_completion_length": 48, "learning_rate": 1e-3}
        return build(method, use_vllm=True, **servers | lengths | options)

    return on_server


@pytest.mark.parametrize("method", ["step_grpo", "sas"])
def test_trains_on_a_server(on_server, method, mixed_problems):
    trainer = on_server(
        method,
        max_steps=3,
        max_completion_length=160,  # some are ended early
        train_dataset=mixed_problems,
        weight_sync_check_every=1,
        trainer_options={"reward_funcs": every_other},
    )
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 3
    # At a learning rate this high, a server with old weights would be far off.
    assert all(entry["sampling/sampling_logp_difference/max"] < 1e-3 for entry in logs)
    moved = max((a - b).abs().max().item() for a, b in zip(before, trainer.model.parameters()))
    assert moved > 1e-4
    if method == "step_grpo":
        assert sum(entry["step_grpo/exit_rate"] for entry in logs) > 0
    folders = [path.name for path in (trainer.vllm_generation.folder).iterdir()]
    assert len(folders) == 1 and folders[0].startswith("weights-")


@pytest.mark.parametrize("structure", ["chain", "tree"])
def test_values_are_sampled_on_a_server(on_server, structure, mixed_problems):
    tree = {"branching": [2, 2], "segment_tokens": 60, "edges_per_question": 3}
    trainer = on_server(
        "spo", structure=structure, value_samples=2, max_segments=3, max_completion_length=160, max_steps=2,
        train_dataset=mixed_problems, weight_sync_check_every=1, **tree,
    )  # fmt: skip
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 2 and all(math.isfinite(entry["loss"]) for entry in logs)
    # Replayed segments do not count.
    assert all(entry["sampling/sampling_logp_difference/max"] < 1e-3 for entry in logs)
    for entry in logs:
        # Without a value if no segment of the trees teaches anything.
        assert (structure == "tree" and "spo/masked_frac" not in entry) or entry["spo/masked_frac"] < 1


@pytest.mark.parametrize(
    ("method", "options", "logged"),
    [
        (
            "critique_grpo",
            {"refine_when": "always", "critique": "self", "max_critique_length": 40},
            {"critique/refined_frac": 1},
        ),
        ("gvm", {"estimate_samples": 2, "generations_per_estimate": 1}, {"budget/mean": 4}),
        ("spae", {"probe_samples": 2, "max_probes": 2}, {"spae/steps": 2}),
    ],
)
def test_further_completions_are_sampled_on_a_server(on_server, method, options, logged, mixed_problems):
    trainer = on_server(
        method, max_completion_length=160, max_steps=2, train_dataset=mixed_problems, weight_sync_check_every=1,
        **options,
    )  # fmt: skip
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 2 and all(math.isfinite(entry["loss"]) for entry in logs)
    for entry in logs:
        assert entry["sampling/sampling_logp_difference/max"] < 1e-3
        assert {name: entry[name] for name in logged} == logged


def test_critiques_come_from_an_endpoint(build, vllm_server, monkeypatch):
    """The testbed model gives no verdict, so its critiques are asked for, and replaced."""
    written, ask = [], ChatClient.ask

    async def recording(self, client, content):
        written.append(await ask(self, client, content))
        return written[-1]

    monkeypatch.setattr(ChatClient, "ask", recording)
    failing = {"reward_funcs": lambda completions, **_: [0.0] * len(completions)}
    trainer = build(
        "critique_grpo", trainer_options=failing, critique="cot", critic_url=f"{vllm_server.url}/v1",
        critic_model=str(testbed.MODEL_DIR), critic_options={"max_tokens": 16}, max_completion_length=40,
    )  # fmt: skip
    trainer.train()
    assert len(written) == 8 and all(text and len(text) > 3 for text in written)
    assert trainer.state.log_history[0]["critique/agreed"] == 0


def test_trains_in_a_notebook(on_server):
    async def cell():
        trainer = on_server("step_grpo", max_steps=1)
        trainer.train()
        return trainer.state.global_step

    assert asyncio.run(cell()) == 1


@pytest.mark.parametrize(("method", "ahead"), [("step_grpo", 0), ("sas", 0), ("step_grpo", 1)])
def test_two_ranks_share_a_server(method, ahead, vllm_server, tmp_path):
    script = Path(__file__).with_name("two_ranks_on_a_server.py")
    arguments = [method, vllm_server.url, str(tmp_path / "out"), str(ahead)]
    ended = run_two_processes(script, arguments, tmp_path, seconds=300)
    assert [status for status, _ in ended] == [0, 0], ended
    first, second = (json.loads((tmp_path / f"out.{rank}.json").read_text()) for rank in (0, 1))
    assert len(first["batches"]) == len(second["batches"]) == 3
    for mine, theirs in zip(first["batches"], second["batches"]):
        assert mine == [mine[0]] * 4 and theirs == [theirs[0]] * 4 and mine != theirs  # a group on each rank
    logs = [entry for entry in first["history"] if "loss" in entry]
    assert len(logs) == 3
    # At a learning rate this high, older weights are far off.
    stale = [entry["sampling/sampling_logp_difference/max"] > 1e-3 for entry in logs]
    assert stale == [entry.get("rollouts_ahead/staleness", 0) == 1 for entry in logs] == [False, ahead == 1, False]


def test_what_the_server_reads_is_the_policy(on_server):
    trainer = on_server("step_grpo", max_steps=1)
    trainer.train()
    trainer.vllm_generation.sync_weights()
    (folder,) = trainer.vllm_generation.folder.iterdir()
    saved = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    for (name, ours), (_, theirs) in zip(trainer.model.named_parameters(), saved.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_lora_is_merged_on_the_way(on_server, mixed_problems):
    peft_config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    trainer = on_server(
        "step_grpo",
        max_steps=2,
        weight_sync_check_every=1,
        train_dataset=mixed_problems,
        trainer_options={"peft_config": peft_config, "reward_funcs": every_other},
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all(entry["sampling/sampling_logp_difference/max"] < 1e-3 for entry in logs)


def test_stale_weights_are_found(on_server, monkeypatch):
    trainer = on_server("step_grpo", max_steps=1)
    monkeypatch.setattr(trainer.vllm_generation, "sync_weights", lambda: None)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    with pytest.raises(WeightSyncError, match=r"differ from the policy's by .* other weights"):
        trainer.train()


def test_a_difference_names_tied_embeddings():
    sampled, policy = torch.tensor([[-1.0, math.nan, -2.0]]), torch.tensor([[-1.2, -3.0, -2.2]])
    options = {"support_is_whole": True, "tied_embeddings": True, "urls": ["http://a"]}
    check_log_probabilities(sampled, policy, torch.ones(1, 3), tolerance=0.21, **options)
    with pytest.raises(WeightSyncError, match=r"http://a .* by 0\.200 .*tie_word_embeddings=False"):
        check_log_probabilities(sampled, policy, torch.ones(1, 3), tolerance=0.1, **options)
    # With top-p, the server's are higher by right.
    check_log_probabilities(sampled, policy, torch.ones(1, 3), tolerance=0.1, **options | {"support_is_whole": False})


def test_a_server_that_is_not_there_is_named_at_start(on_server, vllm_server, monkeypatch):
    monkeypatch.setattr(vllm_server, "url", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(EngineUnavailableError, match=r"127\.0\.0\.1.* did not answer.*step-trl serve MODEL"):
        on_server("sas", vllm_server_timeout=1.0)


def test_a_server_that_is_another_one_is_refused_at_start(on_server, mortal_server):
    """Before TRL opens a process group with it."""
    larger = AutoConfig.from_pretrained(testbed.MODEL_DIR, hidden_size=256)
    with pytest.raises(EngineError, match=r"model: .* hidden_size 128, .* instead of hidden_size 256"):
        on_server("sas", weight_sync="nccl", model=AutoModelForCausalLM.from_config(larger))
    with pytest.raises(EngineError, match=r"weight_sync: .* has no weight-transfer engine"):
        on_server("step_grpo", weight_sync="nccl", vllm_server_base_url=mortal_server.url)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_sync": "ftp"}, "weight_sync: 'ftp' is not known"),
        ({"weight_sync_check_every": -1}, "weight_sync_check_every: -1"),
        ({"vllm_server_base_url": ["http://a", "http://b"]}, "vllm_server_base_url: 2 servers"),
        ({"vllm_mode": "colocate", "weight_sync": "disk"}, "weight_sync: 'disk' is for servers"),
    ],
)
def test_bad_options_are_named(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        StepGRPOConfig(str(tmp_path), bf16=False, use_vllm=True, **options)
