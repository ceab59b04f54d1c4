# What users and CI call.  Each target sets up what it needs: a virtual environment with the package and its tools.
PYTHON ?= python3
TEST_PROCESSES ?= 2
BIN := .venv/bin

# Temporary files, MLX's compiled kernels among them, stay in the repository (homes with sockets are short-lived in /tmp).
export TMPDIR := $(CURDIR)/.tmp

.PHONY: demo demo-large demo-warmth test check conformance clients bench clean

demo: .venv/ready
	$(BIN)/python -m tools.demo

demo-large: .venv/ready
	$(BIN)/python -m tools.demo --large

demo-warmth: .venv/ready
	$(BIN)/python -m tools.demo_warmth

# Files of tests run side by side; the tests of one share what they have started.
test: .venv/ready
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile

# mypy reads the package as it is installed, because the folders are mapped into it only then.
check: .venv/ready
	$(BIN)/ruff check .
	rm -rf .check build && $(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --target .check .
	rm -rf build && MYPYPATH=.check $(BIN)/python -m mypy -p expertd
	$(BIN)/python -m pytest -q tests/test_arrows.py tests/test_protocol_document.py

# The vendors' own test suites against a real gateway; the first run takes them from PyPI.
conformance: .venv/ready
	$(BIN)/python -m tools.conformance

# Real clients against a real gateway; the first run takes them from PyPI and npm.
clients: .venv/ready
	$(BIN)/python -m tools.clients

bench: .venv/ready
	$(BIN)/python -m benchmarks exactness
	$(BIN)/python -m benchmarks hitpath

clean:
	rm -rf .venv .check .tmp build *.egg-info

.venv/ready: pyproject.toml
	mkdir -p .tmp
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet "setuptools>=77" wheel
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[dev]"
	touch $@
