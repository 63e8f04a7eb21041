# make demo   set up everything, train CEAT and its baseline on real data, judge both, write a report
# make test   set up everything and run all tests
# make check  lint, format and type checks
# make build  sdist and wheel into dist/

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The newest tested pair; ceat_fast itself runs on torch 2.10 and later.
TORCH ?= torch==2.14.1 torchvision==0.29.1
SOURCES := $(shell find csrc cmake tools -type f) CMakeLists.txt setup.py pyproject.toml

.PHONY: demo test check build bench clean

demo: $(VENV)/.installed
	$(BIN)/python examples/demo.py --out runs/demo

test: $(VENV)/.tested-with
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile

check: $(VENV)/.checked-with
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run --Werror $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
	$(BIN)/mypy

bench: $(VENV)/.installed
	$(BIN)/python bench/loss.py

build: $(VENV)/.checked-with
	$(BIN)/python -m build

clean:
	rm -rf build dist ceat_fast/_lib *.egg-info

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch is both what the native parts are built against and what runs them, so one copy serves without isolation.
$(VENV)/.installed: $(BIN)/python $(SOURCES)
	$(BIN)/python -m pip install --quiet $(TORCH) 'setuptools>=77' cmake ninja pybind11
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable '.[vision]'
	touch $@

$(VENV)/.tested-with: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable '.[vision,test,bench]'
	touch $@

$(VENV)/.checked-with: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable '.[dev]'
	touch $@
