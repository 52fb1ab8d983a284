# make demo   two-digit addition: teacher, student, baseline, report; make smollm2   a published teacher on text;
# make test   every test.
# Both set up .venv by themselves on first use; PYTHON chooses the interpreter (3.11 or newer).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CONSTRAINTS := $(shell $(PYTHON) -c "import sys; print('-c constraints.txt' if sys.version_info[:2] == (3, 11) else '')")

# Large pages for what XLA asks for anew in every step: less time on a CPU. Not for tests, which mostly compile.
demo smollm2: export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: demo smollm2 test lint parity parity-oldest parity-mlx clean

demo: $(VENV)/.core
	$(BIN)/python scripts/distill.py --config addition
	$(BIN)/python scripts/report.py --run runs/addition

# A published teacher on text: fetched by its hash, distilled beside cross-entropy, reported; 30 minutes on 2 cores.
smollm2: $(VENV)/.gguf
	$(BIN)/python scripts/distill.py --config smollm2_text
	$(BIN)/python scripts/report.py --run runs/smollm2_text

test: $(VENV)/.dev lint
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder tests
	$(BIN)/python -m pytest --nbmake notebooks -p no:cacheprovider

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Every family of models beside transformers on PyTorch; writes anew what tests/data holds where it differs.
parity: $(VENV)/.parity
	$(BIN)/python tests/parity/families.py
	$(BIN)/python tests/parity/encoders.py
	$(BIN)/python -m pytest -n 0 tests/parity/families.py tests/parity/encoders.py tests/parity/students.py -W default
	$(BIN)/python tests/parity/readers.py transformers $(BIN)/python
	$(BIN)/python tests/parity/precision.py

# What save writes, read by the oldest transformers whose files people still have, in an environment of its own.
parity-oldest: $(VENV)/.dev $(VENV)-oldest/.installed
	$(BIN)/python tests/parity/readers.py transformers $(VENV)-oldest/bin/python

# The same by mlx-lm, where it installs: on macOS, and on Linux with mlx's CPU build.
parity-mlx: $(VENV)/.dev
	@test -x $(VENV)-mlx/bin/python || $(PYTHON) -m venv $(VENV)-mlx
	@if $(VENV)-mlx/bin/python -m pip install -q "mlx[cpu]" mlx-lm; \
	then $(BIN)/python tests/parity/readers.py mlx $(VENV)-mlx/bin/python; \
	else echo "parity-mlx: skipped, mlx-lm does not install here"; fi

$(VENV)/.core: pyproject.toml constraints.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'distill needs Python 3.11 or newer; set PYTHON=')"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q $(CONSTRAINTS) -e .
	touch $@

$(VENV)/.gguf: $(VENV)/.core
	$(BIN)/python -m pip install -q $(CONSTRAINTS) -e ".[gguf]"
	touch $@

$(VENV)/.dev: $(VENV)/.core
	$(BIN)/python -m pip install -q $(CONSTRAINTS) -e ".[dev]"
	touch $@

$(VENV)-oldest/.installed:
	test -x $(VENV)-oldest/bin/python || $(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/python -m pip install -q "transformers==4.57.*" "torch==2.13.0" "numpy<3" safetensors
	touch $@

$(VENV)/.parity: $(VENV)/.dev
	$(BIN)/python -m pip install -q $(CONSTRAINTS) -e ".[dev,parity]"
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-oldest $(VENV)-mlx runs
