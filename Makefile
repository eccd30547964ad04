PYTHON ?= python3
PIP = .venv/bin/python -m pip install --quiet --constraint constraints.txt

.PHONY: demo test test-all test-quantised test-kernels test-floor quality bench bench-quick

demo: .venv/.demo
	.venv/bin/guilomo run recipes/demo.yaml --resume

test: .venv/.dev
	.venv/bin/python -m pytest -m "not slow and not gpu"

test-all: .venv/.dev test-quantised test-kernels
	.venv/bin/python -m pytest -m "not gpu"

test-quantised: .venv/.dev
	PYTHONPATH=.venv/quantised .venv/bin/python -m pytest tests/conformance/test_quantised_bases.py

# The Triton kernels, interpreted on the CPU; on a machine with a GPU the default tests run them natively.
test-kernels: .venv/.dev
	TRITON_INTERPRET=1 PYTHONPATH=.venv/kernels .venv/bin/python -m pytest tests/layers/test_kernels.py

# The oldest PEFT that works, with all else as in constraints.txt.
test-floor: .venv-floor/.dev
	.venv-floor/bin/python -m pytest tests/layers tests/tuner tests/conformance -m "not slow and not gpu"

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
