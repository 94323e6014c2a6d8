# UniRecon. `make help` lists every target.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python

GIVEN_PROFILE := $(value PROFILE)
PROFILE ?= demo
# Values go through the environment, letter for letter: neither make nor the shell reads a `$`, a quote or a blank in them.
# The first line is read by the command line itself, so that make, the sweep runner and `wandb agent` steer a run alike.
VALUES := PROFILE DATASET DATA_ROOT CATEGORIES BACKBONE WEIGHTS ALPHA RULE FOLDS WANDB \
	METHOD RUN IMAGES OUT ABLATION COMPARE SETTING WORKERS GPUS SEEDS SWEEP TABLE SOURCE FORMAT A B CLEAR \
	RUNS METHODS REFERENCE CHECKPOINT CATEGORY ADDRESS
$(foreach v,$(VALUES),$(if $(filter undefined,$(origin $v)),,$(eval override $v := $$(value $v))$(eval export $v)))

.DEFAULT_GOAL := help

help:  ## List every target with one line.
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sort | sed -E 's/:[^#]*## */\t/' | awk -F'\t' '{printf "  %-16s %s\n", $$1, $$2}'

# REQUIREMENTS=oldest installs the lower bounds of requirements.txt, to see that they are true.
INSTALL = $(if $(filter oldest,$(REQUIREMENTS)),$(PY) -m pip install --quiet uv && $(PY) -m uv pip install --quiet --python $(PY) --resolution lowest-direct,$(PY) -m pip install --quiet)

# A copy of requirements.txt inside the environment marks it as complete; it is written last.
$(VENV)/.installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "UniRecon needs Python 3.10 or newer, found %s. Set PYTHON=/path/to/python3.10" % sys.version.split()[0])'
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)  # also one that was cut off half-made
	$(PY) -m pip install --quiet --upgrade pip
	$(INSTALL) -r requirements.txt
	@cp requirements.txt $@

$(VENV)/.baselines: requirements-baselines.txt $(VENV)/.installed
	$(INSTALL) -r requirements.txt -r requirements-baselines.txt
	@cp requirements-baselines.txt $@

setup: $(VENV)/.installed  ## Make the virtual environment and install requirements.txt.

baselines: $(VENV)/.baselines  ## Install anomalib, which CFLOW, FastFlow, DRAEM and EfficientAD take their networks from.

test: setup  ## Run the tests that guard users, in minutes.
	$(PY) -m pytest -n auto --maxprocesses 4 --dist worksteal -m "not program"

test-all: setup  ## Run every test, also those that start programs, kill them and compile.
	$(PY) -m pytest -n auto --maxprocesses 4 --dist worksteal

lint: setup  ## Check style with ruff and types with mypy.
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

readme: setup  ## Run every command of the READMEs in a copy of the repository, with short trainings: a quarter of an hour. [ONLY=<pattern>].
	$(PY) tests/readme.py $(if $(ONLY),"$$ONLY")

train import: export METHOD := $(or $(value METHOD),uniad)
train: setup  ## Train and evaluate once: METHOD= PROFILE= DATASET= DATA_ROOT= [CATEGORIES= BACKBONE= WEIGHTS= ALPHA= RULE= FOLDS= RUN= ARGS=].
	$(PY) -m sweeps data "sweeps/profiles/$$PROFILE/$$METHOD.yaml"
	$(PY) -m lightning_modules fit --config "sweeps/profiles/$$PROFILE/$$METHOD.yaml" $(if $(RUN),--run.name="$$RUN") \
		$(if $(FOLDS),--run.folds="$$FOLDS") $(ARGS)

import: export override PROFILE := $(or $(value GIVEN_PROFILE),paper)
import: setup  ## A run record from an authors' checkpoint: CHECKPOINT= METHOD= DATASET= DATA_ROOT= [CATEGORIES= RUN= ARGS=].
	$(PY) -m lightning_modules import --method "$$METHOD" --checkpoint "$$CHECKPOINT" $(if $(RUN),--run.name="$$RUN") $(ARGS)

predict: setup  ## Decisions on new photographs: RUN=<name or record folder> IMAGES=<folder, file or several> [OUT= CATEGORY= ALPHA= RULE= ARGS=].
	$(PY) -m lightning_modules predict --run="$$RUN" --images="$$IMAGES" $(if $(OUT),--out="$$OUT") \
		$(if $(CATEGORY),--category="$$CATEGORY") $(ARGS)

