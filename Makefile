.PHONY: help install repro test test-integration test-all check ui deploy preset tables lock clean
.DEFAULT_GOAL := help
PYTHON ?= python3.11
VENV := .venv
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export MLFLOW_DISABLE_TELEMETRY := true
PIP := python -m pip --disable-pip-version-check
TAG ?= latest
PROFILE ?= cpu
# `docker info` fails if the command is installed but no engine runs.
DOCKER = $(shell docker info > /dev/null 2>&1 && echo docker)
BUILDER = $(if $(DOCKER),docker build,buildah build --layers --format docker)
BUILD = $(BUILDER) $(if $(BASE),--build-arg BASE=$(BASE)) $(FLAGS)
# Markers (pyproject.toml) of tests that need more than the installed environment, or run the pipeline again.
INTEGRATION := pipeline or server or browser or container or real_data
PYTEST := python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
COMPOSE = $(if $(DOCKER),docker compose,podman-compose) --env-file docker/.env --file docker/compose.yaml

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

install: $(VENV)/installed  ## create .venv and install requirements.lock into it

$(VENV)/installed: requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --requirement requirements.lock
	$(PIP) install --quiet --no-deps --editable .
	touch $@

repro: install  ## run the pipeline from download to promote; skips stages that are up to date
	python -m pipelines.config.check
	python -m pipelines.server dvc repro

test: install  ## run the tests that need only the environment, with one run of the pipeline; about 7 minutes
	$(PYTEST) -m "not ($(INTEGRATION))"

test-integration: install  ## run the other tests: pipeline, servers, browser, containers, real data; about 22 minutes
	$(PYTEST) -m "$(INTEGRATION)"

test-all: test test-integration  ## run all tests

check: install  ## check format, lint, types and layers
	ruff format --check .
	ruff check .
	mypy
	lint-imports

ui: install  ## start MLflow's UI with this project's runs and models at http://127.0.0.1:5000
	mkdir -p mlruns
	mlflow server --host 127.0.0.1 --port $(or $(PORT),5000) --workers 1 \
	  --backend-store-uri "sqlite:///mlruns/mlflow.db?timeout=60" --artifacts-destination mlruns/artifacts

deploy: install  ## create this project's deployments on the Prefect server at PREFECT_API_URL: make deploy GPUS=2
	python -m pipelines.orchestration.deploy --concurrency $(or $(GPUS),1)

preset: install  ## apply a preset to params.yaml: make preset NAME=paper
	python -m pipelines.config.presets $(NAME)

tables: install  ## train a grid and write docs/reference/tables.md: make tables GRID=cpu DATA=FOLDER JOBS=2
	fadeformer tables $(GRID) $(if $(DATA),--data $(DATA)) --jobs $(or $(JOBS),1)

.PHONY: images image-trainer image-worker image-mlflow up down
images: image-trainer image-worker image-mlflow  ## build the images: make images TORCH_INDEX=URL TAG=cpu BASE=docker.io/library/python@sha256:DIGEST

image-trainer image-worker: image-%:
	$(BUILD) $(if $(TORCH_INDEX),--build-arg TORCH_INDEX=$(TORCH_INDEX)) --target $* \
	  --file docker/trainer.Dockerfile --tag localhost/fadeformer-$*:$(TAG) .

image-mlflow:
	$(BUILD) --file docker/mlflow.Dockerfile --tag localhost/fadeformer-mlflow:$(TAG) .

up: docker/.env  ## start PostgreSQL, the object store, MLflow, Prefect and a worker: make up PROFILE=gpu
	$(COMPOSE) --profile $(PROFILE) up --detach

down: docker/.env  ## stop them; the volumes are kept
	$(COMPOSE) --profile cpu --profile gpu down

docker/.env:
	@echo "copy docker/env.example to docker/.env and set the values without a default (docs/how-to/containers.md)" >&2; exit 1

lock:  ## update requirements.lock from pyproject.toml, in a temporary environment
	rm -rf .cache/lock && $(PYTHON) -m venv .cache/lock
	.cache/lock/bin/python -m pip install --quiet ".[s3,servers,test,dev]"
	.cache/lock/bin/python -m pip freeze --exclude fadeformer \
	  | sed -E '/^(nvidia-|cuda-|triton)/ s/$$/ ; sys_platform == "linux"/' > requirements.lock

clean:  ## remove the outputs of all stages and unfinished trainings; keeps mlruns/ and downloads
	rm -rf data/raw data/manifest.parquet data/processed models reports/[!.]* .models.* data/.[!g]* reports/.[!g]* .cache/train .cache/runs
