# make demo   MAML against MAML++ on few-shot images; make help lists what it takes
# make test   everything that has to pass; make quick: what to run while working; make coverage
# make test-deep   the property tests on many more random models
# make docs   the documentation, in docs/_build
# make ablation DATA=...   the paper's ablation, resumable
# make bench   speed and memory against MAML, into benchmarks/README.md

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check -q

flag = $(if $($(1)),--$(2) "$($(1))")
switch = $(if $($(1)),--$(2))
DEMO_FLAGS = $(call flag,DATA,data) $(call flag,SIZE,size) $(call switch,FLIP,flip) \
	$(call switch,CACHE,cache) $(call flag,BACKEND,backend) $(call flag,MINUTES,minutes) \
	$(call flag,WAYS,ways) $(call flag,SHOTS,shots) $(call flag,STEPS,steps) \
	$(call flag,FILTERS,filters) $(call flag,SEED,seed) $(call flag,OUT,out)

ABLATION_FLAGS = $(call flag,DATA,data) $(call flag,SIZE,size) $(call switch,FLIP,flip) \
	$(call switch,CACHE,cache) $(call flag,PRESET,preset) $(call flag,ENSEMBLE,ensemble) \
	$(call flag,BACKEND,backend) $(call flag,MINUTES,minutes) $(call flag,WAYS,ways) \
	$(call flag,SHOTS,shots) $(call flag,STEPS,steps) $(call flag,FILTERS,filters) \
	$(call flag,OUT,out)

QUICK = $(addprefix tests/,norm lslr schedules fast_kernels integrations test_steps.py \
	test_errors.py test_check_setup.py test_house.py test_checkpoint.py test_first_order.py)

.PHONY: help demo test coverage quick lint test-deep docs ablation bench bench-pytest clean
.DELETE_ON_ERROR:

help:
	@echo 'make demo   trains MAML and MAML++ side by side and writes demo/ (about three minutes)'
	@echo '            DATA=path         omniglot28.npz, a folder with the PNGs of Omniglot, or your own'
	@echo '                              images: train/ val/ test/ with a folder for each class, class'
	@echo '                              folders alone, or .npz files (ARGS=--help says which)'
	@echo '            SIZE=84 FLIP=1 CACHE=1   of your images: one size, mirrored by chance, kept decoded'
	@echo '            BACKEND=name      higher, torchopt or torch_func'
	@echo '            MINUTES= WAYS= SHOTS= STEPS= FILTERS= SEED= OUT='
	@echo '            ARGS="..."        further flags of docs/examples/demo.py (ARGS=--help)'
	@echo 'make test   ruff, mypy, the direction of imports, tests and doctests; ARGS="..." goes to'
	@echo '            pytest'
	@echo 'make coverage   the same, and what no test reaches; refuses less than setup.cfg says'
	@echo 'make quick  the same with the unit tests alone, under a minute, while you work'
	@echo 'make test-deep   the property tests alone, with EXAMPLES=1000 random cases each; a failure is'
	@echo '            kept in .hypothesis/ and tried first the next time'
	@echo 'make docs   writes docs/_build/index.html; warnings are errors'
	@echo 'make ablation DATA=path   MAML, each part of MAML++ alone, all together; resumable, results in'
	@echo '            ablation/; DATA=, SIZE=, FLIP= and CACHE= as above'
	@echo '            PRESET=name       paper-mini-imagenet-5way-1shot, cifar-fs-5way-1shot, ...'
	@echo '            ENSEMBLE=5        the five best models in validation together, as the paper has it'
	@echo '            ARGS="..."        further flags of benchmarks/ablation.py (ARGS=--help)'
	@echo 'make bench  speed and memory against MAML, into benchmarks/README.md (some forty minutes)'
	@echo '            REFERENCE=path    a checkout of AntreasAntoniou/HowToTrainYourMAMLPytorch'
	@echo '            ARGS="..."        further flags of benchmarks/compare.py (ARGS=--help)'
	@echo 'make bench-pytest   every loop, network and order with pytest-benchmark; ARGS goes to pytest'
	@echo 'make clean  removes the environment and what was built'
	@echo 'Each makes its own environment in $(VENV), with the versions of constraints.txt.'

demo: $(VENV)/.demo
	$(BIN)/python docs/examples/demo.py $(DEMO_FLAGS) $(ARGS)

ablation: $(VENV)/.demo
	$(BIN)/python benchmarks/ablation.py $(ABLATION_FLAGS) $(ARGS)

bench: $(VENV)/.bench
	$(BIN)/python benchmarks/compare.py $(call flag,REFERENCE,reference) $(ARGS)

bench-pytest: $(VENV)/.bench
	$(BIN)/python -m pytest $(or $(ARGS),$(wildcard benchmarks/test_*.py))

# A process for each core, each file by one of them; more threads would only wait for each other.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

test: lint
	$(PYTEST) $(ARGS)

coverage: lint
	$(PYTEST) --cov $(ARGS)

quick: lint
	$(PYTEST) -q $(QUICK) $(ARGS)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache --no-logo

test-deep: $(VENV)/.test
	EXAMPLES=$(or $(EXAMPLES),1000) $(BIN)/python -m pytest tests/test_properties.py \
		tests/test_forwards.py --hypothesis-profile=deep --hypothesis-show-statistics $(ARGS)

docs: $(VENV)/.docs
	$(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build

clean:
	rm -rf $(VENV) build dist docs/_build docs/auto_gallery *.egg-info

# A stamp for each extra, so that a second run installs nothing.
$(VENV)/.demo: setup.cfg constraints.txt | $(BIN)/python
	$(PIP) install -c constraints.txt -e '.[examples]'
	@touch $@

$(VENV)/.test: setup.cfg constraints.txt | $(BIN)/python
	$(PIP) install -c constraints.txt -e '.[test]'
	@touch $@

$(VENV)/.bench: setup.cfg constraints.txt | $(BIN)/python
	$(PIP) install -c constraints.txt -e '.[bench]'
	@touch $@

$(VENV)/.docs: setup.cfg constraints.txt | $(BIN)/python
	$(PIP) install -c constraints.txt -e '.[docs]'
	@touch $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
