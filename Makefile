# make demo               train, export, quantize, verify, benchmark and report on real images; see out/report.html
# make test               the whole test suite on TensorFlow, JAX and PyTorch, one after the other; what needs no backend
#                         (marked "once" in the tests) on the first of them, which compiles nothing, with the
#                         coverage and its floor
#                         the last of them runs on the built wheel, with the source folders absent
# make test BACKEND=jax   on one of them
# make lint               style, types and layering alone, which are tests of the suite, too
# make docs               the documentation alone
# make bench              our files against what else could run these models, in environments made in .cache/bench, and
#                         training against timm and keras-hub; rewrites benchmarks/RESULTS.md and RESULTS.html
# All install what they need into .venv, once, with the exact versions of constraints.txt.

BACKENDS := torch jax tensorflow
BACKEND ?= $(BACKENDS)
WHEEL_AFTER := jax
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
unexport PYTHONDONTWRITEBYTECODE # where it is set, each of a hundred processes would compile the package and the tests anew

.PHONY: demo test lint docs bench clean

demo: .venv/.demo
	$(BIN)/keras-vits demo --backend jax

test: .venv/.test
	@mkdir -p out; set --; tests="-m slipcover --source keras_vits,edge --json --out out/coverage.json -m pytest"; \
	for backend in $(BACKEND); do \
		echo "== $$backend"; \
		KERAS_BACKEND=$$backend $(BIN)/python $$tests -n 2 --dist worksteal "$$@" || exit 1; \
		case "$$tests" in *slipcover*) $(BIN)/python tools/coverage_floor.py || exit 1;; esac; \
		set -- -m "not once"; tests="-m pytest"; \
		case $$backend in $(WHEEL_AFTER)) tests=tools/on_wheel.py; echo "== what follows runs on the built wheel, without the source";; esac; \
	done

lint: .venv/.test
	$(BIN)/python -m pytest -n 2 tests/test_lint.py

docs: .venv/.test
	$(BIN)/python -m pytest tests/test_docs.py
	@echo "The site is in out/site/index.html"

bench: .venv/.test
	$(BIN)/python benchmarks/run.py
	$(BIN)/python benchmarks/train.py
	$(BIN)/python benchmarks/publish.py

.venv/.demo .venv/.test: .venv/.%: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$*]"
	@touch $@

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11, 3.12 or 3.13 is needed, and none was found: TensorFlow and coremltools have" \
		"no packages for newer ones. Install one of them, or say make PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv .venv

clean:
	rm -rf .venv out
