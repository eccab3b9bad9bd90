# Everything runs in $(ENV), which `make env` builds from the pinned requirements and rebuilds when they change.
#
#   ENV          where the environment lives
#   DOCS_ENV     where that of `make docs` lives: MkDocs alone, pinned in docs/requirements.txt
#   PYTHON       the interpreter that it is made from, 3.10 to 3.13
#   TORCH_INDEX  another package index for torch and torchvision, for instance PyTorch's own index of CPU builds
#   STACK        which OpenMMLab: openmmlab, its own last releases, or onedl, the maintained forks
#   ONEDL_ENV    where the environment of the forks lives: `make test-onedl`
#
# The environment remembers its PYTHON, TORCH_INDEX and STACK: name them once.
ENV ?= .venv
DOCS_ENV ?= .venv-docs
ONEDL_ENV ?= .venv-onedl
TEXT := README.md CHANGELOG.md CONTRIBUTING.md CITATION.cff docs .github
CODE := mmvig kernels configs tools tests benchmarks setup.py

PY := $(ENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check install
SUPPORTED := import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))
ifeq ($(origin PYTHON), undefined)
  # 3.11 first: the one that everything is tested with
  PYTHON := $(shell cat $(ENV)/python 2>/dev/null || for python in python3.11 python3.12 python3.13 python3.10 python3 python; \
    do $$python -c '$(SUPPORTED)' 2>/dev/null && echo $$python && break; done)
endif
ifeq ($(origin TORCH_INDEX), undefined)
  TORCH_INDEX := $(shell cat $(ENV)/torch-index 2>/dev/null)
endif
ifeq ($(origin STACK), undefined)
  STACK := $(or $(shell cat $(ENV)/stack 2>/dev/null),openmmlab)
endif
# Not export.txt: it adds to an environment, and rebuilding would take it away.
LISTS := $(patsubst %,requirements/%.txt,torch cuda runtime dev $(STACK))
KEY := $(shell { cat $(LISTS); echo '$(PYTHON) $(TORCH_INDEX)'; } | sha256sum | cut -c 1-16)

# Idle OpenMP threads soon sleep: by default they spin for long, on the cores that the data loaders need where cores are few.
# (To sleep at once, OMP_WAIT_POLICY=PASSIVE, made training half as slow again.)
export GOMP_SPINCOUNT ?= 20000

# `$(call say,words)` prints the time since make began, then the words.
ifndef BEGAN
  export BEGAN := $(shell date +%s)
endif
say = @t=$$(( $$(date +%s) - $(BEGAN) )); printf '\n[%d:%02d] %s\n' $$(( t / 60 )) $$(( t % 60 )) '$(1)'

.PHONY: help env export-env quickstart quickstart-short test test-all test-gpu test-onedl lint format docs clean python FORCE
.DELETE_ON_ERROR:

help:
	@echo 'make quickstart   from a fresh clone to a trained detector, its AP and pictures of what it sees'
	@echo 'make test         the fast tests'
	@echo 'make test-all     all tests'
	@echo 'make test-gpu     the tests that need a GPU, and the kernels under compute-sanitizer where it is installed'
	@echo 'make test-onedl   the fast tests on the maintained forks of OpenMMLab, in an environment of their own'
	@echo 'make lint         style, spelling and house rules; make format repairs the style'
	@echo 'make docs         the documents as a web site, in build/docs/site'
	@echo 'make env          only the environment, in $(ENV); make export-env adds what ONNX files need (120 MB)'
	@echo 'make clean        removes the environment and what was built; data/ and work_dirs/ stay'
	@echo
	@echo 'The environment takes about 5 GB, most of it the CUDA libraries that torch brings. Smaller, without them:'
	@echo '  make quickstart TORCH_INDEX=https://download.pytorch.org/whl/cpu'

env: $(ENV)/complete-$(KEY) $(ENV)/installed

$(ENV)/complete-$(KEY):
	@$(if $(PYTHON),$(PYTHON),false) -c '$(SUPPORTED)' || \
	  { echo '$(or $(PYTHON:%=PYTHON=% is),There is) no Python 3.10 to 3.13. Name one: make env PYTHON=/path/to/python3.11'; exit 1; }
	@[ ! -e $(ENV) ] || [ -e $(ENV)/pyvenv.cfg ] || \
	  { echo 'ENV=$(ENV) is there and is no virtual environment. It would be emptied: name another folder.'; exit 1; }
	$(call say,Making the environment $(ENV) from $(PYTHON))
	@$(PYTHON) -m venv --clear $(ENV) || \
	  { echo 'PYTHON=$(PYTHON) cannot make environments: see above, or make env PYTHON=/path/to/python3.11'; exit 1; }
