# Every target makes the environment first when it is missing. A torch that is already in $(VENV) is kept:
# install the build you want there before the first `make`.
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
EXTRAS ?= deepspeed,gguf,quant,report,test,text,vision
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.llmrec-installed

.PHONY: help install quickstart quickstart-smoke test test-all lint bench bench-gpu

help:
	@echo "make install           the environment in $(VENV)"
	@echo "make quickstart        a first run, end to end (downloads a small model and data set)"
	@echo "make quickstart-smoke  the same in seconds on drawn data, without a download"
	@echo "make test              fast tests    make test-all   all that need no accelerator"
	@echo "make lint              ruff and mypy make bench      speed and memory ratios"
	@echo "make bench-gpu         tokens per second, MFU and memory of tuners on one GPU"

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	if $(RUN) -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('torch') is None)"; then \
		grep -v '^torch==' constraints.txt > $(VENV)/constraints.txt; \
	else \
		cp constraints.txt $(VENV)/constraints.txt && $(RUN) -m pip install "$$(grep '^torch==' constraints.txt)"; \
	fi
	$(RUN) -m pip install -e ".[$(EXTRAS)]" -c $(VENV)/constraints.txt
	touch $@

quickstart: $(STAMP)
	$(RUN) -m llmrec quickstart

quickstart-smoke: $(STAMP)
	$(RUN) -m llmrec quickstart --smoke

test: $(STAMP)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -m "not slow and not gpu" -n $(WORKERS)

test-all: $(STAMP)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -m "not gpu" -n $(WORKERS)

lint: $(STAMP)
	$(RUN) -m ruff check .
	$(RUN) -m mypy

bench: $(STAMP)
	$(RUN) -m tests.benchmarks.run

bench-gpu: $(STAMP)
	$(RUN) -m tests.benchmarks.bench_gpu
