# Two commands do everything:  make launch   and   make test
# Each makes the environment first, once.  `make help` lists the rest.

SHELL := /bin/bash
.DEFAULT_GOAL := help

PYTHON ?= python3
# Profiles other than `local` compute on GPUs where NVIDIA's driver lists one; DEVICE=cpu or DEVICE=gpu decides otherwise.
ifeq ($(strip $(DEVICE)),)
override DEVICE := $(if $(filter-out local,$(CLUSTER))$(filter gpu,$(SCALE)),$(if $(filter GPU,$(shell nvidia-smi -L 2>/dev/null)),gpu,cpu),cpu)
endif
$(if $(filter-out cpu gpu,$(DEVICE)),$(error DEVICE=$(DEVICE): write cpu or gpu))
VENV ?= $(if $(filter gpu,$(DEVICE)),.venv-gpu,.venv)
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu

CLUSTER ?=
DATA ?=
MODEL ?=
ALGORITHM ?=
NAME ?=
STEPS ?=
ARGS ?=
OUT ?=
ifeq ($(origin NAME),environment)
ifeq ($(NAME),$(shell uname -n))
NAME =# of the machine, which WSL puts there
endif
endif

KNOWN := CLUSTER DATA MODEL ALGORITHM NAME STEPS ARGS OUT DRY_RUN RESUME OVERWRITE GOLDEN SCALE DEVICE VENV PYTHON \
	TORCH_CPU_INDEX SHELL
UNKNOWN := $(filter-out $(KNOWN),$(foreach name,$(.VARIABLES),$(if $(filter command,$(origin $(name))),$(name))))
ifneq ($(UNKNOWN),)
$(error unknown: $(UNKNOWN). Variables are $(KNOWN); keys of the configuration go into ARGS="section.key=value")
endif
NO := 0 no No NO n false False FALSE off Off OFF
YES := 1 yes Yes YES y true True TRUE on On ON
$(foreach flag,DRY_RUN OVERWRITE,$(if $(filter-out $(YES) $(NO),$($(flag))),\
  $(error $(flag)=$($(flag)): write 1 for yes, 0 for no)))
$(if $(filter-out $(YES) $(NO) auto,$(RESUME)),\
  $(error RESUME=$(RESUME): write 1 for yes, 0 for no, auto for yes where there is a run of that name))

RUN := $(VENV)/bin/python
READY := $(VENV)/.ready-$(DEVICE)
# Modules are compiled where they are first imported: most never are, and pip would take minutes for all.
PIP := $(RUN) -m pip install -q --no-deps --no-compile
# Also where the environment, as that of many containers, forbids it: each process would compile all that it imports.
export PYTHONDONTWRITEBYTECODE :=
ENV := DS_ACCELERATOR=$(if $(filter gpu,$(DEVICE)),cuda,cpu)

.PHONY: help setup launch test test-gpu .test-gpu lint format bench bench-rollout bench-learner bench-step bench-rewards \
	parity sasrec clean

help:  ## list the commands
	@awk -F ':.*## ' '/^[a-z][a-z -]*:.*## / {n = split($$1, names, " "); \
	  for (i = 1; i <= n; i++) printf "%-16s%s\n", names[i], $$2}' $(MAKEFILE_LIST)

setup: $(READY)  ## make the environment (the other commands do it by themselves)

$(VENV)/bin/python:
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found; install Python 3.11+ or set PYTHON="; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than 3.11; set PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	  { rm -f $@; echo "error: there is no environment in $(VENV); on Debian venv needs the package python3-venv"; exit 1; }

# torch's CPU wheel comes from pip's configured sources where they have it, else from PyTorch's CPU index.
$(VENV)/.ready-cpu: requirements-cpu.lock pyproject.toml | $(VENV)/bin/python
	@echo "environment: installing $$(grep -c == requirements-cpu.lock) pinned packages (about 4 GB, a few minutes)"
	@torch=$$(grep '^torch==' requirements-cpu.lock); \
	  $(PIP) "$$torch" 2>/dev/null || \
	  $(PIP) --extra-index-url $(TORCH_CPU_INDEX) "$$torch"
	@$(PIP) -r requirements-cpu.lock 2> >(grep -v WARNING >&2)
	@$(RUN) -m pip uninstall -q -y torchvision torchaudio torchcodec 2>/dev/null || true
	@$(PIP) --no-build-isolation -e . 2> >(grep -v WARNING >&2)
	@$(RUN) -c 'import torch, vllm, ray, deepspeed, transformers' >/dev/null 2>&1 || \
	  { $(RUN) -c 'import torch, vllm, ray, deepspeed, transformers'; exit 1; }
	@touch $@

