# make demo   from a fresh clone to images: environment, build, teacher, model with HASTE, samples, one HTML page
# make test   the same environment; style, types, documentation, every test
# make docs   the documentation as a site, in build/site
# Settings: PYTHON=python3.12  TORCH="torch==2.13.0"  MAX_JOBS=8  DEMO_ARGS="--interval 5 --order 2"  TEST_ARGS="-k taylor"
PYTHON    ?= python3
VENV      ?= .venv
TORCH     ?= torch==2.13.0
DEMO_ARGS ?=
TEST_ARGS ?=

BIN     := $(VENV)/bin
SOURCES := pyproject.toml setup.py CMakeLists.txt $(shell find csrc -type f)
.PHONY: demo test style types docs tests build clean

demo: build
	$(BIN)/haste demo $(DEMO_ARGS)

# Style first, for it takes a second; the others side by side, as types and documentation leave most cores idle.
test: build style
	$(MAKE) --no-print-directory -j3 types docs tests

style: build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .

types: build
	$(BIN)/mypy

# One worker per core, so one thread each. A worker that is done takes tests of another.
tests: build
	OMP_NUM_THREADS=1 $(BIN)/pytest -n logical --dist worksteal $(TEST_ARGS)

docs: build
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

build: $(VENV)/.built

# torch first: the package builds against the torch that is there and never brings another.
$(VENV)/.torch:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install "$(TORCH)"
	$(BIN)/pip install -q "setuptools>=77" "cmake>=3.25" ninja "pybind11>=2.13"
	touch $@

$(VENV)/.built: $(VENV)/.torch $(SOURCES)
	$(BIN)/pip install -q --no-build-isolation -e ".[dev]"
	find build -name '*.cu.o' | xargs -r $(BIN)/python tools/kernel_resources table
	touch $@

clean:
	rm -rf build dist haste_ext/_C.*.so $(VENV)/.built
