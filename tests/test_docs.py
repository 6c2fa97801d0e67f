"""
The documentation builds without a warning and loads nothing from the network, and every code block in it is tested.

Python blocks run on the testbed, see `on_the_testbed`; what `CONTRIBUTING.md` says of them is what is done here.
"""

from __future__ import annotations

import ast
import contextlib
import doctest
import importlib
import inspect
import io
import itertools
import os
import pkgutil
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from browser import browse
from small_runs import SMALL_RUN, TESTBED_RUN, flags
from study.claims import CHOICES
from sybil import Document, Region
from sybil.parsers.markdown.lexers import FencedCodeBlockLexer

import step_trl
from step_trl import testbed
from step_trl.cli.dry_run.batches import Batches


ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
LANGUAGES = ("python", "bash", "yaml", "text")
NOT_RUN = re.compile(r"<!-- not run: [^>]+ -->\n$")
PUBLIC = (
    "",
    ".rewards",
    ".rollout",
    ".endpoint",
    ".evaluation",
    ".monitor",
    ".report",
    ".advantages",
    ".losses",
    ".preferences",
    ".steps",
    ".data",
    ".token_targets",
    ".testbed",
)
# What a page shows of a trained model, and the names of models on the Hub: the testbed model.
MODEL_FOLDERS = ("runs/step-grpo", "runs/first")
HUB_MODEL = re.compile(r"\bQwen/Qwen3-[\w.]+")
SHORT = 40  # tokens of a completion
ROOM_FOR_PROMPTS = 1024


class Command(NamedTuple):
    """The words of a command, and how many processes a launcher starts."""

    words: list[str]
    processes: int = 1


class Block:
    """A fenced block of a page."""

    def __init__(self, document: Document, region: Region):
        self.language, self.source = region.lexemes["language"], region.lexemes["source"]
        self.path, self.start, self.end = document.path, region.start, region.end
        self.before = document.text[: region.start]
        self.line = self.before.count("\n") + 1
        self.is_run = NOT_RUN.search(self.before) is None

    def is_output_of(self, other: Block | None) -> bool:
        """Whether this is what the block before it prints: nothing but blank lines is between them."""
        behind = other is not None and not self.before[other.end :].strip()
        return behind and self.language == "text" and other.language == "python"


def blocks(path: Path) -> list[Block]:
    lexer = FencedCodeBlockLexer(r".*", mapping={"language": "language", "source": "source"})
    document = Document.parse(str(path))
    return [Block(document, region) for region in sorted(lexer(document), key=lambda region: region.start)]


