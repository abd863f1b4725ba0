# make demo | pictures | test | test-app | common-tests | quality | bench | clean
#
# Every target first creates the environment .venv with the tested versions. After that only common-tests and test-app
# need a network, once: they download transformers' own tests, and Gradio and Playwright, from the package index.
#   make demo IMAGE=a.jpg CATEGORIES="cat, grass"    your own image and words
#   make test PYTHON=python3.12                      another Python (3.11 or newer)
#   make test CONSTRAINTS=                           other versions, if a tested one has no build for your platform
# On Linux PyPI's torch is the CUDA build. A smaller one for the CPU alone:
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make demo

PYTHON ?= python3
CONSTRAINTS ?= constraints.txt

BIN := .venv/bin
STAMP := .venv/installed
COMMON_STAMP := .venv/installed-common-tests
APP_STAMP := .venv/installed-test-app
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(addprefix -c ,$(CONSTRAINTS))

# The shell reads these from the environment, so quotes and spaces in them arrive as they were typed.
export IMAGE CATEGORIES
export HF_HUB_OFFLINE = 1
# Waiting threads sleep, so that other programs on the machine do not slow torch down many times.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo pictures test test-app common-tests quality bench clean

demo: $(STAMP)
	@$(BIN)/python scripts/demo.py $${IMAGE:+--image "$$IMAGE"} $${CATEGORIES:+--categories "$$CATEGORIES"}

# The picture of the README and of the embedded model's card: images, before and after tuning.
pictures: $(STAMP)
	@$(BIN)/python scripts/demo.py --picture ifseg_hf/nano/card_image.jpg

# One thread per process: torch is slower with more threads than cores.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --numprocesses auto --maxprocesses 4 --dist loadfile

# The page `ifseg app` in Chromium (apt-get install chromium), without which the tests of the browser are skipped.
test-app: $(APP_STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -rs tests/app

# The tests of models, processors and pipelines in transformers' source distribution, run on this project's classes.
common-tests: $(COMMON_STAMP)
	source=$$($(BIN)/python tests/common/upstream.py) && TRANSFORMERS_SOURCE="$$source" OMP_NUM_THREADS=1 \
	  $(BIN)/python -m pytest -q tests/common -o verbosity_subtests=0 \
	  --numprocesses auto --maxprocesses 4 --dist loadscope

quality: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/python tests/benchmarks/speed.py
	$(BIN)/python -m pytest -q tests/benchmarks --benchmark-enable --benchmark-only

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# --no-build-isolation builds with the setuptools of .venv, which saves pip a second download.
$(STAMP): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is older than 3.11, which the versions in constraints.txt need: make PYTHON=python3.12 ..."; exit 1; }
	@echo "Making the environment .venv (a few minutes, once) ..."
	@$(PYTHON) -m venv .venv
	@$(PIP_INSTALL) setuptools wheel
	@$(PIP_INSTALL) --no-build-isolation -e ".[dev]"
	@touch $@

$(APP_STAMP): $(STAMP)
	@$(PIP_INSTALL) --no-build-isolation -e ".[test-app]"
	@touch $@

$(COMMON_STAMP): $(STAMP)
	@$(PIP_INSTALL) --no-build-isolation -e ".[common-tests]"
	@touch $@
