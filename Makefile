# Every target first makes what it needs. `make demo` and `make test` are all that a fresh clone has to know.

PYTHON ?= python3
LOCALSTACK_VENV := $(or $(CLOUDCKPT_LOCALSTACK_VENV),.venv-localstack)
BIN := .venv/bin
READY := .venv/.ready
LOCALSTACK_READY := $(LOCALSTACK_VENV)/.ready
PIP_FLAGS := --quiet --disable-pip-version-check
# Many tests wait: for deadlines, for other processes. Each worker has servers of its own; a file stays on one worker.
WORKERS ?= 3
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

.PHONY: help setup setup-localstack demo test test-all lint check bench servers-up servers-down format constraints

help:
	@echo "make demo [URL=s3://…|gs://…|DIR]  train, kill, resume, compare (SeaweedFS on loopback unless URL is given)"
	@echo "make test | test-all               the default suite | the slow tests too; ARGS='-k name' narrows either"
	@echo "make check                         format, lint, types and the default suite"
	@echo "make format                        put the code in shape"
	@echo "make bench [ARGS='--quick']        measure against other ways to save"
	@echo "make servers-up | servers-down     SeaweedFS, LocalStack and fake-gcs-server in the background"
	@echo "make setup | setup-localstack      the virtual environments; the other targets call them"

setup: $(READY)

# Without build isolation: hatchling, too, is the pinned one, and is fetched once.
$(READY): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install $(PIP_FLAGS) -c constraints.txt hatchling editables
	$(BIN)/python -m pip install $(PIP_FLAGS) -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@

setup-localstack: $(LOCALSTACK_READY)

$(LOCALSTACK_READY): localstack/requirements.txt
	@test -x $(LOCALSTACK_VENV)/bin/python || $(PYTHON) -m venv $(LOCALSTACK_VENV)
	$(LOCALSTACK_VENV)/bin/python -m pip install $(PIP_FLAGS) -r localstack/requirements.txt
	@touch $@

demo: setup
	$(BIN)/python examples/demo.py $(if $(URL),--url '$(URL)') $(ARGS)

test: setup setup-localstack
	$(PYTEST) $(ARGS)

test-all: setup setup-localstack
	$(PYTEST) -m 'slow or not slow' $(ARGS)

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

check: lint test

bench: setup
	$(BIN)/python benchmarks/run.py $(ARGS)

servers-up: setup setup-localstack
	$(BIN)/python localstack/servers.py up

servers-down: setup
	$(BIN)/python localstack/servers.py down

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The local version (`+cpu`) is one index's own; the pin must hold on any.
constraints: setup
	@head -n 2 constraints.txt > constraints.txt.new
	@$(BIN)/python -m pip freeze --exclude-editable | sed 's/+[a-z0-9.]*$$//' >> constraints.txt.new
	@mv constraints.txt.new constraints.txt
