# make quickstart   set up, then train and compare three small models (4 to 15 minutes on two CPU cores)
# make test         set up, then lint and run the tests
# make install      only set up: everything goes into .venv
#
# PYTHON=python3.12         another Python (3.10 to 3.13)
# PIP_EXTRA_INDEX_URL=...   pip's own variable: on a machine without a GPU, PyTorch's index of CPU wheels saves gigabytes

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
TEST_PROCESSES ?= 2
export PYTHONWARNINGS ?= ignore

.PHONY: install quickstart test lint format clean

install: $(VENV)/installed

# fairseq-fixed compiles extensions against PyTorch. Build isolation would download a second PyTorch for that, and
# optimising them takes minutes: those that training uses are small, -O1 serves them. Stock fairseq, on Python 3.10,
# is the other way round: its source package can be built only where there is no PyTorch.
ISOLATION = $(shell $(PYTHON) -c 'import sys; print("--no-build-isolation" * (sys.version_info >= (3, 11)))')

$(VENV)/installed: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch numpy cython setuptools wheel
	PIP_CONSTRAINT=constraints.txt CFLAGS="-O1 -g0" $(BIN)/python -m pip install -q $(ISOLATION) -e '.[test]'
	touch $@

quickstart: install
	PATH="$(abspath $(BIN)):$$PATH" examples/quickstart/quickstart.sh

test: lint
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist worksteal tests

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) runs build *.egg-info
