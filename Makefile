PYTHON ?= python3
PIP = .venv/bin/python -m pip install --quiet --constraint constraints.txt

.PHONY: demo test test-all quality

demo: .venv/.demo
	.venv/bin/guilomo run recipes/demo.yaml --resume

test: .venv/.dev
	.venv/bin/python -m pytest -m "not slow and not gpu"

test-all: .venv/.dev
	.venv/bin/python -m pytest -m "not gpu"

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
	touch $@ .venv/.demo
