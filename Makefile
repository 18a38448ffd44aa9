# Every target first installs what it needs, and no more. `make demo` and `make test` are all that a fresh clone has to know.

PYTHON ?= python3
LOCALSTACK_VENV := $(or $(CLOUDCKPT_LOCALSTACK_VENV),.venv-localstack)
LOCALSTACK_READY := $(LOCALSTACK_VENV)/.ready
BIN := .venv/bin
# In the environment, unlike -c, they also hold where pip builds what comes as source only (the second for newer pips).
PINNED := PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt
INSTALL := -m pip install --quiet --disable-pip-version-check
# Many tests wait: for deadlines, for other processes. The workers share the servers; a file stays on one worker.
WORKERS ?= 6
# Where benchmarks write their results.
OUT ?= bench-results
# In the order of collection, which begins with what takes longest (`tests/effort.py`). Each worker imports all tests,
# which takes it twice as long where what pytest makes of them is not kept.
PYTEST = env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: help setup setup-localstack dev demo test test-all test-lowest integrations examples lint check format bench bench-quick docs
.PHONY: reliability package servers-up servers-down constraints
# Two installations into one environment must not meet.
.NOTPARALLEL:

help:
	@echo "make demo [URL=s3://…|gs://…|DIR]  train, kill, resume, compare (SeaweedFS on loopback unless URL is given)"
	@echo "make test | test-all               the default suite | the slow tests too; ARGS='-k name' narrows either"
	@echo "make test-lowest                   formats, stores and saves with the oldest libraries that a user may have"
	@echo "make reliability [RECORDS=DIR]      break saves and restores in every way, some hours; figures in docs/reliability.md"
	@echo "make integrations                  the adapters and all of examples/, with the frameworks that they are for"
	@echo "make examples [ARGS='-k lightning']  each program of examples/ once, as one starts it from a shell"
	@echo "make bench [OUT=DIR] [ARGS='--sections peers']  measure beside other ways to save: hours; tables and plots in DIR"
	@echo "make bench-quick [OUT=DIR]         the same, small, once each: some minutes"
	@echo "make servers-up | servers-down     SeaweedFS, LocalStack and fake-gcs-server in the background"
	@echo "make setup | setup-localstack      the environments of the tests; the other targets call them"
	@echo "make dev                           install what the targets below need, too"
	@echo "make check                         format, lint, types and the default suite"
	@echo "make format                        put the code in shape"
	@echo "make docs                          build the site into site/, which any browser reads from the disk"
	@echo "make package                       build wheel and sdist into dist/, and use the wheel as a stranger would"
	@echo "make constraints                   write down what is installed as what CI installs"

$(BIN)/pip:
	$(PYTHON) -m venv .venv

# One environment serves all: each extra of pyproject.toml comes on top, when a target first asks for it.
.venv/.ready-%: pyproject.toml constraints.txt | $(BIN)/pip
	$(PINNED) $(BIN)/python $(INSTALL) -e '.[$*]'
	@touch $@

# Not on every platform is there a wheel of each; a peer that is not there has a row that says so, and why.
.venv/.ready-peers: pyproject.toml constraints.txt benchmarks/peers/install.py | $(BIN)/pip
	@$(PINNED) $(BIN)/python benchmarks/peers/install.py && touch $@

$(LOCALSTACK_READY): localstack/requirements.txt
	@test -x $(LOCALSTACK_VENV)/bin/pip || $(PYTHON) -m venv $(LOCALSTACK_VENV)
	$(LOCALSTACK_VENV)/bin/python $(INSTALL) -r localstack/requirements.txt
	@touch $@

setup: .venv/.ready-test
setup-localstack: $(LOCALSTACK_READY)
dev: .venv/.ready-dev

demo: .venv/.ready-demo
	$(BIN)/python examples/demo.py $(if $(URL),--url '$(URL)') $(ARGS)

test: setup setup-localstack
	$(PYTEST) $(ARGS)

