# One place for every command of the README. Everything installs into .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SEED ?= 0
RECIPE ?= configs/cpu_smoke.py
# Run directory: recipe name and arguments, then the seed.
RUN = runs/$(subst =,-,$(subst $(comma),_,$(subst :,_,$(basename $(notdir $(firstword $(subst :, ,$(RECIPE)))))$(if $(findstring :,$(RECIPE)),_$(word 2,$(subst :, ,$(RECIPE)))))))-seed$(SEED)
comma := ,
ON_CPU := test test-all bench bench-rollout bench-update evidence drill trajectory mutants witness tiny
# On the CPU, whatever there is: what tests and recorded figures are of. The rest takes a GPU or TPU.
$(ON_CPU): export JAX_PLATFORMS ?= cpu

.PHONY: setup setup-dev smoke test test-all check fmt bench bench-rollout bench-update evidence drill trajectory mutants witness tiny scale gpu-check gpu-pack

# `make setup EXTRA=cuda13` for a GPU, EXTRA=tpu, ...
setup: $(VENV)/.installed$(EXTRA:%=-%)
setup-dev: $(VENV)/.installed-dev

$(VENV)/.installed: setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools wheel
	$(BIN)/python -m pip install --quiet -e .
	touch $@

$(VENV)/.installed-%: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -e ".[$*]"
	touch $@

# Trains and scores the small policy on two CPU cores. A second call resumes.
smoke: setup
	$(BIN)/speciarl train --config=$(RECIPE) --workdir=$(RUN) --config.seed=$(SEED) --resume=auto
	$(BIN)/speciarl report $(RUN) --out=$(RUN)/report.html

# The longest files first, so that both workers end together.
PYTEST = $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder
LONGEST = tests/train/test_train.py tests/learner tests/train/test_outage.py tests/rollout

# The default suite: what CI runs.
test: setup-dev
	$(PYTEST) -m "not slow and not bench and not gpu and not tpu_aot and not gpu_aot" $(LONGEST) tests

# All of it but benchmarks; what needs a GPU, libtpu or a package that is not there is skipped.
test-all: setup-dev
	$(PYTEST) tests/train/test_processes.py tests/devices $(LONGEST) tests

check: setup-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/shellcheck -x -P . tpu_scripts/*.sh tpu_scripts/slurm.sbatch

fmt: setup-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: setup-dev
	$(BIN)/python tests/benchmarks/bench_attention.py
	$(BIN)/python tests/benchmarks/bench_data.py
	$(BIN)/python tests/benchmarks/bench_depth.py

# Against transformers' generate on torch, one core each (about seven minutes).
bench-rollout: setup-dev
	$(BIN)/python tests/benchmarks/bench_rollout.py --cases tiny middle group lengths

# Against torch and peft, one core each; memory at the 7B shape (about four minutes).
bench-update: setup-dev
	$(BIN)/python tests/benchmarks/bench_update.py
	$(BIN)/python tests/benchmarks/bench_update_memory.py

# The runs behind docs/results.md: about ten hours on two cores, resumable, beside other work;
# stands still while a file .evidence.pause exists. Then the tables and the figure are made again.
evidence: setup-dev
	$(BIN)/python -m tests.evidence.run $(ARGS)
	$(BIN)/python -m tests.evidence.tables

# The tables of docs/scale.md (about half an hour; needs the extra `plan`); a second call resumes.
scale: setup-dev
	$(BIN)/python -m tests.plan.scale $(ARGS)

# Long (about 25 minutes): floods of faulty judge replies, a judge gone for a minute and for good,
# a run killed 20 times and stopped 5 times.
drill: setup-dev
	$(BIN)/python -m tests.drills.fault_server
	$(BIN)/python -m tests.drills.fault_server --faults=each --timeout_s=2
	$(BIN)/python -m tests.drills.outage
	$(BIN)/python -m tests.drills.kill

# Our trainer against one written on torch, update by update (about eight minutes).
trajectory: setup-dev
	$(BIN)/python -m tests.drills.trajectory $(ARGS)

# Plants about 1,400 small faults, one after the other: does a test fail? (about two hours on two
# cores, resumable; writes docs/mutants.json)
mutants: setup-dev
	$(BIN)/python -m pip install --quiet -e ".[mutants]"
	$(BIN)/python -m tests.mutants.run $(ARGS)

# What a real card does, against what the plan says of it (at most ten minutes; ARGS=--tiny anywhere).
gpu-check: setup
	$(BIN)/python -m tests.gpu.check $(ARGS)

# Wheels for a machine with a GPU and without a network, into runs/gpu_wheels.
gpu-pack: setup
	$(BIN)/python -m tests.gpu.pack $(ARGS)

# Proves that a refactor changed no number: this tree against a commit, bit for bit (about 15
# minutes; BASE's results are kept in .witness/). `make witness BASE=COMMIT ARGS=--smoke`
BASE ?= HEAD
witness: setup-dev
	$(BIN)/python -m tests.drills.witness --base=$(BASE) $(ARGS)

# Makes the shipped small policy again (about 35 minutes on two cores); a second call resumes.
tiny: setup
	$(BIN)/speciarl tiny init runs/tiny/init
	$(BIN)/speciarl train --config=configs/tiny_sft.py --workdir=runs/tiny/sft --resume=auto
	test -f runs/tiny/first/config.json || $(BIN)/speciarl tiny ship runs/tiny/sft --out=runs/tiny/first
	$(BIN)/speciarl train --config=configs/tiny_sft.py:model=runs/tiny/first$(comma)steps=1000$(comma)lr=1e-3$(comma)pictures=8$(comma)hard=0.4 --workdir=runs/tiny/sft2 --resume=auto
	$(BIN)/speciarl tiny ship runs/tiny/sft2 --out=runs/tiny/model
