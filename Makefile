# Two commands on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q

.PHONY: demo test lint wheel clean

demo: $(VENV)/.installed
	$(BIN)/compress prune models/digits_resnet20.pt --method halo --target 0.05 --device cpu

test: $(VENV)/.tested
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile -m "not slow and not gpu and not alone"
	$(BIN)/python -m pytest -m "alone and not slow and not gpu"

lint: $(VENV)/.tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict -p compress

# The wheel, installed in a clean place away from the checkout, and run there.
wheel: $(VENV)/.tested
	PYTHON=$(PYTHON) BIN=$(BIN) sh tests/wheel.sh

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt torch==2.13.0
	$(PIP) install -c constraints.txt -e .
	touch $@

# timm and torchvision ask for a torch build of their own; without their dependencies they go with the one at hand.
# transformers needs tokenizers and regex beside what is there already.
$(VENV)/.tested: $(VENV)/.installed
	$(PIP) install -c constraints.txt -e ".[test,tracking,openvino]"
	$(PIP) install -c constraints.txt --no-deps timm torchvision transformers tokenizers regex
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
