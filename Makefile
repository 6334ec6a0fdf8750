# Each target makes .venv first if it is missing or stale.
PYTHON ?= python3.11
WORKDIR ?= work/digits
export JAX_PLATFORMS ?= cpu

.PHONY: demo test lint beam bench

.venv/runtime: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet -r requirements.txt
	touch $@

# mistral-common carries the real Mistral v0.1 tokenizer file; only that file is
# wanted, and its dependencies would move numpy, so it comes without them.
.venv/test: requirements-test.txt requirements-tpu.txt .venv/runtime
	.venv/bin/pip install --quiet -r requirements-test.txt
	.venv/bin/pip install --quiet --no-deps mistral-common==1.0.0
	touch $@

demo: .venv/runtime
	.venv/bin/python -m launch.demo --workdir $(WORKDIR)

test: .venv/test
	.venv/bin/python -m pytest

lint: .venv/test
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

# Apache Beam needs older protobuf, pyarrow and pillow than training.
.venv-beam/ready: requirements-beam.txt
	$(PYTHON) -m venv .venv-beam
	.venv-beam/bin/pip install --quiet -r requirements-beam.txt
	touch $@

beam: .venv-beam/ready
	.venv-beam/bin/python -m pytest tests/beam

bench: .venv/test
	.venv/bin/python -m benchmarks.vs_transformers
	.venv/bin/python -m benchmarks.packing
	.venv/bin/python -m benchmarks.pipeline
	.venv/bin/python -m benchmarks.streaming
	.venv/bin/python -m benchmarks.param_transforms
