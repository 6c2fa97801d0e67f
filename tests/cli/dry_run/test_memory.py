"""The estimate of a dry run: each part by hand, and the model's sizes against what is really allocated."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rollout.tiny_models import build_model
from small_runs import TESTBED_RUN, flags
from trainers.held_bytes import HeldBytes
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer
from trl import ModelConfig

from step_trl import testbed
from step_trl.cli.dry_run import memory
from step_trl.cli.dry_run.layout import Layout
from step_trl.cli.dry_run.memory import Workload, estimate_memory, remedies
from step_trl.cli.dry_run.model_size import ModelSize, model_size
from step_trl.cli.recipe import parse
from step_trl.cli.stages import build_trainer


CONFIGS = Path(__file__).parents[3] / "recipes" / "accelerate_configs"
GIB = 2**30
FSDP2 = Layout(4, "fsdp", 3)
# A model of a thousand parameters in bfloat16; the numbers are made up, and easy to tell apart.
SIZE = ModelSize(
    parameters=1000, trainable=1000, weights=2000, trained=2000, layer_parameters=100, head_parameters=200,
    head_trained=True, hidden_size=10, num_layers=8, layer_inputs=160, layer=500, layers=4000, outside=30, widest=70,
    cache=64,
)  # fmt: skip
WORK = Workload(ModelConfig("made-up", dtype="bfloat16"), Layout(), max_length=50, micro_batch=2, bf16=True)


@pytest.fixture
def made_up(monkeypatch):
    """`made_up(**fields)`: the estimate for [`SIZE`]."""
    monkeypatch.setattr(memory, "model_size", lambda config, options, bf16: SIZE)
    return lambda **fields: estimate_memory(None, replace(WORK, **fields))


@pytest.mark.parametrize(
    ("layout", "states"),
    [
        (Layout(), (2000, 2000, 0, 4000, 0, 2000)),
        (Layout(4), (2000, 2000, 0, 4000, 2000, 2000)),
        (FSDP2, (1000, 1000, 0, 2000, 0, 500)),  # 4 bytes of each weight, over 4 processes
        (Layout(4, "deepspeed", 2), (2000, 500, 1000, 2000, 0, 2000)),  # 2, 2/4, 4/4 and 8/4 of each
        (Layout(4, "deepspeed", 3), (500, 500, 1000, 2000, 0, 500)),
        (Layout(4, "fsdp", 3, offload_parameters=True, offload_optimizer=True), (0, 0, 0, 0, 0, 500)),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_what_lasts_by_hand(layout, states, made_up):
    names = ("weights", "gradients", "float32 weights", "Adam states", "buckets of DDP", "reference model")
    lasting = made_up(layout=layout, has_reference=True).lasting
    assert tuple(lasting.pop(name, 0) for name in names) == states and not lasting


def test_what_else_lasts(made_up):
    layout = replace(FSDP2, gpu_memory=80 * GIB)
    assert made_up(layout=layout, vllm_share=0.25).lasting["vLLM"] == 20 * GIB
    assert made_up(vllm_share=0.25).left_out == ["the 25% of the GPU that vLLM takes"]
    assert made_up(kept_completions=7).lasting["rollouts"] == 7 * 50 * 32
    assert made_up(optimizer="adamw_8bit").lasting["Adam states"] == 2000
    sgd = made_up(optimizer="sgd")
    assert "Adam states" not in sgd.lasting and sgd.left_out == ["states of optim=sgd"]
    lora = replace(WORK.model, use_peft=True)
    assert "reference model" not in made_up(has_reference=True, model=lora).lasting


def test_phases_by_hand(made_up):
    """A micro-batch of 100 tokens."""
    phases = made_up(cached_completions=3).phases
    assert phases["sampling"] == {"KV cache": 3 * 50 * 64}
    kept = {"inputs of layers": 160 * 100, "activations outside of layers": 30 * 100}
    assert phases["backward pass"] == kept | {"a layer": (500 + 2 * 70) * 100}
    assert phases["log-probabilities"] == kept | {
        "a tile of logits": 100 * 32768 * 2,
        "last hidden states and their gradient": 100 * 10 * 8,
        "gradient of the head": 200 * 6,
    }
    whole = made_up(gradient_checkpointing=False).phases["backward pass"]
    assert whole == {"activations": 4000 * 100, "activations outside of layers": 3000, "a layer": 2 * 70 * 100}
    long = made_up(micro_batch=4000)
    assert long.phases["log-probabilities"]["a tile of logits"] == 4096 * 32768 * 2  # never the logits of all tokens


def test_phases_of_sharded_models_by_hand(made_up):
    sharded = made_up(layout=FSDP2, has_reference=True, accumulates_unshared=True, samples_whole=True).phases
    assert sharded["sampling"] == {"all weights, gathered": 2000}
    arriving = {"reference model, gathered": 2000, "the same, as it arrives": 2000}
    assert sharded["gathering of the reference model"] == arriving
    assert sharded["reference log-probabilities"] == {"reference model, gathered": 2000, "a layer": 500 * 100}
    assert sharded["backward pass"]["layers, gathered"] == 3 * 200
    assert sharded["backward pass"]["gradients to be shared"] == 2 * 200
    assert sharded["backward pass"]["gradients, whole"] == 2000
    assert sharded["log-probabilities"]["the head, gathered"] == 2 * 400
    zero3 = made_up(layout=Layout(4, "deepspeed", 3)).phases
    assert zero3["backward pass"]["layers, gathered"] == 2000 and zero3["optimizer step"] == {
        "float32 gradients": 1000
    }


def test_a_mask_is_as_large_as_the_matrix_of_scores(made_up):
    masks = 2 * 50 * 50
    for checkpointing, count in ((True, 1), (False, 8)):  # converted for each layer, and kept
        phases = made_up(padded=True, gradient_checkpointing=checkpointing).phases
        assert phases["backward pass"]["attention masks"] == masks * (1 + 2 * count)
    flash = replace(WORK.model, attn_implementation="flash_attention_2")
    assert "attention masks" not in made_up(padded=True, model=flash).phases["backward pass"]


def test_weights_in_float32_compute_in_bfloat16_copies(monkeypatch, made_up):
    monkeypatch.setattr(memory, "model_size", lambda *arguments: replace(SIZE, weights=4000, trained=4000))
    phases = made_up().phases["backward pass"]
    assert phases["bfloat16 copies of weights"] == 2000 and phases["inputs of layers"] == 2 * 160 * 100
    assert "bfloat16 copies of weights" not in made_up(layout=FSDP2).phases["backward pass"]


def test_the_peak_is_that_of_one_phase(made_up):
    for fields in ({}, {"cached_completions": 10_000}, {"gradient_checkpointing": False, "micro_batch": 900}):
        estimate = made_up(**fields)
        sums = {phase: sum(parts.values()) for phase, parts in estimate.phases.items()}
        assert estimate.total == sum(estimate.lasting.values()) + max(sums.values())
        assert sums[estimate.peak] == max(sums.values())


def test_remedies_save_what_they_say_and_the_best_comes_first(made_up):
    work = replace(WORK, cached_completions=10_000, has_reference=True, layout=Layout(8))
    ways = remedies(None, work)
    assert ways[0][0] == "use_vllm=true with a server"
    saved = [count for _, count in ways]
    assert saved == sorted(saved, reverse=True)
    served = replace(work, cached_completions=0)
    assert ways[0][1] == estimate_memory(None, work).total - estimate_memory(None, served).total
    # Where sampling decides, nothing that only lowers the others is named.
    assert "per_device_train_batch_size=1" not in dict(ways)
    assert "per_device_train_batch_size=1" in dict(remedies(None, served))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ddp", Layout(8)),
        ("fsdp2", Layout(8, "fsdp", 3)),
        ("zero2", Layout(8, "deepspeed", 2)),
        ("zero3", Layout(8, "deepspeed", 3)),
    ],
)
def test_the_layout_of_a_file_and_of_its_launch(name, expected, monkeypatch):
    assert Layout.of(CONFIGS / f"{name}.yaml", gpu_memory=80) == replace(expected, gpu_memory=80 * GIB)
    assert Layout.of(CONFIGS / f"{name}.yaml", num_processes=4) == replace(expected, processes=4)
    launched = {
        "ddp": {},
        "fsdp2": {"ACCELERATE_USE_FSDP": "true", "FSDP_RESHARD_AFTER_FORWARD": "true", "FSDP_OFFLOAD_PARAMS": "false"},
        "zero2": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
        "zero3": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
    }
    for variable, value in (launched[name] | {"WORLD_SIZE": "8"}).items():
        monkeypatch.setenv(variable, value)
    assert Layout.of() == expected


def test_what_is_offloaded(tmp_path):
    text = (CONFIGS / "fsdp2.yaml").read_text()
    file = tmp_path / "offload.yaml"
    file.write_text(text.replace("fsdp_offload_params: false", "fsdp_offload_params: true"))
    assert Layout.of(file) == Layout(8, "fsdp", 3, offload_parameters=True, offload_optimizer=True)
    deepspeed = tmp_path / "deepspeed.json"
    deepspeed.write_text(json.dumps({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}))
    file.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: DEEPSPEED\nnum_processes: 2\nuse_cpu: false\n"
        f"debug: false\ndeepspeed_config:\n  deepspeed_config_file: {deepspeed}\n"
    )
    assert Layout.of(file) == Layout(2, "deepspeed", 3, offload_optimizer=True)


@pytest.mark.parametrize("use_peft", [False, True])
def test_the_estimate_is_what_a_training_allocates(use_peft, tmp_path):
    """Compare with the real sizes of weights, gradients, Adam's states after an update, and a key-value cache."""
    config = AutoConfig.from_pretrained(testbed.MODEL_DIR)
    options = ModelConfig("testbed", dtype="float32", use_peft=use_peft)
    work = Workload(options, Layout(), 7, 3, has_reference=True, cached_completions=2)
    estimate = estimate_memory(config, work)
    given = TESTBED_RUN | {"trainer": "grpo", "output_dir": tmp_path, "beta": 0.1, "max_completion_length": 8}
    trainer = build_trainer(*parse({}, flags(given | {"use_peft": use_peft})))
    watcher = HeldBytes(trainer)
    trainer.train()
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    assert estimate.parameters == sum(p.numel() for p in trainer.model.parameters())
    assert estimate.trainable == sum(p.numel() for p in trained)
    for part, measured in watcher.held.items():
        assert estimate.lasting.get(part, 0) == measured, part
    assert (watcher.held["reference model"] > 0) == (not use_peft)
    model = AutoModelForCausalLM.from_pretrained(testbed.MODEL_DIR)
    cache = model(torch.zeros(2, 7, dtype=torch.long)).past_key_values
    measured = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert estimate.phases["sampling"]["KV cache"] == measured
    inputs = estimate.phases["backward pass"]["inputs of layers"]
    assert inputs == 3 * 7 * config.num_hidden_layers * config.hidden_size * 4