def pages_with(*languages: str) -> pytest.MarkDecorator:
    paths = [path for path in PAGES if any(block.language in languages for block in blocks(path))]
    return pytest.mark.parametrize("path", paths, ids=lambda path: str(path.relative_to(ROOT)))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site."""
    folder = tmp_path_factory.mktemp("docs") / "site"
    run = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0 and "WARNING" not in run.stderr, run.stderr
    return folder


def test_the_site_builds_without_a_warning(site):
    assert (site / "index.html").is_file() and not (site / "_extensions").exists()


class Loaded(HTMLParser):
    """Addresses that a browser loads by itself when it shows a page."""

    def __init__(self):
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        if tag == "link" and attributes.get("rel") not in ("canonical", "next", "prev"):
            self.addresses.append(attributes.get("href", ""))
        elif tag != "a":
            self.addresses += [attributes[name] for name in ("src", "srcset", "data") if name in attributes]


def test_nothing_is_loaded_from_the_network(site):
    for page in site.rglob("*.html"):
        loaded = Loaded()
        loaded.feed(page.read_text())
        assert len(loaded.addresses) > 3
        remote = [address for address in loaded.addresses if re.match(r"(\w+:)?//", address)]
        assert remote == [], page
    for style in site.rglob("*.css"):
        assert not re.search(r"(@import\s|url\(\s*)['\"]?(\w+:)?//", style.read_text()), style


def test_search_works_in_pages_from_the_disk(site, tmp_path):
    """In the browser: the word is looked for in the index, and its pages are listed."""
    address = f"{(site / 'index.html').as_uri()}?q=alternatively"
    page = browse(address, tmp_path / "profile", "--virtual-time-budget=10000", "--dump-dom")
    found = re.search(r"(\d+) matching documents", page)
    assert found and int(found[1]) >= 3
    assert re.search(r'<a href="[^"]*how-to/callback.html" class="md-search-result__link"', page)


def test_notebooks_and_measurements_are_pages(site):
    for path in [*(ROOT / "notebooks").glob("*.ipynb"), *(ROOT / "benchmarks").rglob("README.md")]:
        uri = path.relative_to(ROOT).with_suffix(".html").as_posix().replace("README", "index")
        page = (site / uri).read_text()
        assert f'href="{Path(uri).name}"' in page or "md-nav__link--active" in page
        pictures = re.findall(r'<img[^>]* src="([^"]+)"', page)
        assert all((site / uri).parent.joinpath(picture).is_file() for picture in pictures), pictures
        assert "<code>&lt;table" not in page and "![" not in re.sub("<code.*?</code>", "", page, flags=re.DOTALL)
    assert len(pictures) == 5  # of the study, which comes last


def test_references_in_docstrings_are_links(site):
    """A reference that the extension does not know would be shown with its brackets."""
    for page in (site / "api").glob("*.html"):
        text = re.sub(r"<pre.*?</pre>", "", page.read_text(), flags=re.DOTALL)
        assert "[<code>" not in text and "Args:" not in text, page
    assert 'href="rollout.html#step_trl.rollout.ConfidenceTruncation"' in (site / "api/trainers.html").read_text()


def test_public_names_are_documented():
    pages = "".join(path.read_text() for path in (ROOT / "docs/api").glob("*.md"))
    documented = re.findall(r"^::: (\S+)$", pages, re.MULTILINE)
    for name in PUBLIC:
        module = importlib.import_module(f"step_trl{name}")
        for public in getattr(module, "__all__", []):
            one = getattr(module, public)
            if inspect.isclass(one) or inspect.isfunction(one):
                # By its module's path where a module has its name.
                assert {f"step_trl{name}.{public}", f"{one.__module__}.{one.__name__}"} & set(documented), public


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_page_names_exists(path):
    text = path.read_text()
    for block in blocks(path):
        assert block.language in LANGUAGES, f"{path}, line {block.line}: nothing tests {block.language!r}"
    for name in re.findall(r"[`\s(](step_trl(?:\.\w+)+)(?=[`\s(.,)])", text):
        pkgutil.resolve_name(name.removesuffix(".py"))
    for file, test in re.findall(r"(tests/[\w/]+\.py)::(\w+)", text):
        names = [node.name for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, ast.FunctionDef)]
        assert test in names, f"{file} has no {test}"
    for file in re.findall(r"`((?:recipes|benchmarks|tests|notebooks|docs|step_trl)/[\w/.-]*)`", text):
        assert (ROOT / file).exists(), file


def short_rows(monkeypatch):
    """Replace data sets on the Hub by some rows of the testbed, with the columns of all layouts."""
    import datasets

    load = datasets.load_dataset
    columns = [
        {
            "prompt": row["prompt"],
            "solution": row["solution"],
            "problem": text,
            "question": text,
            "answer": row["solution"],
        }
        for row in testbed.load_dataset("easy").select(range(4))
        for text in [row["prompt"][-1]["content"]]
    ]

    def load_dataset(path, *args, **kwargs):
        on_the_hub = re.fullmatch(r"[\w-]+/[\w.-]+", str(path)) and not Path(path).exists()
        return datasets.Dataset.from_list(columns) if on_the_hub else load(path, *args, **kwargs)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


@pytest.fixture
def on_the_testbed(monkeypatch, tmp_path):
    """Blocks run in an empty folder, for one update, with short completions, on a CPU, and log to nowhere."""
    from step_trl.rollout import DynamicTruncatedRollout, SamplingParams
    from step_trl.trainers import EfficientReasoningConfig

    monkeypatch.chdir(tmp_path)
    for folder in MODEL_FOLDERS:
        shutil.copytree(testbed.MODEL_DIR, folder)
    short_rows(monkeypatch)
    fill_in, prepare = EfficientReasoningConfig.__post_init__, DynamicTruncatedRollout.__init__
    signature = inspect.signature(prepare)

    def filled_in(self):
        for name, value in SMALL_RUN.items():
            setattr(self, name, value)
        self.max_completion_length = min(self.max_completion_length, SHORT)
        fill_in(self)

    def prepared(self, *args, **kwargs):
        given = signature.bind(self, *args, **kwargs)
        given.apply_defaults()
        sampling = given.arguments["sampling"]
        given.arguments["sampling"] = SamplingParams(
            **vars(sampling) | {"max_tokens": min(sampling.max_tokens, SHORT)}
        )
        prepare(*given.args, **given.kwargs)

    monkeypatch.setattr(EfficientReasoningConfig, "__post_init__", filled_in)
    monkeypatch.setattr(DynamicTruncatedRollout, "__init__", prepared)


def run(block: Block, namespace: dict) -> str:
    """Run a block as part of its page. Returns what it prints."""
    source = HUB_MODEL.sub(str(testbed.MODEL_DIR), block.source)
    printed = io.StringIO()
    code = compile("\n" * block.line + source, block.path, "exec", dont_inherit=True)
    with contextlib.redirect_stdout(printed):
        exec(code, namespace)
    return printed.getvalue()


def check_names(source: str) -> None:
    """Check that imports from the package work, and that the imported objects accept the given keywords."""
    tree, known = ast.parse(source), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in ("step_trl", "transformers"):
            module = importlib.import_module(node.module)
            known |= {alias.asname or alias.name: getattr(module, alias.name) for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in known:
            inspect.signature(known[node.func.id]).bind_partial(**{one.arg: None for one in node.keywords if one.arg})


@pages_with("python")
def test_python_blocks(path, on_the_testbed):
    namespace: dict = {}
    last, printed = None, ""
    for block in blocks(path):
        if block.is_output_of(last):
            assert printed.strip() == block.source.strip(), f"{path}, line {block.line}"
        if block.language == "python":
            check_names(block.source)
            printed = run(block, namespace) if block.is_run else ""
        last = block


def docstring_examples():
    """Examples in docstrings of the package: the API pages show them."""
    for path in sorted(Path(step_trl.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                for example in re.findall(r"```python\n(.*?)```", ast.get_docstring(node) or "", re.DOTALL):
                    yield pytest.param(example, id=node.name)


@pytest.mark.parametrize("example", docstring_examples())
def test_docstring_examples(example, on_the_testbed):
    if "LLM(" in example or "VLLMServer(" in example:  # vLLM itself: `tests/trainers/test_colocated.py`, `conftest.py`
        ast.parse("".join(text.source for text in doctest.DocTestParser().get_examples(example)))
        return
    if ">>>" not in example:
        exec(compile(example, "<docstring>", "exec"), vars(importlib.import_module("step_trl.rollout")).copy())
        return
    names: dict = {}
    for module in (
        "advantages",
        "data",
        "monitor.workspace",
        "preferences.pairs",
        "preferences.verifier",
        "report",
        "rewards",
        "rollout",
        "rollout.engines",
        "steps",
        "token_targets",
    ):
        names |= vars(importlib.import_module(f"step_trl.{module}"))
    model, tokenizer = testbed.load_model(), testbed.load_tokenizer()
    prompt_ids = tokenizer.encode("What is 2 + 3?")
    rollout = names["DynamicTruncatedRollout"](names["TransformersEngine"](model, tokenizer)).run([prompt_ids])[0]
    names |= {"model": model, "tokenizer": tokenizer, "prompt_ids": prompt_ids, "rollout": rollout}
    for one in doctest.DocTestParser().get_examples(example):
        if one.want:
            assert repr(eval(one.source, names)) == one.want.strip()
        else:
            exec(one.source, names)


@cache
def messages() -> list[re.Pattern[str]]:
    """Return the messages in the package's code and in the parent configurations, as patterns with any variables."""
    import transformers
    import trl

    files = [*Path(step_trl.__file__).parent.rglob("*.py")]
    files += [
        Path(trl.__file__).parent / "trainer/grpo_config.py",
        Path(transformers.__file__).parent / "training_args.py",
    ]
    return [pattern for file in files for node in ast.walk(ast.parse(file.read_text())) for pattern in patterns(node)]


