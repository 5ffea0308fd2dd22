# The commands that people and CI share. `make demo` and `make test` set everything up by themselves.
.PHONY: setup check test demo docs bench chaos fuzz gpu-test gpu-bench proto
SHELL := /bin/bash
export MKL_CBWR := AVX2,STRICT
BIN := .venv/bin
MODEL ?= smollm2
DEMO_smollm2 := deploy/topologies/cpu-demo.yaml
DEMO_tiny-moe := deploy/topologies/cpu-tiny-moe.yaml --text $$'ROMEO.\nWhat'

setup:
	@sha256sum --quiet --check .venv/setup.sha256 >/dev/null 2>&1 || tools/setup.sh

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest -q tests/test_imports.py

# What only computes runs on all cores, then what mostly waits, two at a time; what starts clusters or watches the clock
# has the machine for itself.
COMPUTING := $(addprefix tests/,decode_worker engine fuzz kernels models prefill_worker tiny_moe) \
	tests/test_engine_pair.py tests/test_sameness.py tests/test_tensor_parallel.py
WAITING := $(addprefix tests/,client cluster router)

test: setup
	$(BIN)/pytest -m "not gpu" -n auto --dist worksteal $(COMPUTING)
	$(BIN)/pytest -m "not gpu" -n 2 $(WAITING)
	$(BIN)/pytest -m "not gpu" $(addprefix --ignore=,$(COMPUTING) $(WAITING))

fuzz: setup # the fuzzers of tests/fuzz with new seeds, for half an hour
	HYPOTHESIS_PROFILE=long $(BIN)/pytest --timeout 0 tests/fuzz

demo: setup # or: make demo MODEL=tiny-moe
	$(BIN)/splitserve demo $(or $(DEMO_$(MODEL)),$(error MODEL is smollm2 or tiny-moe, not $(MODEL)))

docs: setup # the docs site, into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: setup
	$(BIN)/python -m benchmarks

chaos: setup # kills, freezes and cuts off workers of a real CPU cluster; or: make chaos REQUESTS=96
	$(BIN)/python -m benchmarks.chaos --requests $(or $(REQUESTS),800)

gpu-test: # on a GPU host, from a bare checkout: other tests import what only CPU tests need
	PYTHONPATH=.:$(PYTHONPATH) python3 -m pytest -m gpu $$(grep -rl --include="*.py" mark.gpu tests)

gpu-bench:
	PYTHONPATH=.:$(PYTHONPATH) python3 -m benchmarks.gpu

# Stubs are made with an old generator, so that old and new protobuf runtimes accept them.
proto:
	python3 -m venv .proto-venv
	.proto-venv/bin/pip install -q grpcio-tools==1.72.2 mypy-protobuf==3.7.0 "setuptools<81"
	PATH=$(CURDIR)/.proto-venv/bin:$$PATH python -m grpc_tools.protoc -I . --python_out=. --grpc_python_out=. \
		--mypy_out=. --mypy_grpc_out=. splitserve/router/v1/splitserve.proto
