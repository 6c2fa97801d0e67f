"""Prompts with images on a vLLM server of the visual testbed, compared with the in-process engine."""

import asyncio
import http.server
import json
import threading

import pytest
from llava_on_vllm import install
from PIL import Image
from small_runs import SMALL_RUN, TESTBED_RUN, every_other
from trl import prepare_multimodal_messages

from step_trl import EfficientReasoningConfig, EfficientReasoningTrainer, StepGRPOConfig, StepGRPOTrainer
from step_trl.cli.evaluate import run_eval
from step_trl.cli.main import main
from step_trl.evaluation import evaluate, load_benchmark
from step_trl.rollout import ConfidenceTruncation, DynamicTruncatedRollout, SamplingParams
from step_trl.rollout.engines import PromptImages, TransformersEngine, VLLMServer, VLLMServerEngine
from step_trl.rollout.engines.served_images import ServedImages
from step_trl.rollout.engines.vllm_http import EngineError
from step_trl.testbed import vision


pytestmark = [pytest.mark.xdist_group("served images"), pytest.mark.timeout(300)]  # they share a server


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", install(tmp_path_factory.mktemp("plugin")))
        log_file = tmp_path_factory.mktemp("vllm") / "server.log"
        with VLLMServer(vision.MODEL_DIR, max_model_len=1024, log_file=log_file, start_timeout=300) as server:
            yield server


@pytest.fixture(scope="module")
def processor():
    return vision.load_processor()


@pytest.fixture(scope="module")
def asked(processor):
    """Token ids of questions about one picture and about three, and their images."""
    rows = [row for split in ("easy", "clips") for row in vision.load_dataset(split).select(range(3))]
    messages = [prepare_multimodal_messages(row["prompt"], images=row["images"]) for row in rows]
    rendered = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    return rendered["input_ids"], PromptImages([row["images"] for row in rows], rendered, processor.image_token_id)


@pytest.fixture(scope="module")
def engines(server, processor):
    """The engine in process, and that of the server."""
    return (
        TransformersEngine(vision.load_model(), processor.tokenizer),
        VLLMServerEngine(server.url, processor.tokenizer, retry_window=10),
    )


def sample(engine, prompts, **options):
    async def all_of_them():
        return await asyncio.gather(*(engine.generate(prompt, **options) for prompt in prompts))

    return asyncio.run(all_of_them())


def test_calls_are_those_of_the_engine_in_process(engines, processor, asked):
    prompts, images = asked
    asyncio.run(engines[1].check_images(processor))
    shown = [engine.with_images(prompts, images) for engine in engines]
    assert [len(prompt) for prompt in shown[1]] == [
        len(ids) - 8 * len(of) for ids, of in zip(prompts, images.images, strict=True)
    ]
    for options, reasons in (
        ({}, {"length"}),
        ({"stop": [" north"], "max_tokens": 40}, {"stop", "length"}),
        # A busy server joins pieces, so that a short call may be over before it can be abandoned.
        ({"abandon": lambda ids, _: len(ids) >= 6, "max_tokens": 400}, {"abandoned"}),
        ({"max_tokens": 400}, {"eos"}),
    ):
        options = {"max_tokens": 20, "temperature": 0.0} | options
        ours, theirs = (sample(engine, of, **options) for engine, of in zip(engines, shown, strict=True))
        assert {one.finish_reason for one in ours} == reasons
        for one, other in zip(ours, theirs, strict=True):
            assert one.finish_reason == other.finish_reason
            # A server's call is abandoned after a piece of several tokens.
            common = 6 if "abandon" in options else len(other.token_ids)
            assert one.token_ids[:common] == other.token_ids[:common]
            assert one.logprobs[:common] == pytest.approx(other.logprobs[:common], abs=1e-3)


def test_truncated_rollouts_are_those_in_process(engines, processor, asked):
    """Probes are abandoned, and thoughts continue beside them, so that both are streamed."""
    made = []
    for engine in engines:
        callbacks = [ConfidenceTruncation(processor.tokenizer, answer_prompt="\n</think>\n<answer>", threshold=0.98)]
        rollout = DynamicTruncatedRollout(engine, callbacks, SamplingParams(400, 0.0), speculative=True)
        made.append(rollout.run(engine.with_images(*asked)))
    for ours, theirs in zip(*made, strict=True):
        assert ours.completion_ids == theirs.completion_ids and ours.truncated == theirs.truncated
        assert [probe.outcome for probe in ours.probes] == [probe.outcome for probe in theirs.probes] != []
    assert {rollout.truncated for rollout in made[0]} == {True, False}


def test_an_evaluation_on_a_server(engines, processor):
    rows = load_benchmark("vision-testbed-easy").select(range(4))
    options = {"temperature": 0.0, "max_tokens": 200}
    ours, theirs = (evaluate(engine, {"easy": rows}, tokenizer=processor, **options) for engine in engines)
    assert ours["completion"].tolist() == theirs["completion"].tolist() and theirs["correct"].any()
    with pytest.raises(ValueError, match="its processor as the tokenizer"):
        evaluate(engines[1], {"easy": rows}, **options)


def test_commands_on_a_server(server, tmp_path, capsys):
    table = run_eval(
        "vision-testbed", ["vision-testbed-easy"], tmp_path / "report", engine="vllm", urls=[server.url],
        limit=2, max_tokens=200, n=1,
    )  # fmt: skip
    assert table["tokens"].min() > 20
    served = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": server.url, "weight_sync": "disk"}
    options = TESTBED_RUN | served | {"model_name_or_path": "vision-testbed", "dataset": "vision-testbed"}
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(options | {"trainer": "grpo", "output_dir": str(tmp_path / "run")}))
    with pytest.raises(SystemExit, match="0"):
        main(["train", "--config", str(recipe), "--dry-run"])
    assert "weights by disk, the processor's tokens of images" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("method", ["step_grpo", "grpo"])
def test_trainings_on_a_server(server, tmp_path, method):
    """Step-GRPO samples itself, and GRPO by TRL's method. The server's log-probabilities are those of the policy."""
    options = SMALL_RUN | {"max_steps": 2, "per_device_train_batch_size": 8, "num_generations": 4, "use_vllm": True}
    options |= {"vllm_mode": "server", "vllm_server_base_url": server.url, "vllm_server_timeout": 15}
    options |= {"weight_sync": "disk", "weight_sync_check_every": 1, "max_completion_length": 100}
    trainer_class, config_class = (
        (StepGRPOTrainer, StepGRPOConfig)
        if method == "step_grpo"
        else (EfficientReasoningTrainer, EfficientReasoningConfig)
    )
    trainer = trainer_class(
        vision.load_model(),
        every_other,
        args=config_class(str(tmp_path), learning_rate=1e-3, **options),
        train_dataset=vision.load_dataset("clips").select(range(4)),
        processing_class=vision.load_processor(),
    )
    trainer.train()
    for logs in trainer.state.log_history[:2]:
        assert logs["grad_norm"] > 0 and logs["sampling/sampling_logp_difference/max"] < 1e-2
    if method == "step_grpo":
        assert any(rollout.probes for rollout in trainer.batch.rollouts)


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
    red, blue = (Image.new("RGB", (4, 4), colour) for colour in ("red", "blue"))
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
