"""What the package must not do: run what it reads, or listen to other machines unasked."""

import ast
from dataclasses import fields
from pathlib import Path

import pytest

import step_trl
from step_trl.cli import serve
from step_trl.cli.main import main
from step_trl.cli.recipe import parse
from step_trl.rollout.engines import vllm_process
from step_trl.trainers import METHODS


PICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
# Functions, and the argument without which they run what they read.
LOADERS = {"torch.load": ("weights_only", "True"), "yaml.load": ("Loader", "yaml.SafeLoader")}
RUNNERS = {"eval", "exec", "os.system", "os.popen", "yaml.unsafe_load", "yaml.full_load", "pandas.read_pickle"}


def offences(source):
    """Return a line for each place where a module executes what it reads."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            words = [alias.name for alias in node.names if alias.name.split(".")[0] in PICKLERS]
        elif isinstance(node, ast.ImportFrom):
            words = [node.module] * (node.level == 0 and node.module.split(".")[0] in PICKLERS)
        elif isinstance(node, ast.Dict):
            pairs = [(ast.unparse(key), ast.unparse(value)) for key, value in zip(node.keys, node.values) if key]
            words = [key for key, value in pairs if "trust_remote_code" in key and value == "True"]
        elif isinstance(node, ast.Call):
            words = call_offences(node)
        else:
            continue
        found += [f"{node.lineno}: {word}" for word in words]
    return found


def call_offences(call):
    name = ast.unparse(call.func).replace("pd.", "pandas.")
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    argument, safe = LOADERS.get(name, (None, None))
    words = [name] * (name in RUNNERS or (argument is not None and given.get(argument) != safe))
    return words + [one for one in ("trust_remote_code", "allow_pickle", "shell") if given.get(one) == "True"]


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from cloudpickle import loads",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "yaml.load(text, Loader=yaml.Loader)",
        "pd.read_pickle(path)",
        "np.load(path, allow_pickle=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "options = {'trust_remote_code': True}",
        "subprocess.run(command, shell=True)",
        "eval(text)",
    ],
)
def test_an_offence_is_found(source):
    assert len(offences(source)) == 1


def test_the_package_runs_nothing_that_it_reads():
    assert not offences("torch.load(path, weights_only=True); yaml.safe_load(text); model.eval()")
    folder = Path(step_trl.__file__).parent
    found = {str(path.relative_to(folder)): offences(path.read_text()) for path in folder.rglob("*.py")}
    assert len(found) > 60 and not {name: lines for name, lines in found.items() if lines}


@pytest.mark.parametrize("trainer", METHODS)
def test_remote_code_is_not_trusted_by_default(trainer):
    defaults = {one.name: one.default for one in fields(METHODS[trainer][1])}
    assert defaults["trust_remote_code"] is False
    _, _, config = parse({"trainer": trainer, "dataset": "testbed", "output_dir": "x", "bf16": False}, [])
    assert config.trust_remote_code is False and "trust_remote_code" not in (config.model_init_kwargs or {})


def test_a_server_listens_to_this_machine_only_by_default(monkeypatch):
    asked = []
    monkeypatch.setattr(serve, "serve", lambda *args, **options: asked.append(options) or 0)
    with pytest.raises(SystemExit):
        main(["serve", "m"])
    assert asked[0]["host"] == "127.0.0.1"
    assert vllm_process.VLLMServer("m").url.startswith("http://127.0.0.1:")
    command, _ = vllm_process.server_command("m")
    assert command[command.index("--host") + 1] == "127.0.0.1"
