# make demo: set up and run the main job.  make test: set up and run the tests.  make rules: prove all dimension rules on
# PyTorch's operator database.  Needs Python 3.11+ and make.

VENV ?= .venv
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo $$p; break; }; done)
RUN = $(VENV)/bin/python
# make test runs test files side by side: two processes, whatever the machine has, as many tests start ranks themselves.
TEST_PROCESSES ?= 2
INSTALL = $(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt

# make profile-gpu: op times of this machine's GPU for the package, with the Python that is there; no network.
# make zoo: every architecture of tests/zoo (half an hour on two cores; resumes), then docs/zoo.md.

.PHONY: api bench bench-gpu determinism demo faults soak zoo stranger test browser docs fuzz rules lint setup setup-test clean

demo: setup
	$(RUN) examples/train_byte_gpt.py

test: setup-test
	$(RUN) -m pytest -n $(TEST_PROCESSES) --dist loadfile

fuzz: setup-test
	$(RUN) -m tests.fuzz --examples 2000 --processes 2

rules: setup-test
	$(RUN) -m tests.op_database

# make faults: every kind of fault ROUNDS times.  make soak: MINUTES of training with random kills and restarts.
ROUNDS ?= 10
MINUTES ?= 30

faults: setup-test
	$(RUN) -m tests.faults --rounds $(ROUNDS)

soak: setup-test
	$(RUN) -m tests.soak --minutes $(MINUTES)

# make docs: every block of every page of the documentation is run.
docs: setup-test
	$(RUN) -m tests.docs_run

# make api: docs/api.md from the docstrings.
api: setup-test
	$(RUN) -m tests.api_page

# make stranger: a fresh clone and virtual environment, then README's "Start here" word by word, timed.
stranger:
	@$(PYTHON) tests/stranger.py

# make bench: every benchmark that needs no GPU (40 minutes on two cores; root, for emulated links), then
# docs/benchmarks.md.  ARGS: of python -m benchmarks, such as ARGS=--smoke.
bench: setup-test
	$(INSTALL) -e ".[test,bench]"
	$(RUN) -m benchmarks $(ARGS)

# make browser: the HTML report in a real browser (needs chromium).
browser: setup-test
	$(RUN) -m tests.browser

profile-gpu:
	PYTHONPATH=. $(PYTHON) benchmarks/profile_gpu.py

# make bench-gpu: all that one GPU can prove, with the Python that is there; no network.
bench-gpu:
	PYTHONPATH=. $(PYTHON) -m benchmarks.gpu

# make determinism: 20 processes with other hash seeds and shuffled inputs plan the same bytes.
determinism: setup-test
	$(RUN) -m tests.determinism --runs 20

zoo: setup-test
	$(RUN) -m tests.zoo.run

lint: setup-test
	$(INSTALL) -e ".[lint]"
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright

setup: $(VENV)/.base
setup-test: $(VENV)/.test

$(VENV)/.base: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "shardplan needs Python 3.11 or newer; set PYTHON=/path/to/python" >&2; exit 1; }
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV)"
	@$(INSTALL) -e .
	@touch $@

$(VENV)/.test: $(VENV)/.base
	@$(INSTALL) -e ".[test]"
	@touch $@

clean:
	rm -rf $(VENV) build dist out *.egg-info