ifdef TORCH_INDEX
	$(call say,Installing PyTorch from $(TORCH_INDEX))
	@$(PIP) --index-url $(TORCH_INDEX) -r requirements/torch.txt
else
	$(call say,Installing PyTorch with its CUDA libraries: 5 GB on the disk. `make help` names a smaller way.)
	@$(PIP) --no-deps -r requirements/torch.txt -r requirements/cuda.txt
endif
	$(call say,Installing OpenMMLab and what it needs: 70 packages and 250 MB to download)
	@$(PIP) --no-deps --quiet -r requirements/runtime.txt -r requirements/dev.txt -r requirements/$(STACK).txt
	@echo '$(STACK)' > $(ENV)/stack
	@echo '$(PYTHON)' > $(ENV)/python
	@echo '$(TORCH_INDEX)' > $(ENV)/torch-index
	@touch $@

# Clones may share an environment, as .ci/run does: mmvig is linked to the clone that uses it now.
$(ENV)/installed: $(ENV)/complete-$(KEY) setup.py pyproject.toml mmvig/__init__.py \
    $(if $(filter $(CURDIR),$(shell cat $(ENV)/installed 2>/dev/null)),,FORCE)
	$(call say,Installing mmvig as a link to this folder)
	@$(PIP) --no-deps --quiet --no-build-isolation --editable .
	@echo '$(CURDIR)' > $@

export-env: env
	@$(PIP) --no-deps --quiet -r requirements/export.txt

quickstart: env
	@$(PY) tools/quickstart.py

# The same steps on a handful of scenes: everything runs, nothing is learned.
quickstart-short: env
	@$(PY) tools/quickstart.py --short

test: env
	$(PY) -m pytest -n 2 -m 'not slow'

test-all: env
	$(PY) -m pytest -n 2

# Several processes on one GPU: it is the oracle's recurrence, token by token, that takes long. compute-sanitizer looks at
# our kernels, whose names are not mangled as those of C++ are, and at memory of which each tensor has a piece of its own.
test-gpu: env
	@$(PY) -c "import torch, sys; sys.exit(not torch.cuda.is_available() and 'torch sees no GPU: see python tools/doctor.py')"
	$(PY) -m pytest -n 6 -m gpu
	@if command -v compute-sanitizer > /dev/null; then set -x; \
	  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 1 --kernel-name-exclude kns=_Z \
	    $(PY) -m pytest -v -m gpu tests/kernels/gpu -k 'gates and bf16 or strides or lengths_of_long_chunks'; \
	  else echo 'compute-sanitizer is not installed: left out'; fi

# Beside $(ENV), and of the same Python and torch.
test-onedl:
	@$(MAKE) --no-print-directory test STACK=onedl ENV='$(ONEDL_ENV)' PYTHON='$(PYTHON)' TORCH_INDEX='$(TORCH_INDEX)'

lint: env
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m codespell_lib $(CODE) requirements .ci Makefile $(TEXT)
	! grep -rnE --include='*.py' 'ipdb|make_block_ptr|sys\.path(\.(append|extend|insert)| *\+?=|\[)' $(CODE)
	! grep -rnE --exclude-dir=__pycache__ '(^|[^[:alnum:]_.])/(home|root|work|Users)/' $(CODE) requirements $(TEXT)

format: env
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

# Every page where it is in the repository, with what it points to, so that links hold there and on the site.
docs: $(DOCS_ENV)/complete
	@rm -rf build/docs && mkdir -p build/docs/source
	@cp --parents -R README.md CHANGELOG.md CONTRIBUTING.md CITATION.cff LICENSE Makefile docs configs \
	  $$(find kernels tools mmvig benchmarks -name '*.md' -o -name '*.csv' -o -name '*.py') build/docs/source
	@$(DOCS_ENV)/bin/mkdocs build --strict --quiet
	@echo 'build/docs/site/index.html'

$(DOCS_ENV)/complete: docs/requirements.txt
	@$(PYTHON) -m venv --clear $(DOCS_ENV)
	@$(DOCS_ENV)/bin/python -m pip --disable-pip-version-check install --no-deps --quiet -r $<
	@touch $@

clean:
	rm -rf .venv .venv-docs .venv-onedl build dist mmvig.egg-info mmvig/.mim .pytest_cache .ruff_cache .hypothesis
	find $(CODE) -name __pycache__ -prune -exec rm -rf {} +

python:
	@echo '$(PYTHON)'
