# `make` lists the targets. Everything lives in .venv/; nothing outside the repository is touched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXTRAS := torch,train,series,serve,vision

.PHONY: help demo test npm-clients lint docs budget bench-train bench-inference sanitize test-arm clean
.DEFAULT_GOAL := help

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 18

demo: $(VENV)/.built ## build everything and let the embedded model tell a story
	@$(BIN)/rookery generate --echo --max-tokens 120 --seed 6 --temperature 0.9 --top-p 0.85 \
		--presence-penalty 0.2 --frequency-penalty 0.3 "Once upon a time"

test: $(VENV)/.tested-tools ## everything that CI runs: style, import contracts, documentation, tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	@# without npm, or without a network, the tests of these clients are skipped and say so
	@test -d tests/serve/npm/node_modules || ! command -v npm >/dev/null || timeout 60 $(MAKE) --silent npm-clients || true
	$(BIN)/pytest -n 2

npm-clients: ## clients from npm that the server is tested with
	cd tests/serve/npm && npm ci --ignore-scripts --no-audit --no-fund --silent

lint: $(VENV)/.tested-tools ## fix style and formatting, check import contracts
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/lint-imports

docs: $(VENV)/.tested-tools ## the documentation, built into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

budget: $(VENV)/.tested-tools ## seconds per test folder, import times, longest files
	$(BIN)/python benchmarks/budget.py

bench-train: $(VENV)/.tested-tools ## training tokens/s against a GPT and a loop without kernels; where a step's time goes
	$(BIN)/python benchmarks/train_cpu.py --naive --save
	$(BIN)/python benchmarks/train_profile.py --save
	$(BIN)/python benchmarks/training_page.py

# the native test program, native/tests, built without Python
NATIVE_TESTS := PATH=$(CURDIR)/$(BIN):$$PATH cmake -S . -G Ninja -DROOKERY_NATIVE_TESTS=ON

sanitize: $(VENV)/.built ## C++ kernels, runtimes and readers under the address, undefined and thread sanitizers
	for kind in address,undefined thread; do \
		$(NATIVE_TESTS) -B build/sanitize-$$kind -DCMAKE_BUILD_TYPE= -DROOKERY_SANITIZE=$$kind && \
		$(BIN)/cmake --build build/sanitize-$$kind && build/sanitize-$$kind/native_tests || exit 1; \
	done

test-arm: $(VENV)/.built ## the same tests for 64-bit ARM, in an emulator (Debian: g++-aarch64-linux-gnu, qemu-user)
	$(NATIVE_TESTS) -B build/arm -DCMAKE_BUILD_TYPE=Release -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
		-DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DCMAKE_EXE_LINKER_FLAGS=-static
	$(BIN)/cmake --build build/arm
	qemu-aarch64 -cpu max build/arm/native_tests

# make bench-inference LLAMA_BIN=/path/to/llama.cpp/build/bin BENCH="--rounds 3" compares with others
bench-inference: $(VENV)/.built ## decode, prefill, batches, start, memory; LLAMA_BIN=DIR compares with llama.cpp
	$(BIN)/python benchmarks/inference.py --save $(if $(LLAMA_BIN),--llama-bin $(LLAMA_BIN)) $(BENCH)

clean: ## remove the environment and everything built
	rm -rf $(VENV) build site src/rookery/_native*.so

# the environment with the compiled module, remade when what it is made from changes
NATIVE := CMakeLists.txt $(shell find native -name '*.cpp' -o -name '*.hpp')

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.built: $(BIN)/python pyproject.toml constraints.txt $(NATIVE)
	@command -v $${CXX:-c++} >/dev/null || { echo "no C++ compiler found: install one (Debian: apt-get install g++), or set CXX"; exit 1; }
	$(BIN)/python -m pip install --quiet --constraint constraints.txt scikit-build-core nanobind cmake ninja
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable .
	@touch $@

$(VENV)/.tested-tools: $(VENV)/.built
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable ".[$(EXTRAS)]" \
		pytest pytest-xdist hypothesis ruff import-linter mkdocs-material httpx openai schemathesis \
		"triton; platform_system == 'Linux' and platform_machine == 'x86_64'"
	@touch $@
