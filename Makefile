# make run: install what is needed, find the induction heads, draw them.   make test: lint, type-check, test.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: run test browser clean

run: $(VENV)/run.done
	$(BIN)/python induction_head_detection.py $(ARGS)

# A worker per core, with one thread each: workers that all take every core wait for each other.
test: $(VENV)/dev.done browser
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

# The tests of report.html drive a real Chromium. Where it is missing and cannot be installed, they are skipped.
browser:
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null || { \
	  test "$$(id -u)" = 0 && command -v apt-get >/dev/null && export DEBIAN_FRONTEND=noninteractive && \
	  timeout 120 apt-get -qq update && \
	  timeout 300 apt-get -qq install -y --no-install-recommends chromium chromium-driver >/dev/null 2>&1; \
	} || echo "Chromium is not here and could not be installed: the tests that need it will be skipped"

$(VENV)/run.done: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

$(VENV)/dev.done: $(VENV)/run.done requirements-dev.txt
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@

clean:
	rm -rf $(VENV) outputs .pytest_cache .mypy_cache .ruff_cache .hypothesis
