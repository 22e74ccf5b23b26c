# One command each, the same for people and for CI. `make help` lists them.
#
#   make test ARGS="-k stem -x"            pass options on to pytest
#   make test ISA=avx2 TIERS=cpu           only the CPU tier, as on a processor without AVX-512
#   make test PYTHON=/path/to/python       use an interpreter that already has torch; install nothing
#   make test TORCH_INDEX=https://download.pytorch.org/whl/cpu    torch, and only torch, from this index

VENV     ?= .venv
VERSIONS ?= 4.57.6 5.0.0 5.23.0
EXTRAS   := dev
# Installed where torch brings no Triton of its own: beside a CPU wheel, on Linux.
TRITON   := triton==3.6.0
STAMP    := $(VENV)/.installed
NATIVE   := $(VENV)/.native

ifneq ($(strip $(PYTHON)),)
PY    := $(PYTHON)
READY := check-python
else
PY    := $(VENV)/bin/python
READY := $(STAMP) $(NATIVE)
PEERS := build/peers/.asked
endif

# A development checkout works from its sources, installed or not.
RUN := PYTHONPATH="$(CURDIR):$(CURDIR)/python$(if $(PYTHONPATH),:$(PYTHONPATH))" "$(PY)"

.DEFAULT_GOAL := help
.PHONY: help venv native table3 ablation bench bench-compare report gpu rehearse test mutants fuzz test-sanitize test-transformers lint format wheel clean check-python

help: ## list these targets
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/  make \1	\2/p' Makefile | expand -t 26

venv: $(READY) ## make .venv and install the pinned versions

native: $(READY) ## compile csrc/ for the interpreter in use; make does it by itself in .venv
	$(RUN) setup.py build_ext --inplace

rehearse: $(READY) ## every step of `make gpu` on a GPU that isn't there, down to the kernels' launches
	$(RUN) -m bench gpu --rehearse $(ARGS)

table3: $(READY) ## the paper's Table 3 beside ours; ARGS="--help" shows its options
	$(RUN) -m bench table3 $(ARGS)

ablation: $(READY) ## the paper's Tables 2 and 4 in small, on phantoms, within an hour; ARGS="--quick" in five minutes
	$(RUN) -m bench ablation $(ARGS)

bench: $(READY) ## every op beside its peers on the CPU, in at most 10 minutes, to out/; ARGS="--help" shows its options
	$(RUN) -m bench ops --device cpu --minutes 9 $(ARGS)

bench-compare: $(READY) ## this tree against BASE=<rev>, measured together; fails above 10 %
	@[ -n "$(BASE)" ] || { echo "BASE= must be a revision, got nothing; e.g. make bench-compare BASE=main" >&2; exit 1; }
	$(RUN) -m bench compare "$(BASE)" $(ARGS)

report: $(READY) ## Markdown, pictures and an HTML page from bench/results; ARGS="--results out": from your own runs
	$(RUN) -m bench report $(ARGS)

# PYTHON defaults to python3 and nothing is installed: the machine brings its torch.
gpu: ## on a machine with a CUDA GPU: check, measure, tune, test, 9 minutes at a time, to out/ or OUT=dir; again: goes on; STEP=one
	PYTHONPATH="$(CURDIR):$(CURDIR)/python$(if $(PYTHONPATH),:$(PYTHONPATH))" \
	  "$(or $(strip $(PYTHON)),python3)" -m bench gpu $(if $(OUT),--out "$(OUT)") $(if $(STEP),--only "$(STEP)") $(ARGS)

test: $(READY) $(PEERS) ## every test this machine can run; ARGS go to pytest; ISA=avx2|plain TIERS=cpu WORKERS=n
	$(RUN) tests/tiers.py $(if $(TIERS),--tiers $(TIERS)) $(if $(ISA),--isa $(ISA)) $(if $(WORKERS),--workers $(WORKERS)) -- $(ARGS)

mutants: $(READY) ## seed faults into a copy, one at a time: each must fail a test; ARGS="--help" shows its options
	$(RUN) tests/mutants.py $(ARGS)

fuzz: $(READY) ## random calls of every op by every backend against its reference; ARGS="--seed 123 --op stem"
	$(RUN) -m tests.fuzz $(ARGS)

test-sanitize: $(READY) ## csrc/ under ASan and UBSan, in a copy of the tree, new memory full of NaN; needs GCC's sanitizers
	$(RUN) -m tests.sanitize $(ARGS)

