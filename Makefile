# Everything a fresh clone needs: each target makes what it depends on.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test check clean

setup: .venv/.ready

.venv/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" \
		|| { echo "mambazoo needs Python 3.11 or newer; name one with make PYTHON=..."; exit 1; }
	@echo "making .venv with the tested set of packages (a few minutes)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev,samples]"
	@touch $@

demo: setup
	@$(BIN)/mambazoo fit language/demo
	@echo
	@$(BIN)/mambazoo generate runs/language/demo --prompt "def " --max-new-tokens 300
	@echo
	@$(BIN)/mambazoo fit genomics/demo
	@$(BIN)/mambazoo baseline genomics/demo
	@$(BIN)/mambazoo generate runs/genomics/demo --prompt ATGAAACGC --max-new-tokens 120 --temperature 1
	@echo
	@$(BIN)/mambazoo fit audio/demo
	@$(BIN)/mambazoo baseline audio/demo
	@$(BIN)/mambazoo generate runs/audio/demo --seconds 3 --output runs/audio/demo/heard

# the Triton kernels are interpreted beside the rest, on another core
test: setup
	@log=$$(mktemp); TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/kernels -k triton >$$log 2>&1 & other=$$!; \
		trap "kill $$other" INT TERM; $(BIN)/python -m pytest; one=$$?; \
		wait $$other; two=$$?; cat $$log; rm $$log; exit $$((one || two))

check: setup
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy

clean:
	rm -rf .venv dist