submission: setup  ## MVTec AD 2's files for its evaluation server: RUN=<record folder> OUT=<new folder>.
	@test -n "$$RUN" -a -n "$$OUT" || { echo 'error: submission needs RUN=<record folder> and OUT=<new folder>'; exit 2; }
	$(PY) -m lightning_modules submission --run "$$RUN" --out "$$OUT" $(ARGS)

export: setup  ## A run as one file for other programs: RUN= [FORMAT=onnx|torch OUT= CATEGORY= ALPHA= RULE= IMAGES=<to check it with>].
	@test -n "$$RUN" || { echo 'error: export needs RUN=<name or record folder>'; exit 2; }
	$(PY) -m lightning_modules.exporting --run "$$RUN" --format "$${FORMAT:-onnx}" $(if $(OUT),--out "$$OUT") \
		$(if $(CATEGORY),--category "$$CATEGORY") $(if $(IMAGES),--images "$$IMAGES") \
		$(if $(RULE),--rule "$$RULE") $(if $(ALPHA),--alpha "$$ALPHA") $(ARGS)

export-requirements: setup  ## Install what ONNX files need, requirements-export.txt.
	$(INSTALL) -r requirements-export.txt

check-data: setup  ## Count a dataset's images, list every problem, draw contact sheets: DATASET= DATA_ROOT= [CATEGORIES= OUT= ARGS=].
	$(PY) -m datamodules check --out "$${OUT:-results/check}" $(ARGS)

data: setup  ## Fetch a public dataset: DATASET=mvtec_ad|mvtec_loco|mvtec_ad_2|visa|btad DATA_ROOT= [ACCEPT=1 ADDRESS=].
	$(PY) -m datamodules fetch $(if $(filter 1,$(ACCEPT)),--accept) $(if $(ADDRESS),--address "$$ADDRESS") $(ARGS)

synthetic: setup  ## Make the embedded benchmark in data/synthetic.
	$(PY) -m datamodules synthetic data/synthetic

# ARGS are added to every cell's command.
sweep wandb-sweep: export ARGS := $(value ARGS)
sweep: setup  ## Run an ablation and rebuild its table: ABLATION= [PROFILE= COMPARE= SETTING= METHOD= WORKERS= GPUS= SEEDS= ONLY= ARGS= RETRY_FAILED=1].
	$(PY) -m sweeps run "$$ABLATION" $(if $(WORKERS),--workers "$$WORKERS") $(if $(GPUS),--gpus "$$GPUS") \
		$(if $(SEEDS),--seeds "$$SEEDS") $(foreach o,$(ONLY),--only $(o)) $(if $(RETRY_FAILED),--retry-failed)

sweeps: setup  ## List all ablations.
	$(PY) -m sweeps list

reference: setup  ## Train and publish what results/reference/plan.yaml lists: [ONLY="sweep key=value" WORKERS= AGAIN=1 ARGS=--dry-run].
	$(PY) -m sweeps reference $(foreach o,$(ONLY),--only $(o)) $(if $(WORKERS),--workers "$$WORKERS") $(if $(AGAIN),--again) $(ARGS)

verify: setup  ## Run one small cell per method again, compare with its reference record: [ONLY=method=uniad WORKERS=].
	$(PY) -m sweeps verify $(foreach o,$(ONLY),--only $(o)) $(if $(WORKERS),--workers "$$WORKERS")

wandb-sweep: setup  ## Register an ablation with W&B and print how to start agents: ABLATION= [PROFILE= COMPARE= SETTING= SEEDS= ARGS=].
	$(PY) -m sweeps register "$$ABLATION" $(if $(SEEDS),--seeds "$$SEEDS")

agents: setup  ## One W&B agent per GPU: SWEEP=entity/project/sweep [GPUS=0,1 WORKERS=].
	$(PY) -m sweeps agents "$$SWEEP" $(if $(GPUS),--gpus "$$GPUS") $(if $(WORKERS),--workers "$$WORKERS")

pull: setup  ## Fetch the run records of a W&B sweep: SWEEP=entity/project/sweep.
	$(PY) -m sweeps pull "$$SWEEP"

# Which runs a table or figure is of; the default PROFILE is for trainings.
KIND = $(if $(GIVEN_PROFILE),--profile "$$PROFILE") $(if $(COMPARE),--compare "$$COMPARE") \
	$(if $(SETTING),--setting "$$SETTING")

table: setup  ## One table: TABLE= [SOURCE=published|runs|both DATASET= PROFILE= COMPARE= SETTING= FORMAT=terminal|markdown|csv|latex|html ARGS=].
	$(PY) -m results table "$$TABLE" $(KIND) $(if $(SOURCE),--source "$$SOURCE") $(if $(DATASET),--dataset "$$DATASET") --format "$${FORMAT:-terminal}" $(ARGS)

