# A fresh machine needs Python >= 3.10, pip and make: `make demo` and `make test` do the rest, inside .venv.
# `make help` lists every command; `rm -rf .venv` starts over. ARGS reaches the command: make test ARGS="-k rope".

PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
ARGS   ?=

.DEFAULT_GOAL := help
.PHONY: help demo test lint format docs bench package clean

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST)

demo: $(VENV)/.installed-demo  ## a real model answers questions over a real corpus, with and without caches
	@$(VENV)/bin/kvcag demo $(ARGS)

test: $(VENV)/.installed-dev  ## the whole test suite, the real model included
	@$(PY) -m kvcag.demo.model
	$(PY) -m pytest -n auto --dist loadfile $(ARGS)

lint: $(VENV)/.installed-dev  ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(VENV)/.installed-dev  ## let ruff mend what it can
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

docs: $(VENV)/.installed-dev  ## the documentation, into site/
	$(PY) -m mkdocs build --strict

bench: $(VENV)/.installed-dev  ## time to first token, cached and not, in one run
	@$(PY) -m kvcag.demo.model
	$(PY) benchmarks/ttft.py $(ARGS)

# The wheel is unpacked alone and imported from there: a file left out of it, or imported from the checkout, shows.
package: $(VENV)/.installed-dev  ## build the sdist and the wheel into dist/, and import from the wheel
	rm -rf dist
	$(PY) -m build --quiet --outdir dist .
	$(PY) -m pip install --quiet --no-deps --target dist/unpacked dist/*.whl
	@cd dist/unpacked && PYTHONPATH=. ../../$(PY) -c "import kvcag, pathlib; \
	  home = pathlib.Path(kvcag.__file__).parent; assert home.parent == pathlib.Path.cwd(), home; \
	  assert (home / 'py.typed').is_file(); print('the wheel imports: kvcag', kvcag.__version__)"
	rm -rf dist/unpacked

clean:  ## remove what was built; .venv stays
	rm -rf build dist site .mypy_cache .pytest_cache .ruff_cache .hypothesis

# --- set-up -----------------------------------------------------------------------------------------------------

# A .venv made by hand is taken as it is. --seed: pip too, which installs torch below and fetches the model.
$(PY):
	@echo "==> making a virtual environment in $(VENV)"
	@if command -v uv >/dev/null; then uv venv --quiet --seed --allow-existing --python '>=3.10' $(VENV); \
	 else $(PYTHON) -m venv $(VENV); fi

# One stamp an extra, renewed when the requirements change. torch goes first and by pip: pip's own configuration says
# which build this machine gets (uv does not read it), and with torch in place neither installer fetches another one.
$(VENV)/.installed-%: pyproject.toml constraints.txt | $(PY)
	@$(PY) -c "import sys; sys.exit(sys.version_info < (3, 10))" || \
	  { echo "$(PY) is older than Python 3.10: remove $(VENV), then run make PYTHON=python3.12"; exit 1; }
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PY) -m ensurepip
	@echo "==> installing kvcag[$*] into $(VENV): a few minutes the first time, torch is large"
	@$(PY) -m pip install --disable-pip-version-check --constraint constraints.txt torch
	@if command -v uv >/dev/null; \
	 then uv pip install --python $(PY) --constraint constraints.txt --editable '.[$*]'; \
	 else $(PY) -m pip install --disable-pip-version-check --constraint constraints.txt --editable '.[$*]'; fi
	@touch $@