test-transformers: $(READY) ## tests/hia against each of VERSIONS="4.57.6 5.0.0 ..."
	@failed=; for version in $(VERSIONS); do \
	  target="$(CURDIR)/build/transformers-$$version"; \
	  "$(PY)" tests/install_transformers.py "$$version" "$$target" && \
	  PYTHONPATH="$$target:$(CURDIR):$(CURDIR)/python" "$(PY)" -m pytest $(if $(filter tests/%,$(ARGS)),,tests/hia) $(ARGS) \
	  && echo "transformers $$version: passed" \
	  || { echo "transformers $$version: FAILED"; failed="$$failed $$version"; }; \
	done; \
	if [ -n "$$failed" ]; then echo "failed with transformers:$$failed"; exit 1; fi

lint: $(READY) ## ruff, import-linter, mypy and the house rules
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -c "from importlinter import cli; cli.lint_imports_command()" --no-cache --no-logo
	$(RUN) -m mypy
	$(RUN) -m pytest -q tests/test_repository.py

format: $(READY) ## rewrite the sources as `make lint` wants them
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

# Both wheels are built from the source distribution: build/ in the checkout may hold modules that are gone.
wheel: $(READY) ## dist/: the source distribution, a wheel of Python alone, and one with the native kernels for this platform
	rm -rf dist
	$(RUN) -m build --no-isolation --outdir dist .
	HIA_BUILD_NATIVE=1 $(RUN) -m pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir dist dist/*.tar.gz

clean: ## remove caches and build outputs; .venv stays
	rm -rf build dist hia_kernels/_native*.so "$(NATIVE)" *.egg-info python/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -not -path "./$(VENV)/*" -type d -prune -exec rm -rf {} +

check-python:
	@"$(PY)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "PYTHON=$(PY) must be Python 3.10 or newer, got: $$("$(PY)" --version 2>&1)" >&2; exit 1; }
	@"$(PY)" -c 'import torch' || { echo "PYTHON=$(PY) must have torch; without PYTHON=, make installs it in $(VENV)" >&2; exit 1; }

$(STAMP): pyproject.toml constraints.txt setup.py
	@base=; for python in python3 python3.13 python3.12 python3.11 python3.10; do \
	  if "$$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then \
	    base=$$python; break; \
	  fi; \
	done; \
	if [ -z "$$base" ]; then \
	  echo "Python 3.10 to 3.13 is needed, got: $$(python3 --version 2>&1); install one, or pass PYTHON=/path/to/python" >&2; exit 1; \
	fi; \
	if ! "$(VENV)/bin/python" -m pip --version >/dev/null 2>&1; then \
	  echo "making $(VENV) with $$("$$base" --version)"; \
	  "$$base" -m venv "$(VENV)" || { \
	    echo "$$base cannot make a virtual environment: its venv or ensurepip module is missing (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }; \
	fi
	$(if $(TORCH_INDEX),"$(VENV)/bin/python" -m pip install --no-deps --index-url "$(TORCH_INDEX)" -c constraints.txt torch)
	"$(VENV)/bin/python" -m pip install --progress-bar off -c constraints.txt -e ".[$(EXTRAS)]"
	@if [ "$$(uname -s)" = Linux ] && ! "$(VENV)/bin/python" -c 'import triton' 2>/dev/null; then \
	  "$(VENV)/bin/python" -m pip install --progress-bar off --no-deps "$(TRITON)" || echo "note: no $(TRITON) for this machine; its tests will be skipped"; \
	fi
	@touch "$@"

# Signatures that tests hold our calls against; without them those tests are skipped.
$(PEERS): tests/install_peers.py $(STAMP)
	@mkdir -p $(@D); "$(VENV)/bin/python" tests/install_peers.py $(@D) || \
	  echo "note: flash-attn 4 and xformers were not downloaded; what is tested against their signatures is skipped"
	@touch "$@"

# The package works without its native kernels, so a machine without a compiler gets a note. What was built before goes
# first: a build that fails must not leave other sources' kernels behind.
$(NATIVE): $(STAMP) setup.py $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu')
	@echo "compiling csrc/"; rm -f hia_kernels/_native*.so; log=$$(mktemp); \
	if "$(VENV)/bin/python" setup.py build_ext --inplace >"$$log" 2>&1; then \
	  rm -f "$$log"; \
	else \
	  tail -n 5 "$$log"; echo "note: csrc/ was not compiled (whole output: $$log); the native CPU kernels are left out"; \
	fi
	@touch "$@"
