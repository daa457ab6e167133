# `make demo` and `make test` are all that a fresh machine needs: python3 (>= 3.10, with venv) and, for the C++ kernels,
# a C++17 compiler. PYTHON=python3.12 picks another Python for .venv.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: demo test coverage durations bench lint format wheel install asan fuzz verify-gpu clean

# The demo needs what this machine can run; everything else builds whatever it can (setup.py).
demo: export SWIN_KERNELS_CUDA ?= device
demo: install
	$(BIN)/swin-unetr demo

# Each process takes the next file, the longest first (tests/collection.py); with CI=true, a skip that
# tests/expected_skips.txt does not list fails the run.
PROCESSES := --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
# Freed memory stays with the process: on a virtual machine, mapping it again takes a tenth of the tests' time.
test coverage durations: export MALLOC_MMAP_THRESHOLD_ = 1073741824
test coverage durations: export MALLOC_TRIM_THRESHOLD_ = 1073741824
test: install
	$(BIN)/pytest --quiet --durations=10 $(PROCESSES)

# The same, measuring coverage; fails below the bound in pyproject.toml.
coverage: install
	rm -rf build/coverage && mkdir -p build/coverage
	$(BIN)/coverage run -m pytest --quiet --durations=10 $(PROCESSES)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

# Write the time that each file takes on this machine to tests/durations.json.
durations: install
	$(BIN)/pytest --quiet --store-durations $(PROCESSES)

bench: install
	$(BIN)/pytest --quiet benchmarks

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' | xargs $(BIN)/clang-format --dry-run --Werror

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' | xargs $(BIN)/clang-format -i

# setuptools never deletes from build/lib*, and would pack files that are no longer in the sources.
wheel: $(STAMP)
	rm -rf build/lib* build/bdist*
	$(BIN)/pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
	@ls dist/*.whl

# .venv with the pinned packages and this one, editable; then the kernels, built from the current sources.
install: $(STAMP)
	@$(BIN)/python setup.py -q build_cpp --inplace

$(STAMP): requirements/lock.txt pyproject.toml setup.py
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check --requirement requirements/lock.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

# The tests of operators and of bad input on kernels built with AddressSanitizer, in a copy of the tree, so that the
# library in use stays as it is.
# Python and PyTorch do not free everything at exit: leaks are not looked for.
# libstdc++ is named too: ASan looks for __cxa_throw when Python starts, and dies of the first exception without it.
# Fresh memory is filled with 0xff, NaN in every floating dtype, so that reads of uninitialised memory show.
ASAN_LIBRARIES = "$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libstdc++.so)"
ASAN_OPTIONS = detect_leaks=0:max_malloc_fill_size=1000000000:malloc_fill_byte=255
asan: $(STAMP)
	mkdir -p build/asan
	git ls-files -z --cached --others --exclude-standard | xargs -0 cp --parents --target-directory=build/asan
	cd build/asan && SWIN_KERNELS_SANITIZE=address $(CURDIR)/$(BIN)/python setup.py -q build_cpp --inplace
	cd build/asan && LD_PRELOAD=$(ASAN_LIBRARIES) ASAN_OPTIONS=$(ASAN_OPTIONS) \
		$(CURDIR)/$(BIN)/python -m pytest --quiet --capture=no tests/ops tests/test_bad_input.py

# Random calls, mutated files and random kills, COUNT of each, a few of which `make test` tries too;
# tests/fuzz/__init__.py says what is checked. `make fuzz SUBJECT=images` runs one subject; another SEED draws other
# cases; KEEP=dir keeps the files of what is found.
COUNT ?= 10000
SEED ?= 0
fuzz: install
	$(BIN)/python -m tests.fuzz $(SUBJECT) --count $(COUNT) --seed $(SEED) $(KEEP:%=--keep "%")

# Tests, times and tunes the GPU kernels within BUDGET seconds; docs/cuda.md says what PYTHON needs and what to send
# back. `make verify-gpu OUT=dir`; PART=model runs that part alone, COMMIT=... names the sources where git does not.
OUT ?= build/gpu
BUDGET ?= 540
verify-gpu:
	$(PYTHON) -m benchmarks.verify_gpu "$(OUT)" --budget $(BUDGET) $(PART:%=--part %) $(COMMIT:%=--commit %)

clean:
	rm -rf build dist *.egg-info swin_kernels/lib