def patterns(node: ast.AST) -> Iterator[re.Pattern[str]]:
    """Yield the patterns of a text, with variables or additions, if they are long enough for a message."""
    parts = [node]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        parts = [node.left, node.right]
    parts = [piece for part in parts for piece in (part.values if isinstance(part, ast.JoinedStr) else [part])]
    texts = [part.value if isinstance(part, ast.Constant) and isinstance(part.value, str) else None for part in parts]
    if sum(len(text) for text in texts if text is not None) > 20:
        yield re.compile("".join(".+" if text is None else re.escape(text) for text in texts))


@pages_with("text")
def test_messages_are_those_of_the_code(path):
    known, last = messages(), None
    for block in blocks(path):
        if block.language == "text" and not block.is_output_of(last):
            text = block.source.strip()
            assert any(pattern.fullmatch(text) for pattern in known), f"{path}, line {block.line}: {text}"
        last = block


def commands(text: str) -> Iterator[Command]:
    """Return the commands of shell lines, without comments."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        variables = list(itertools.takewhile(lambda word: re.match(r"\w+=", word), words))
        if words := words[len(variables) :]:
            yield launched(words, dict(variable.split("=", 1) for variable in variables))


def launched(words: list[str], variables: dict[str, str]) -> Command:
    """Return what accelerate starts, by its own parser, if it is one of our commands."""
    if words[:2] != ["accelerate", "launch"]:
        return Command(words)
    launch, *_ = _validate_launch_command(launch_command_parser().parse_args(words[2:]))
    assert launch.config_file is None or (ROOT / launch.config_file).is_file(), words
    assert launch.module, words
    if gpus := variables.get("CUDA_VISIBLE_DEVICES"):
        assert launch.num_processes == len(gpus.split(",")), words
    program = ["step-trl"] if launch.training_script == "step_trl" else ["python", "-m", launch.training_script]
    return Command([*program, *launch.training_script_args], launch.num_processes or 1)


def batch_job(script: Path, folder: Path) -> list[Command]:
    """Return the commands that a Slurm script starts on its nodes: bash runs it with an `srun` that records them."""
    commands, nodes = folder / "commands", 'printf "node-%s\\n" 1 2'
    note = f'line=$(printf "%q " "$@"); echo "$line" >> {commands}'
    # The training ends the server, which may not have come to write its line yet.
    wait = f'[[ $line != *accelerate* ]] || until [ "$(wc -l < {commands})" -ge 2 ]; do sleep 0.1; done'
    for name, text in {"srun": f"{note}\n{wait}", "scontrol": nodes}.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "node-[1-2]"}
    environment |= {"SLURM_JOB_NAME": "job", "SLURM_JOB_ID": "1"}
    subprocess.run(["bash", str(script)], env=environment, check=True, timeout=60)
    lines = [shlex.split(line) for line in commands.read_text().splitlines()]
    return [launched(list(itertools.dropwhile(lambda word: word.startswith("--"), words)), {}) for words in lines]


@pytest.fixture
def parsed_only(monkeypatch):
    """`step-trl`, a recipe and vLLM read their arguments, and nothing is done. Returns what was seen."""
    from step_trl.cli import demo, evaluate, recipe, report, serve, train
    from step_trl.cli.dry_run import plan
    from step_trl.rollout.engines import vllm_process

    seen = SimpleNamespace(processes=1, contexts=[], completions=[])

    def read(arguments):
        fields, stages, rest = recipe.read_recipe(arguments)
        options = TESTBED_RUN.keys() & {"bf16", "use_cpu"}
        for stage in stages:
            stage_fields = fields | stage
            recipe.parse(stage_fields, [*rest, *flags({name: TESTBED_RUN[name] for name in options})])
            trainer = recipe.trainer_name(stage_fields, rest)
            if trainer in recipe.METHODS:
                values, _ = recipe.parse_values(trainer, stage_fields, rest)
                Batches.of(values, seen.processes)
                if values.use_vllm and values.vllm_mode == "server":
                    seen.completions.append((values.model_name_or_path, values.max_completion_length))

    def read_server(model, host, port, max_model_len, extra_arguments, dry_run, urls, **exits):
        from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        command, _ = vllm_process.server_command(
            model, host=host, port=port, max_model_len=max_model_len, extra_arguments=extra_arguments
        )
        arguments = make_arg_parser(FlexibleArgumentParser()).parse_args(command[3:])
        validate_parsed_serve_args(arguments)
        seen.contexts.append((model, arguments.max_model_len))
        return 0

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(train, "run_train", read)
    monkeypatch.setattr(plan, "print_plan", lambda arguments, **layout: read(arguments))
    for module, name in (
        (report, "run_report"),
        (demo, "run_demo"),
        (evaluate, "run_eval"),
    ):
        monkeypatch.setattr(module, name, lambda *args, **kwargs: 0)
    monkeypatch.setattr(serve, "serve", read_server)
    return seen


def check_command(command: Command, seen: SimpleNamespace, folder: Path) -> None:
    from step_trl.cli.main import main

    words, seen.processes = command.words, command.processes
    program, arguments = words[0], words[1:]
    if program == "step-trl":
        try:
            main(arguments)
        except SystemExit as end:  # the server's status, or what `--help` ends with
            assert not end.code, words
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert all(word in targets for word in arguments if "=" not in word), words
        arguments = [part for word in arguments if "=" in word for part in word.split("=")[1].split()]
    elif program == "pip":
        # Nothing is on PyPI: the package is installed from a clone.
        assert arguments[:2] == ["install", "-e"] and len(arguments) == 3, words
        extras = re.findall(r"^([\w-]+) =$", (ROOT / "setup.cfg").read_text(), re.MULTILINE)
        assert set(re.fullmatch(r"\.\[([\w,]+)\]", arguments[2])[1].split(",")) <= set(extras), words
    elif program == "sbatch":
        job = batch_job(ROOT / arguments[0], folder)
        assert len(job) == 2
        for started in job:
            check_command(started, seen, folder)
    else:
        assert program == "python", f"nothing tests {program}"
        script = ROOT / arguments[0]
        script = (script / "__main__.py" if script.is_dir() else script).read_text()
        assert all(f'"{word}"' in script for word in arguments if word.startswith("--")), words
    for word in arguments:
        if re.match(r"(recipes|benchmarks|tests|notebooks|docs)/", word):
            assert (ROOT / word).exists(), word


@pages_with("bash")
def test_bash_blocks(path, parsed_only, capsys, tmp_path):
    for block in blocks(path):
        if block.language == "bash":
            for command in commands(block.source):
                check_command(command, parsed_only, tmp_path)
    # A page's server of a model takes the completions of its trainings, and leaves room for their prompts.
    for (served, context), (trained, completion) in itertools.product(parsed_only.contexts, parsed_only.completions):
        assert served != trained or context >= completion + ROOM_FOR_PROMPTS


@pages_with("yaml")
def test_yaml_blocks(path, tmp_path):
    """Recipes, as files among those of the package."""
    from step_trl.cli.recipe import load_recipe, parse

    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    recipe = tmp_path / "recipes" / "block.yaml"
    for block in blocks(path):
        if block.language == "yaml":
            recipe.write_text(block.source)
            fields = load_recipe(recipe)
            parse(fields, [] if "bf16: false" in block.source else ["--bf16", "false", "--use_cpu"])


def test_every_metric_is_explained(tmp_path):
    """Those of a training with all that the package logs; TRL's on vLLM servers are in the page, too."""
    from step_trl import StepGRPOConfig, StepGRPOTrainer

    trainer = StepGRPOTrainer(
        testbed.load_model(),
        args=StepGRPOConfig(
            str(tmp_path),
            **SMALL_RUN,
            advantage_selection={"selection_ratio": 0.3},
            length_reward="kimi",
            beta=0.01,
            max_completion_length=SHORT,
        ),
        train_dataset=testbed.load_dataset("train"),
        processing_class=testbed.load_tokenizer(),
    )
    trainer.train()
    logged = {name for entry in trainer.state.log_history for name in entry} - {"step"}
    explained = set(re.findall(r"`([^`\s]+)`", (ROOT / "docs/metrics.md").read_text()))
    patterns = [re.escape(name).replace("NAME", r"\w+").replace("A\\-B", r"[\d.]+-[\d.]+") for name in explained]
    assert len(logged) > 40
    assert [name for name in sorted(logged) if not any(re.fullmatch(one, name) for one in patterns)] == []


