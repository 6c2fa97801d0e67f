"""Prompts with images on a vLLM server, compared with the in-process engine."""

import asyncio
import http.server
import sys
import threading
from pathlib import Path

import pytest
from llava_on_vllm import install
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import prepare_multimodal_messages

from step_trl import EfficientReasoningConfig, EfficientReasoningTrainer, StepGRPOConfig, StepGRPOTrainer
from step_trl.evaluation import evaluate
from step_trl.rollout import AnswerConsistency, DynamicTruncatedRollout, SamplingParams
from step_trl.rollout.engines import PromptImages, TransformersEngine, VLLMServer, VLLMServerEngine
from step_trl.rollout.engines.served_images import ServedImages
from step_trl.rollout.engines.vllm_http import EngineError


sys.path.append(str(Path(__file__).parents[1] / "trainers"))
from small_runs import SMALL_RUN, every_other
from tiny_llava import pictures, save_tiny_llava


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", install(tmp_path_factory.mktemp("plugin")))
        log_file = tmp_path_factory.mktemp("vllm") / "server.log"
        with VLLMServer(folder, max_model_len=256, log_file=log_file, start_timeout=300) as server:
            yield server


@pytest.fixture(scope="module")
def model(folder):
    return AutoModelForImageTextToText.from_pretrained(folder, dtype="float32")


@pytest.fixture(scope="module")
def processor(folder):
    return AutoProcessor.from_pretrained(folder)


@pytest.fixture(scope="module")
def asked(processor):
    """Token ids of questions about one picture and about three, and their images."""
    rows = [*pictures(3), *pictures(2, images=3)]
    messages = [prepare_multimodal_messages(row["prompt"], images=row["images"]) for row in rows]
    rendered = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    return rendered["input_ids"], PromptImages([row["images"] for row in rows], rendered, processor.image_token_id)


def sample(engine, prompts, **options):
    async def all_of_them():
        return await asyncio.gather(*(engine.generate(prompt, **options) for prompt in prompts))

    return asyncio.run(all_of_them())


def test_calls_are_those_of_the_engine_in_process(server, model, processor, asked):
    prompts, images = asked
    engines = [
        TransformersEngine(model, processor.tokenizer),
        VLLMServerEngine(server.url, processor.tokenizer, retry_window=10),
    ]
    asyncio.run(engines[1].check_images(processor))
    shown = [engine.with_images(prompts, images) for engine in engines]
    assert [len(prompt) for prompt in shown[1]] == [len(ids) - 3 * len(of) for ids, of in zip(prompts, images.images)]
    whole = sample(engines[0], shown[0], max_tokens=20, temperature=0.0)
    word = processor.tokenizer.decode(whole[0].token_ids[8])
    for options in (
        {},
        {"stop": [word]},
        {"abandon": lambda ids, _: len(ids) >= 6},
    ):
        ours, theirs = (
            sample(engine, prompt, max_tokens=20, temperature=0.0, **options)
            for engine, prompt in zip(engines, shown, strict=True)
        )
        for one, other in zip(ours, theirs, strict=True):
            common = min(len(one.token_ids), len(other.token_ids))  # a stream is abandoned after a piece of tokens
            assert common >= 6 or one.finish_reason == "stop"
            assert one.token_ids[:common] == other.token_ids[:common]
            assert one.finish_reason == other.finish_reason
            assert one.logprobs[:common] == pytest.approx(other.logprobs[:common], abs=1e-4)
        assert "abandon" in options or [one.token_ids for one in ours] == [one.token_ids for one in theirs]
    assert {one.finish_reason for one in sample(engines[1], shown[1], max_tokens=20, temperature=0, stop=[word])} > {
        "stop"
    }


def test_truncated_rollouts_are_those_in_process(server, model, processor, asked):
    """Probes and a thought that is continued beside them, which are streamed."""
    prompts, images = asked
    made = []
    for engine in (
        TransformersEngine(model, processor.tokenizer),
        VLLMServerEngine(server.url, processor.tokenizer, retry_window=10),
    ):
        callbacks = [AnswerConsistency(processor.tokenizer, every=5, max_probe_tokens=3)]
        rollout = DynamicTruncatedRollout(engine, callbacks, SamplingParams(24, 0.0), speculative=True)
        made.append(rollout.run(engine.with_images(prompts, images)))
    for ours, theirs in zip(*made, strict=True):
        assert ours.completion_ids == theirs.completion_ids
        assert [probe.token_ids for probe in ours.probes] == [probe.token_ids for probe in theirs.probes] != []