# torch and its companions are pinned with ===, since == also takes the CPU builds (+cpu) that pip may find first.
$(VENV)/.ready-gpu: requirements-gpu.lock pyproject.toml | $(VENV)/bin/python
	@$(RUN) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' || \
	  { echo "error: Triton compiles against Python.h, which is missing (Debian: python3-dev)"; exit 1; }
	@echo "environment: installing $$(grep -c == requirements-gpu.lock) pinned packages for GPUs (about 10 GB)"
	@$(PIP) -r requirements-gpu.lock
	@$(PIP) --no-build-isolation -e .
	@$(RUN) -c 'import torch, vllm, ray, deepspeed, transformers' >/dev/null 2>&1 || \
	  { $(RUN) -c 'import torch, vllm, ray, deepspeed, transformers'; exit 1; }
	@touch $@

launch: $(READY)  ## train: CLUSTER= DATA= MODEL= ALGORITHM= NAME= STEPS= ARGS="a.b=c" DRY_RUN=1 RESUME=1|auto OVERWRITE=1
	@$(ENV) $(RUN) -m launch.cli train $(if $(CLUSTER),--cluster "$(CLUSTER)") \
	  $(if $(DATA),--data "$(DATA)") $(if $(MODEL),--model "$(MODEL)") \
	  $(if $(ALGORITHM),--algorithm "$(ALGORITHM)") $(if $(NAME),--name "$(NAME)") $(if $(STEPS),--steps "$(STEPS)") \
	  $(if $(filter $(YES),$(DRY_RUN)),--dry-run) $(if $(filter $(YES),$(RESUME)),--resume) \
	  $(if $(filter auto,$(RESUME)),--auto-resume) $(if $(filter $(YES),$(OVERWRITE)),--overwrite) $(if $(ARGS),-- $(ARGS))

# Two files at a time, since many tests wait for processes, and by name, since those of few tests take longest; passive,
# so that threads do not burn each other's cores.
test: $(READY)  ## run the tests
	@$(ENV) OMP_WAIT_POLICY=passive $(RUN) -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

test-gpu:  ## run the tests that need a GPU
	@$(MAKE) --no-print-directory DEVICE=gpu .test-gpu
.test-gpu: $(READY)
	@$(ENV) $(RUN) -m pytest -q -m gpu

lint: $(READY)  ## ruff and mypy
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@$(RUN) -m mypy

format: $(READY)  ## format the code
	@$(RUN) -m ruff check --fix -q .
	@$(RUN) -m ruff format .

parity: $(READY)  ## compare with a golden set of the published code: GOLDEN=folder
	@test -n "$(GOLDEN)" || { echo "error: name the golden set: make parity GOLDEN=folder"; exit 1; }
	@$(ENV) $(RUN) -m learner.parity "$(GOLDEN)"

sasrec: $(READY)  ## train the SASRec of the collaborative reward: DATA= MODEL= ARGS= as for launch, OUT=
	@$(ENV) $(RUN) -m launch.cli reward train-sasrec $(if $(DATA),--data "$(DATA)") $(if $(MODEL),--model "$(MODEL)") \
	  $(if $(OUT),--out "$(OUT)") $(if $(ARGS),-- $(ARGS))

bench: $(READY)  ## all benchmarks: SCALE=cpu|gpu OUT=file.json
	@$(ENV) OUT="$(OUT)" MODEL="$(if $(filter-out small,$(MODEL)),$(MODEL))" DATA="$(if $(filter-out embedded,$(DATA)),$(DATA))" \
	  SCALE="$(SCALE)" $(RUN) -m benchmarks.run_all

bench-rollout bench-learner bench-step bench-rewards: bench-%: $(READY)  ## one benchmark: OUT=file.json
	@$(ENV) OUT="$(OUT)" MODEL="$(if $(filter-out small,$(MODEL)),$(MODEL))" DATA="$(if $(filter-out embedded,$(DATA)),$(DATA))" \
	  $(RUN) -m benchmarks.$(subst step,end_to_end,$*)

clean:  ## remove built catalogues, small models and what tools have cached (not the environment, not runs)
	rm -rf .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis
