PYTHON ?= python3
PIP = .venv/bin/python -m pip install --quiet --constraint constraints.txt
# A process per core, at most four: each takes 1 GB. Neighbouring tests stay in one, so that most fixtures are made once.
PARALLEL = -n logical --maxprocesses 4 --dist worksteal

.PHONY: demo test test-slow test-all test-quantised test-kernels test-floor quality bench bench-quick

demo: .venv/.demo
	.venv/bin/guilomo run recipes/demo.yaml --resume

test: .venv/.dev
	.venv/bin/python -m pytest $(PARALLEL) -m "not slow and not gpu"

test-slow: .venv/.dev
	.venv/bin/python -m pytest $(PARALLEL) -m "slow and not gpu"

test-all: test test-slow test-quantised test-kernels

test-quantised: .venv/.dev
	PYTHONPATH=.venv/quantised .venv/bin/python -m pytest tests/conformance/test_quantised_bases.py

# The Triton kernels, interpreted on the CPU; on a machine with a GPU the default tests run them natively.
test-kernels: .venv/.dev
	TRITON_INTERPRET=1 PYTHONPATH=.venv/kernels .venv/bin/python -m pytest $(PARALLEL) tests/layers/test_kernels.py

# The oldest PEFT that works, with all else as in constraints.txt.
test-floor: .venv-floor/.dev
	.venv-floor/bin/python -m pytest $(PARALLEL) tests/layers tests/tuner tests/conformance -m "not slow and not gpu"

# About an hour on two quiet cores; run again, it goes on where it was.
bench: .venv/.dev
	.venv/bin/python -m benchmarks.speed --output benchmarks/results/speed/here.json --resume
	.venv/bin/python -m benchmarks.speed.page

# Everything that is counted, and a few small timings, in two minutes.
bench-quick: .venv/.dev
	.venv/bin/python -m benchmarks.speed --quick

quality: .venv/.dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

.venv/.demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) --editable '.[demo]'
	touch $@

.venv/.dev: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) --editable '.[dev]'
	$(PIP) --no-deps --upgrade --target .venv/quantised bitsandbytes torchao
	$(PIP) --no-deps --upgrade --target .venv/kernels triton
	touch $@ .venv/.demo

.venv-floor/.dev: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-floor
	.venv-floor/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	.venv-floor/bin/python -m pip install --quiet peft==0.21.0
	touch $@