def test_figures_of_performance_were_measured():
    """Each figure is in `benchmarks/README.md`."""
    measured = set(re.findall(r"\d[\d,.]*\d|\d", (ROOT / "benchmarks/README.md").read_text()))
    for line in (ROOT / "docs/performance.md").read_text().splitlines():
        figures = re.findall(r"(?<![#\w/`-])\d[\d,]*\.\d+|\d+,\d{3}", line)
        assert set(figures) <= measured, line


def test_differences_of_choices_are_the_study_s():
    """Those of `docs/options.md`, each in the line of its arm."""
    page = (ROOT / "benchmarks/study/README.md").read_text()
    choices = page[page.index("## Choices") : page.index("## Step-GRPO, table 1")]
    section = (ROOT / "docs/options.md").read_text().partition("## Why these defaults")[2]
    paragraphs = [" ".join(part.splitlines()) for part in re.split(r"\n\n|\n(?=\|)", section)]
    figures = {paragraph: re.findall(r"[+-]\d+\.\d", paragraph) for paragraph in paragraphs}
    assert sum(map(bool, figures.values())) == len(CHOICES)
    for paragraph, numbers in figures.items():
        if numbers:
            arm = next(arm for _, arm, _ in CHOICES if f"`{arm}`" in paragraph)
            line = next(line for line in choices.splitlines() if f"`{arm}` against" in line)
            assert set(numbers) <= set(re.findall(r"[+-]\d+\.\d", line)), paragraph
