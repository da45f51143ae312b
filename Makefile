# Needs git, make and Python >= 3.11; everything else goes into .venv.

PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3 python; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)
BIN := .venv/bin
SEED ?=
SECONDS ?= 60

.PHONY: run test fmt check bench brokers hostile chaos sim sim-long cuts fuzz
.DEFAULT_GOAL := run

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "Penstock needs Python 3.11 or newer with the venv module; none was found." >&2; exit 1; }
	$(PYTHON) -m venv .venv

# The stamps make a second call start at once; a changed pyproject.toml installs again.
.venv/.all: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[all]'
	@touch $@

.venv/.dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@ .venv/.all

# The tests install it too if it is missing; without npm they are skipped by name, or fail with REQUIRE_ALL=1.
AZURITE := $(shell sed -n 's/^AZURITE = "\(.*\)"/\1/p' tests/emulators.py)
.venv/.azurite: tests/emulators.py | $(BIN)/python
	@! command -v npm >/dev/null || npm install --silent --no-audit --no-fund --prefix .venv/azurite $(AZURITE) || echo "Azurite cannot be installed." >&2
	@touch $@

# Likewise a Kafka broker, from Maven Central.
.venv/.kafka: tests/kafka/pom.xml | $(BIN)/python
	@! command -v java >/dev/null || ! command -v mvn >/dev/null || { mvn -B -q -f $< dependency:copy-dependencies -DincludeScope=runtime \
		-DoutputDirectory=$(CURDIR)/.venv/kafka && touch .venv/kafka/.whole; } || echo "Kafka cannot be fetched." >&2
	@touch $@

run: .venv/.all
	@exec $(BIN)/penstock up

# In three processes, each module in one of them, in the order of tests/conftest.py: most tests wait for others, not for a processor.
test: .venv/.dev .venv/.azurite .venv/.kafka
	$(BIN)/python -m pytest --numprocesses $(or $(PROCESSES),3) --dist loadfile --no-loadscope-reorder

fmt: .venv/.dev
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

check: .venv/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy --strict
	$(BIN)/python -m pytest -q tests/test_house.py

bench: .venv/.dev
	$(BIN)/python -m bench $(ARGS)
	$(if $(ARGS),,$(BIN)/python -m bench.hosts && $(BIN)/python -m bench.balance)

# Three Kafka brokers on this machine to try --hub kafka:// with, until Ctrl-C.
brokers: .venv/.dev .venv/.kafka
	@exec $(BIN)/python -m tests.brokers

# A good client beside slow and hostile ones, and at three times the capacity; the attacks last SECONDS. `make test` has a minute of attacks.
hostile: .venv/.dev
	$(BIN)/python -m bench.hostile --attack-seconds $(SECONDS) $(ARGS)

# Brokers, APIs and hosts that die, stand still and are cut off, while half a million events come; `make test` has two minutes of it.
chaos: SECONDS = 600
chaos: .venv/.dev .venv/.azurite .venv/.kafka
	PENSTOCK_CHAOS_S=$(SECONDS) $(if $(SEED),PENSTOCK_SEED=$(SEED)) $(BIN)/python -m pytest -q -s tests/e2e/test_kafka_chaos.py

# One seed with all its steps, or the seeds and interleavings of `make test`.
sim: .venv/.dev
	$(if $(SEED),$(BIN)/python -m tests.sim --seed $(SEED),$(BIN)/python -m pytest -q -s tests/sim)

# Many other seeds, until told otherwise 200,000; names those that fail.
sim-long: .venv/.dev
	$(BIN)/python -m tests.sim --first $(or $(FIRST),10000) --seeds $(or $(SEEDS),200000) --processes $(or $(PROCESSES),2)

# Sixty power cuts each on the hub's disk and on a device's; `make test` has a few.
cuts: .venv/.dev
	PENSTOCK_ROUNDS=$(or $(ROUNDS),60) $(if $(SEED),PENSTOCK_SEED=$(SEED)) \
		$(BIN)/python -m pytest -q -s --timeout 3600 -k moment tests/crash/test_power.py tests/crash/test_client_power.py

# All targets at once, or those of TARGETS; `make test` has ten seconds of each. What fails is kept in tests/fuzz/corpus.
fuzz: .venv/.dev
	$(BIN)/python -m tests.fuzz --seconds $(SECONDS) $(TARGETS)