def test_an_evaluation_on_a_server(server, folder, processor):
    rows = pictures(4).add_column("grader", ["text"] * 4)
    engine = VLLMServerEngine(server.url, processor.tokenizer, retry_window=10)
    options = {"temperature": 0.0, "max_tokens": 12, "require_end_of_thinking": False}
    on_server = evaluate(engine, {"pictures": rows}, tokenizer=processor, **options)
    assert on_server["completion"].tolist() == evaluate(folder, {"pictures": rows}, **options)["completion"].tolist()
    with pytest.raises(ValueError, match="its processor as the tokenizer"):
        evaluate(engine, {"pictures": rows}, **options)


@pytest.mark.parametrize("method", ["step_grpo", "grpo"])
def test_trainings_on_a_server(server, folder, processor, tmp_path, method):
    """Step-GRPO samples itself, and GRPO by TRL's method. The server's log-probabilities are those of the policy."""
    options = SMALL_RUN | {"max_steps": 2, "per_device_train_batch_size": 8, "num_generations": 4, "use_vllm": True}
    options |= {"vllm_mode": "server", "vllm_server_base_url": server.url, "weight_sync": "disk"}
    options |= {"max_completion_length": 16, "learning_rate": 1e-2, "weight_sync_check_every": 1, "vllm_server_timeout": 15}
    trainer_class, config_class, own = (
        (StepGRPOTrainer, StepGRPOConfig, {"truncation_callbacks": [AnswerConsistency(processor.tokenizer, every=5)]})
        if method == "step_grpo"
        else (EfficientReasoningTrainer, EfficientReasoningConfig, {})
    )
    trainer = trainer_class(
        str(folder),
        every_other,
        args=config_class(str(tmp_path), **options),
        train_dataset=pictures(4, images=2),
        **own,
    )
    trainer.train()
    for logs in trainer.state.log_history[:2]:
        assert logs["grad_norm"] > 0 and logs["sampling/sampling_logp_difference/max"] < 1e-3


def test_a_server_without_the_endpoint_is_refused(processor, asked):
    class NotFound(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.send_error(404)

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), NotFound) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        engine = VLLMServerEngine(f"http://127.0.0.1:{other.server_port}", processor.tokenizer)
        (prompt, *_) = engine.with_images(*asked)
        for call in (engine.generate(prompt, max_tokens=1), engine.check_images(processor)):
            with pytest.raises(EngineError, match=r"(?s)images: .* lacks /inference/v1/generate.*--enable-scale-out"):
                asyncio.run(call)
        other.shutdown()


def test_equal_images_have_one_id_and_images_are_told_apart():
    red, blue = ([row["images"][0] for row in pictures(3)][place] for place in (0, 2))
    served = ServedImages(first=100)
    (one, other) = served.encode([[5, 9, 9, 6, 9, 9], [9, 9, 9, 9]], PromptImages([[red, blue], [red, red]], {}, 9))
    assert one[0] == 5 and one[2] == 6 and len(one) == 4 and one[1] != one[3] and min(one[1], one[3]) >= 100
    assert other == [one[1]] * 2
    body = {"prompt": [*one, 7], "max_tokens": 3, "stream": True, "model": "m", "return_token_ids": True}
    asked = served.request(body)
    assert asked["token_ids"] == [5, 9, 6, 9, 7] and asked["sampling_params"] == {"max_tokens": 3}
    assert asked["stream"] and asked["model"] == "m" and len({part["uuid"] for part in asked["content_parts"]}) == 2
    assert served.request(body | {"prompt": [5, 6]}) is None
    with pytest.raises(ValueError, match="a prompt has 2 images and 1 runs of image tokens, of \\[3\\] tokens"):
        served.encode([[9, 9, 9]], PromptImages([[red, blue]], {}, 9))
    with pytest.raises(ValueError, match="a prompt has 0 images and 1 runs"):
        served.encode([[9]], PromptImages([None], {}, 9))
