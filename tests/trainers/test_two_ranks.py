"""An update does not depend on how many processes share it, nor a training on where it was interrupted."""

import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from trainers.equal_ranks import train
from trainers.resumed_run import train_and_resume
from trainers.two_processes import run_two_processes
from transformers import AutoConfig, AutoModelForCausalLM
from trl import ModelConfig

from step_trl import testbed
from step_trl.cli.dry_run.layout import Layout
from step_trl.cli.dry_run.memory import Workload, estimate_memory
from step_trl.runtime.checkpoints import load_rollouts, save_rollouts
from step_trl.runtime.ranks import check_rollouts_in_process
from step_trl.trainers.lapo_config import LENGTHS_FILE as LAPO_FILE


pytestmark = pytest.mark.timeout(900)
METHODS = ("step_grpo", "sas")
OF_THE_CLOCK = ("step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two updates on one process."""
    folder = tmp_path_factory.mktemp("runs")
    for method in METHODS:
        train(method, folder, 1, "alone")
    return folder


@pytest.fixture(scope="module", params=["ddp", "fsdp2"])
def how(request, runs):
    """The same on two processes. Also a resumed training."""
    ended = run_two_processes(Path(__file__).with_name("two_ranks.py"), [str(runs), request.param], runs, seconds=540)
    assert [status for status, _ in ended] == [0, 0], ended[0][1][-3000:]
    return request.param


def differences(expected, found):
    """Return the largest difference of the logs, apart from times, and of the parameters."""
    histories = [json.loads((folder / "history.json").read_text()) for folder in (expected, found)]
    logged = [0.0]
    for ours, theirs in zip(*([entry for entry in history if "loss" in entry] for history in histories), strict=True):
        assert ours.keys() == theirs.keys()
        for key in ours.keys() - set(OF_THE_CLOCK):
            assert (ours[key] is None) == (theirs[key] is None), key
            if ours[key] is not None:
                logged.append(abs(ours[key] - theirs[key]) / max(1, abs(ours[key])))
    assert len(logged) > 50
    ours, theirs = (load_file(folder / "weights.safetensors") for folder in (expected, found))
    assert ours.keys() == theirs.keys()
    return max(logged), max((ours[name] - theirs[name]).abs().max().item() for name in ours)


def losses(folder):
    return [entry["loss"] for entry in json.loads((folder / "history.json").read_text()) if "loss" in entry]


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_equal_one(method, runs, how):
    alone, shared = runs / f"{method}-alone", runs / f"{method}-{how}"
    logged, parameters = differences(alone, shared)
    print(f"{method} {how}: logged {logged:.1e}, parameters {parameters:.1e}")
    assert logged < 1e-5 and parameters < 1e-5
    start, moved = testbed.load_model().state_dict(), load_file(shared / "weights.safetensors")
    assert max((moved[name] - value).abs().max().item() for name, value in start.items()) > 1e-3
    assert all(abs(loss) > 1e-3 for loss in losses(shared))


@pytest.mark.parametrize("method", METHODS)
def test_the_model_of_two_processes_is_saved_whole(method, runs, how):
    folder = runs / f"{method}-{how}"
    saved = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").state_dict()
    for name, value in load_file(folder / "weights.safetensors").items():
        assert torch.equal(saved[name], value), name


def test_what_fsdp2_shards(runs, how):
    """Uneven evaluation does not deadlock, servers get whole merged weights, empty references are refused."""
    if how == "fsdp2":
        found = json.loads((runs / "fsdp2.json").read_text())
        assert 0 <= found["evaluated"] <= 1
        assert found["synced"] == 0
        assert found["merged"] < 1e-6 < found["adapter"]
        assert found["refused"].startswith("fsdp_cpu_ram_efficient_loading: ")


def test_the_estimate_is_what_a_process_of_fsdp2_holds(runs, how):
    if how == "fsdp2":
        work = Workload(ModelConfig(dtype="float32"), Layout(2, "fsdp", 3), 32, 1, has_reference=True)
        estimate = estimate_memory(AutoConfig.from_pretrained(testbed.MODEL_DIR), work)
        for part, measured in json.loads((runs / "fsdp2.json").read_text())["held"].items():
            assert estimate.lasting[part] == pytest.approx(measured, rel=0.01), part


@pytest.mark.parametrize("method", [*METHODS, "lapo"])
def test_a_resumed_training_equals_one_in_one_go(method, tmp_path):
    train_and_resume(method, tmp_path)
    assert_resumed(tmp_path, method)
    lengths = [tmp_path / f"lapo-{run}" / LAPO_FILE for run in ("whole", "resumed")]
    assert method != "lapo" or lengths[0].read_text() == lengths[1].read_text() != "{}"


def test_a_resumed_training_on_two_processes(runs, how):
    for method in METHODS if how == "ddp" else METHODS[:1]:
        assert_resumed(runs / how, method)


def assert_resumed(folder, method):
    logged, parameters = differences(folder / f"{method}-whole", folder / f"{method}-resumed")
    print(f"{method} resumed: logged {logged:.1e}, parameters {parameters:.1e}")
    assert logged < 1e-6 and parameters == 0
    assert len(losses(folder / f"{method}-resumed")) == 7
    in_use = (folder / f"{method}-whole/checkpoint-5/rollouts_0.safetensors").is_file()
    assert in_use == (method != "lapo")


def test_rollouts_of_other_processes_are_sampled_anew(tmp_path, caplog):
    accelerator = Accelerator(cpu=True)
    batches = [{"completion_ids": torch.arange(6).view(2, 3), "num_items_in_batch": torch.tensor(6)}]
    save_rollouts(tmp_path, accelerator, 5, batches)
    step, loaded = load_rollouts(tmp_path, accelerator)
    assert step == 5 and loaded[0].keys() == batches[0].keys()
    assert all(torch.equal(loaded[0][name], value) for name, value in batches[0].items())
    assert load_rollouts(tmp_path / "another", accelerator) is None

    file = tmp_path / "rollouts_0.safetensors"
    save_file(load_file(file), file, {"step": "5", "processes": "2"})
    assert load_rollouts(tmp_path, accelerator) is None
    assert "holds rollouts of 2 processes. Now there are 1, so rollouts are sampled anew." in caplog.text

    save_rollouts(tmp_path / "images", accelerator, 5, [batches[0] | {"num_images": [1, 2]}])
    assert load_rollouts(tmp_path / "images", accelerator) is None


def test_rollouts_that_would_wait_for_ever_are_refused():
    check_rollouts_in_process(zero_stage=3, fsdp_version=None, gather_for_generation=True)
    check_rollouts_in_process(zero_stage=0, fsdp_version=2, gather_for_generation=False)
    with pytest.raises(ValueError, match="Set ds3_gather_for_generation=True"):
        check_rollouts_in_process(zero_stage=3, fsdp_version=None, gather_for_generation=False)
    with pytest.raises(ValueError, match="Set fsdp_version: 2 in the accelerate config"):
        check_rollouts_in_process(zero_stage=0, fsdp_version=1, gather_for_generation=True)
