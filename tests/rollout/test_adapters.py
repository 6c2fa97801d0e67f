"""A LoRA adapter is evaluated on vLLM merged into its base model."""

import asyncio
import hashlib
from contextlib import contextmanager

import pytest
import torch
from peft import LoraConfig, get_peft_model

from step_trl import testbed
from step_trl.cli import evaluate as eval_module
from step_trl.cli.main import main
from step_trl.evaluation import read_samples
from step_trl.rollout.engines import VLLMServerEngine
from step_trl.rollout.engines.adapters import servable


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """An adapter that changes what the model says."""
    folder = tmp_path_factory.mktemp("adapter") / "lora"
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(testbed.load_model(), config).save_pretrained(folder)
    testbed.load_tokenizer().save_pretrained(folder)
    return folder


def contents(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


def test_what_is_served_leaves_the_adapter_as_it_is(adapter, tmp_path):
    before = contents(adapter)
    (tmp_path / "lora-merged").mkdir()  # of the user
    with servable(str(adapter), tmp_path) as first, servable(str(adapter), tmp_path) as second:
        assert first != second and contents(adapter) == before
        assert len(list(tmp_path.iterdir())) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["lora-merged"] and contents(adapter) == before
    with servable("Qwen/Qwen3-1.7B", tmp_path) as model:
        assert model == "Qwen/Qwen3-1.7B"


@pytest.mark.timeout(300)
def test_an_evaluation_on_vllm_samples_from_the_merged_model(adapter, tmp_path, vllm_server, monkeypatch):
    """Its greedy completions are those of the adapter in process. A running server can replace a new one."""
    engine = VLLMServerEngine(vllm_server.url, testbed.load_tokenizer())

    @contextmanager
    def server(model, log_file):
        asyncio.run(engine.load_weights(model))
        try:
            yield vllm_server
        finally:
            asyncio.run(engine.load_weights(testbed.MODEL_DIR))

    def completions(model, engine, report):
        options = ["--benchmarks", "testbed-unseen", "--limit", "4", "--max-tokens", "60", "--temperature", "0"]
        main(["eval", "--model", str(model), "--engine", engine, "--report", str(report), *options])
        return read_samples(report)["completion"].tolist()

    monkeypatch.setattr(eval_module, "VLLMServer", server)
    in_process = completions(adapter, "transformers", tmp_path / "in-process")
    assert completions(adapter, "vllm", tmp_path / "served") == in_process
    assert completions(testbed.MODEL_DIR, "transformers", tmp_path / "base") != in_process
