# make course: read it executed.  make test: all checks.  make lab: JupyterLab.  make notebooks: re-execute in place.
# make screenshots: Netron's, for chapter 13.  make bench: measure, on a quiet machine.  Each makes .venv from the pins if it is not there.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
NOTEBOOKS := $(sort $(wildcard notebooks/*.ipynb))
COURSE := exported/course
NBCONVERT := $(BIN)/jupyter nbconvert --log-level=ERROR
# glibc keeps freed memory for the next tensor:
REUSE := MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=20000000000

.PHONY: course test browser lab notebooks screenshots bench

.venv/.installed: requirements.txt pyproject.toml
	@echo "making .venv from requirements.txt: this takes a few minutes, once"
	@test -d .venv || $(PYTHON) -c "import sys; sys.version_info < (3, 11) and sys.exit('needs Python 3.11 or newer: make PYTHON=...')"
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

course: .venv/.installed
	@echo "executing $(words $(NOTEBOOKS)) chapters, then building the site in $(COURSE)/: five to ten minutes"
	@rm -rf $(COURSE) && mkdir -p $(COURSE)/source
	@for notebook in $(NOTEBOOKS); do \
		start=$$(date +%s); printf '%s' "$$notebook"; \
		$(NBCONVERT) --execute --to notebook --output-dir $(COURSE)/source $$notebook 2>$(COURSE)/log || \
			{ cat $(COURSE)/log; exit 1; }; \
		echo "  $$(($$(date +%s) - start)) s"; \
	done
	@$(BIN)/python -m sphinx -q -b html -d $(COURSE)/doctrees -c notebooks $(COURSE)/source $(COURSE)
	@rm -rf $(COURSE)/log $(COURSE)/../jupyter_execute
	@echo "The executed course: open $(COURSE)/index.html in a browser"

test: .venv/.installed browser
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(REUSE) OMP_NUM_THREADS=1 $(BIN)/pytest --nbmake --disable-plugin-autoload -p nbmake -p xdist --numprocesses=logical --maxprocesses=4 --maxschedchunk=1

# Some tests open the site and graphs in a real browser. As root on Debian it is installed; else only said.
browser:
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null || \
		{ test "$$(id -u)" = 0 && command -v apt-get >/dev/null && \
		(apt-get update -qq; apt-get install -y -qq --no-install-recommends chromium) >/dev/null 2>&1; } || \
		echo "no Chromium: tests that need a browser will be skipped; on Debian or Ubuntu: apt-get install chromium"

lab: .venv/.installed
	$(BIN)/jupyter lab --notebook-dir=notebooks

notebooks: .venv/.installed
	$(NBCONVERT) --execute --inplace --ExecutePreprocessor.record_timing=False $(NOTEBOOKS)

screenshots: .venv/.installed browser
	FLUXLAB_SCREENSHOTS=exported $(BIN)/pytest tests/onnx/test_netron.py

bench: .venv/.installed
	$(REUSE) $(BIN)/python -m tests.benchmarks $(ARGS)
