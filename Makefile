# Every target works on a fresh clone with nothing but Python (3.11 or newer), make and a package registry.
# The first one that runs makes .venv; the next ones find it.

ifeq ($(OS),Windows_NT)
PYTHON ?= python
BIN := .venv/Scripts
else
PYTHON ?= python3
BIN := .venv/bin
endif

STAMP := .venv/.installed
TEST_WORKERS ?= 2
# Two test processes of one computing thread each: more threads than cores make small matrices many times slower.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist=loadfile $(ARGS)

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test test-all test-quantised test-zero check format lock bench clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv with the locked packages, this project and the default model

$(STAMP): requirements.lock pyproject.toml scripts/setup_env.py
	@$(PYTHON) scripts/setup_env.py
	@touch $@

quickstart: $(STAMP) ## fine-tune the default model in minutes, and see its answers before and after
	@$(BIN)/python scripts/quickstart.py

test: $(STAMP) ## run the quick tests (ARGS="-k word" picks some)
	$(PYTEST) -m "not long"

test-all: $(STAMP) ## run all tests; those that need a GPU say so and skip where there is none
	$(PYTEST)

test-quantised: $(STAMP) ## run the tests that need bitsandbytes, and leave it installed only meanwhile: peft imports it in every process
	@$(BIN)/python -m uv pip install --quiet "bitsandbytes>=0.48"
	$(PYTEST) tests/train/test_quantised_reference.py tests/model/test_bitsandbytes_cpu.py tests/e2e/test_examples.py \
	  -k "quantised or bitsandbytes or 4bit"; \
	  code=$$?; $(BIN)/python -m uv pip uninstall --quiet bitsandbytes; exit $$code

test-zero: build/deepspeed ## compare runs with `deepspeed` against DeepSpeed itself; it stays in build/, where only these tests find it
	$(PYTEST) tests/faults/test_zero.py

build/deepspeed: $(STAMP)
	@$(BIN)/python -m uv pip install --quiet --target $@ --no-deps --no-build-isolation \
	  "deepspeed>=0.18,<0.20" hjson py-cpuinfo msgpack einops ninja
	@touch $@

check: $(STAMP) ## lint, format, types and import directions; changes nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

format: $(STAMP) ## mend what ruff can mend by itself
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock: $(STAMP) ## renew requirements.lock after a change of pyproject.toml (ARGS=--upgrade for newer versions)
	@grep '^#' requirements.lock > requirements.lock.new
	$(BIN)/python -m uv pip compile --quiet --universal --extra dev --no-header --no-annotate \
	  --output-file requirements.lock pyproject.toml $(ARGS)
	@grep -Ev '^(nvidia-|cuda-|triton)' requirements.lock >> requirements.lock.new
	@mv requirements.lock.new requirements.lock

bench: $(STAMP) ## run every script in benchmarks/
	@if ls benchmarks/*.py >/dev/null 2>&1; then \
	  for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python "$$script" || exit 1; done; \
	else echo "There is no benchmark in benchmarks/ yet."; fi

clean: ## remove .venv and all caches inside this folder; trained models and data stay
	rm -rf .venv build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache src/*.egg-info
	find src tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +
