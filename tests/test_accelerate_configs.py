"""`accelerate launch` reads the accelerate configs, and they do what they say."""

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env


CONFIGS = Path(__file__).parent.parent / "recipes" / "accelerate_configs"
KINDS = {
    "ddp": DistributedType.MULTI_GPU,
    "zero2": DistributedType.DEEPSPEED,
    "zero3": DistributedType.DEEPSPEED,
    "fsdp2": DistributedType.FSDP,
}


def check(path):
    """Load as accelerate does, which refuses unknown keys, but not those within a section."""
    config = load_config_from_file(str(path))
    options = vars(launch_command_parser().parse_args(["script.py"])).keys()
    unknown = (config.deepspeed_config.keys() | config.fsdp_config.keys()) - options
    assert not unknown, unknown
    return config


def launched(path):
    """Options of `accelerate launch` with this config."""
    args = launch_command_parser().parse_args(["--config_file", str(path), "script.py"])
    return _validate_launch_command(args)[0]


def test_there_are_no_others():
    assert {path.stem for path in CONFIGS.iterdir()} == KINDS.keys()


@pytest.mark.parametrize("name", KINDS)
def test_a_config_parses(name):
    path = CONFIGS / f"{name}.yaml"
    config = check(path)
    assert config.distributed_type == KINDS[name]
    assert (config.num_machines, config.num_processes, config.mixed_precision) == (1, 8, "bf16")
    assert f"--config_file recipes/accelerate_configs/{name}.yaml" in path.read_text()
    args = launched(path)
    assert args.num_processes == 8
    assert args.use_deepspeed == name.startswith("zero") and args.use_fsdp == (name == "fsdp2")
    if args.use_deepspeed:
        assert args.zero_stage == int(name[-1])
        assert bool(args.zero3_save_16bit_model) == (name == "zero3")


@pytest.mark.parametrize(
    ("key", "wrong", "error"),
    [
        ("num_processes:", "num_procs:", ValueError),
        ("  fsdp_version:", "  fsdp_versoin:", AssertionError),
    ],
)
def test_an_unknown_key_is_found(key, wrong, error, tmp_path):
    path = tmp_path / "fsdp2.yaml"
    path.write_text((CONFIGS / "fsdp2.yaml").read_text().replace(f"\n{key}", f"\n{wrong}"))
    with pytest.raises(error, match=wrong.strip(" :")):
        check(path)


def test_what_is_launched_is_fsdp2(monkeypatch):
    for name, value in prepare_multi_gpu_env(launched(CONFIGS / "fsdp2.yaml")).items():
        monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert not plugin.activation_checkpointing
    assert plugin.state_dict_type.name == "FULL_STATE_DICT"
