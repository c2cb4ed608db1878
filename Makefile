# make demo: from nothing to pictures.  make test: the tests.  VENV=dir reuses an environment.
VENV ?= .venv
PYTHON ?= python3
RUN = $(VENV)/bin/python

.PHONY: demo test test-long install install-dev

demo: install-dev
	$(RUN) notebooks/shapes.py --out data/shapes --count 30000
	$(RUN) train.py --data data/shapes --out out/demo
	$(RUN) sample.py --run out/demo --out out/demo/samples.png \
		"a red circle left of a blue square" "three green circles" "a purple triangle" \
		"a yellow square and an orange circle" "a circle above a triangle" "two blue squares" \
		"a red triangle" "a purple circle above a red square"
	$(RUN) tests/shapeseval.py --run out/demo

test: install-dev
	$(RUN) -m pytest -q tests

test-long: install-dev
	$(RUN) -m pytest -q tests --long

install: $(VENV)/installed
install-dev: $(VENV)/installed-dev

$(VENV)/installed: requirements.txt
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -q -r requirements.txt
	touch $@

$(VENV)/installed-dev: requirements-dev.txt $(VENV)/installed
	$(RUN) -m pip install -q -r requirements-dev.txt
	touch $@