def test_activations_are_what_autograd_keeps_of_the_real_model():
    """Within a layer of the testbed model, with the attention of a CPU in place of the fused kernel of a GPU."""
    model, tokens = testbed.load_model(), 200
    layer = next(module for module in model.modules() if isinstance(module, GradientCheckpointingLayer))
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept, inside = {}, []
    layer.register_forward_pre_hook(lambda *_: inside.append(True))
    layer.register_forward_hook(lambda *_: inside.clear())

    def pack(tensor):
        storage = tensor.untyped_storage()
        if inside and storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    ids = torch.zeros(1, tokens, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.model(input_ids=ids, use_cache=False)
    measured = sum(storage.nbytes() for storage in kept.values()) / tokens
    estimated = model_size(model.config, ModelConfig(dtype="float32"), bf16=False).layer
    assert estimated == pytest.approx(measured, rel=0.15)


def test_tied_embeddings_are_counted_once():
    config = AutoConfig.from_pretrained(testbed.MODEL_DIR)
    count = model_size(config, ModelConfig(dtype="float32"), bf16=False).parameters
    config.tie_word_embeddings = True
    tied = model_size(config, ModelConfig(dtype="float32"), bf16=False)
    assert count - tied.parameters == tied.head_parameters == config.vocab_size * config.hidden_size


def test_experts_in_float32_are_counted_as_twice_those_in_bfloat16():
    config = build_model("qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16).config
    half, whole = (model_size(config, ModelConfig(dtype=dtype), bf16=False) for dtype in ("bfloat16", "float32"))
    assert (whole.weights, whole.cache, whole.layer) == (2 * half.weights, 2 * half.cache, 2 * half.layer)
    mixed = model_size(config, ModelConfig(dtype="float32"), bf16=True)
    assert (mixed.weights, mixed.cache, mixed.layer) == (whole.weights, whole.cache, half.layer)


def test_states_of_a_recurrence_do_not_grow_with_the_tokens():
    assert model_size(build_model("mamba", None).config, ModelConfig(dtype="float32"), bf16=False).cache == 0


def test_recurrent_layers_beside_attention_have_no_key_value_cache():
    options, work = ModelConfig(dtype="bfloat16"), replace(WORK, cached_completions=1)
    config = build_model("qwen3_5_text", num_hidden_layers=4, linear_num_key_heads=2, linear_num_value_heads=4).config
    attention = build_model("qwen3", num_hidden_layers=1).config  # every fourth layer
    sizes = [model_size(config, options, bf16=False) for config in (config, attention)]
    assert sizes[0].cache == sizes[1].cache > 0 and sizes[0].num_layers == 4
    assert estimate_memory(config, work).left_out == ["what fused kernels of recurrent layers save"]
    assert estimate_memory(attention, work).left_out == []