test-all: setup setup-localstack .venv/.ready-peers
	$(PYTEST) -m 'slow or not slow' --hypothesis-profile=long $(ARGS)

# Of a run in which nothing was lost; else there is no page. Lightning is among the peers.
RECORDS ?= reliability-records
reliability: setup setup-localstack .venv/.ready-peers
	@mkdir -p '$(RECORDS)' && rm -f '$(RECORDS)'/*.jsonl
	CLOUDCKPT_RELIABILITY='$(abspath $(RECORDS))' $(PYTEST) tests/reliability -m 'slow or not slow' \
		--hypothesis-profile=long $(ARGS)
	$(BIN)/python -m tests.reliability.page '$(RECORDS)' docs/reliability.md

# An environment of its own, with the lower bounds. By the oldest Python: newer ones have no wheels of some.
.venv-lowest/.ready: pyproject.toml constraints-lowest.txt
	@test -x .venv-lowest/bin/pip || $(PYTHON) -m venv .venv-lowest
	PIP_CONSTRAINT=constraints-lowest.txt .venv-lowest/bin/python $(INSTALL) -e '.[test]'
	@touch $@

test-lowest: .venv-lowest/.ready setup-localstack
	$(subst $(BIN),.venv-lowest/bin,$(PYTEST)) tests/format tests/store tests/cli tests/test_save_load.py $(ARGS)

# The frameworks that adapters are for, in an environment of their own: some hold others' versions back.
FRAMEWORKS := accelerate,lightning,megatron,peft,ray,torch-checkpointing,torchtitan,transformers
.venv-integrations/.ready: pyproject.toml constraints-integrations.txt
	@test -x .venv-integrations/bin/pip || $(PYTHON) -m venv .venv-integrations
	PIP_CONSTRAINT=constraints-integrations.txt .venv-integrations/bin/python $(INSTALL) -e '.[test,$(FRAMEWORKS)]' trl
	@touch $@

# Each worker imports all frameworks, and so does the server that it forks programs from.
integrations: WORKERS := 2
integrations: .venv-integrations/.ready
	$(subst $(BIN),.venv-integrations/bin,$(PYTEST)) tests/integrations -m 'slow or not slow' $(ARGS)

# One after the other, each by its name.
examples: .venv-integrations/.ready
	.venv-integrations/bin/python -m pytest tests/integrations/test_examples.py -v $(ARGS)

bench: .venv/.ready-bench .venv/.ready-peers
	$(BIN)/python benchmarks/run.py --out '$(OUT)' $(ARGS)

bench-quick: .venv/.ready-bench .venv/.ready-peers
	$(BIN)/python benchmarks/run.py --quick --out '$(OUT)' $(ARGS)

# Against the empty tree git checks every line: for what a merge left open, and for blanks at ends.
lint: dev
	git diff --check $$(git hash-object -t tree /dev/null)
	@! git ls-files | grep -E '\.(orig|rej)$$|~$$' || { echo "not to be tracked: left by a merge or an editor"; exit 1; }
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

check: lint test

format: dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# What the command line tells of its options needs the package itself; NO_MKDOCS_2_WARNING: an advertisement.
docs: .venv/.ready-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict $(ARGS)

package: dev
	rm -rf dist
	$(PINNED) $(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/python .ci/package.py

servers-up: setup setup-localstack
	$(BIN)/python localstack/servers.py up

servers-down: setup
	$(BIN)/python localstack/servers.py down

# Up to its third comment the file is written by hand: `pip freeze` sees no environment in which something is built.
# The local version (`+cpu`) is one index's own; the pin must hold on any.
constraints: dev .venv/.ready-docs .venv/.ready-peers
	@sed '/^# Seen/q' constraints.txt > constraints.txt.new
	@$(BIN)/python -m pip freeze --exclude-editable | sed 's/+[a-z0-9.]*$$//' >> constraints.txt.new
	@mv constraints.txt.new constraints.txt