tables: setup  ## Rebuild every table under results/tables/: [PROFILE= COMPARE= SETTING= ARGS=--newest].
	$(PY) -m results tables $(KIND) $(ARGS)

figures: setup  ## Figures of a sweep or of a paper's table: ABLATION= [PROFILE= COMPARE= SETTING= ARGS=].
	$(PY) -m results figures "$$ABLATION" $(KIND) $(ARGS)

audit: setup  ## Check the papers' printed tables against themselves.
	$(PY) -m results audit

compare: setup  ## Paired tests between two methods, runs or cells: A= B= [PROFILE= COMPARE= SETTING= ARGS=].
	$(PY) -m results compare "$$A" "$$B" $(KIND) $(ARGS)

documents: setup  ## Fill the tables of README.md and results/DEMOS.md from the reference records: [ARGS=--check].
	$(PY) -m results documents $(ARGS)

report: setup  ## One self-contained HTML page of all tables, figures and heat maps: [PROFILE= COMPARE= SETTING= ARGS=].
	$(PY) -m results report $(KIND) $(ARGS)

reconstructions: setup  ## Picture what a run reconstructs: RUN=<name or record folder> [ARGS="--epochs=100 --width=256"].
	$(PY) -m lightning_modules.pictures.reconstructions "$$RUN" $(ARGS)

pipeline: setup  ## The way of an image from photograph to table, with a run's own numbers: RUN=<name or record folder> [ARGS=--image=3].
	@test -n "$$RUN" || { echo 'error: pipeline needs RUN=<name or record folder>'; exit 2; }
	$(PY) -m lightning_modules.pictures.pipeline "$$RUN" $(ARGS)

shortcuts: setup  ## What the networks of identical_shortcut reconstruct, early and late, by one decoder: [ARGS=].
	$(PY) -m lightning_modules.pictures.shortcuts $(ARGS)

self-similarity: setup  ## What the frozen features of a run attend to: RUN=<name or record folder> [ARGS=--measure=cosine].
	@test -n "$$RUN" || { echo 'error: self-similarity needs RUN=<name or record folder>'; exit 2; }
	$(PY) -m lightning_modules.pictures.self_similarity "$$RUN" $(ARGS)

gallery: setup  ## Methods side by side on the same images: RUNS="<names or record folders>" or METHODS="uniad rlr" [REFERENCE= OUT= ARGS=].
	@test -n "$$RUNS$$METHODS" || { echo 'error: gallery needs RUNS="<names or record folders>" or METHODS="<names>"'; exit 2; }
	@test -z "$$RUNS" -o -z "$$METHODS" || { echo 'error: gallery takes RUNS= or METHODS=, not both'; exit 2; }
	$(PY) -m lightning_modules.pictures.gallery $(if $(RUNS),--runs $$RUNS,--methods $$METHODS) \
		$(if $(REFERENCE),--reference "$$REFERENCE") $(if $(OUT),--out "$$OUT") $(ARGS)

bench: setup  ## Time and memory of every method against a plain loop, about a minute each: [ARGS=].
	$(PY) -m lightning_modules.benchmarks.training $(ARGS)

cache: setup  ## List the feature cache's entries, or delete some: [CLEAR=key or all].
	$(PY) -m datamodules cache $(if $(CLEAR),--clear $(CLEAR))

bench-metrics: setup  ## Time our metrics against other libraries.
	$(PY) -m lightning_modules.benchmarks.metrics

bench-inference: setup  ## Latency, images per second and memory of a run: RUN= [CATEGORY= ARGS=].
	@test -n "$$RUN" || { echo 'error: bench-inference needs RUN=<name or record folder>'; exit 2; }
	$(PY) -m lightning_modules.benchmarks.inference --run "$$RUN" $(if $(CATEGORY),--category "$$CATEGORY") $(ARGS)

bench-anomalib: setup  ## Time and memory of PatchCore, PaDiM and RD4AD against anomalib's (make baselines): [ARGS=].
	$(PY) -m lightning_modules.benchmarks.against_anomalib $(ARGS)

bench-start: setup  ## Time the start of a run on 60,000 small files: [ARGS=].
	$(PY) -m lightning_modules.benchmarks.start $(ARGS)

.PHONY: help setup baselines test test-all lint readme train import predict submission export export-requirements check-data data synthetic \
	sweep sweeps reference verify wandb-sweep agents pull table tables audit figures documents compare report reconstructions pipeline gallery \
	shortcuts self-similarity bench bench-metrics bench-inference bench-anomalib bench-start cache
