# `make demo` and `make test` each set up .venv on their own; everything else is for people working on the code.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# mypy looks packages up by folder, so it gets the layout that the package has once installed.
TYPED := $(VENV)/typed

.PHONY: demo test lint type format bench bench-gpu bench-passes bench-modules bench-quantization bench-speed bench-throughput bench-time clean

demo: $(STAMP)
	$(BIN)/blora demo --out demo-run --overwrite

# One thread a worker: the models are tiny, and threads that wait for each other are slower than none.
test: $(STAMP) lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf $(TYPED) && mkdir -p $(TYPED)/blora_compiler
	ln -s $(CURDIR)/blora_compiler/* $(CURDIR)/passes $(CURDIR)/cost_models $(TYPED)/blora_compiler/
	cd $(TYPED) && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml -p blora_compiler

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)
	$(BIN)/python benchmarks/end_to_end.py --out benchmarks/results/cpu.json
	$(BIN)/python benchmarks/plots.py plan benchmarks/results/cpu.json --out docs/where-the-compute-went.svg

# What each ONNX pass is worth, and dense against compressed on the machine at hand.
bench-passes: $(STAMP)
	$(BIN)/python benchmarks/passes.py --out benchmarks/results/passes-cpu.json

bench-quantization: $(STAMP)
	$(BIN)/python benchmarks/quantization.py --large --out benchmarks/results/quantization-cpu.json

# On a machine with a CUDA device: what needs one is tested, then timed, beside what PROFILE says of that card.
PROFILE ?= h200
bench-gpu: $(STAMP)
	-$(BIN)/python -m pytest tests/device
	$(BIN)/python benchmarks/modules.py --target cuda --device $(PROFILE) --out benchmarks/results/modules-cuda.json
	$(BIN)/python benchmarks/speed.py --target cuda --plan uniform --plan shared --prepare build/graphs
	$(BIN)/python benchmarks/speed.py --target cuda --plan uniform --plan shared --prepared build/graphs \
	  --device $(PROFILE) --again --out benchmarks/results/speed-cuda.json

bench-modules: $(STAMP)
	$(BIN)/python benchmarks/modules.py --out benchmarks/results/modules-cpu.json

bench-speed: $(STAMP)
	$(BIN)/python benchmarks/speed.py --out benchmarks/results/speed-cpu.json

# Tokens per second of the bundled model over batch sizes, predicted beside measured.
bench-throughput: $(STAMP)
	$(BIN)/blora calibrate
	$(BIN)/blora bench blora_compiler/assets/prose-llama-8m --budget 0.5 --budget 0.25 --tokens 128 \
	  --batch 1 --batch 4 --batch 16 --batch 64 --out benchmarks/results/throughput-cpu.json

# Times need the machine to themselves: calibrate it, then compare predictions with it.
bench-time: $(STAMP)
	$(BIN)/blora calibrate --again
	$(BIN)/python benchmarks/prediction.py --out benchmarks/results/prediction-cpu.json
	$(BIN)/python benchmarks/latency_plans.py --out benchmarks/results/latency-plans-cpu.json
	$(BIN)/python benchmarks/latency_budget.py --out benchmarks/results/latency-budget-cpu.json
	$(BIN)/python benchmarks/whatif_scale.py --out benchmarks/results/whatif-scale.json

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

clean:
	rm -rf $(VENV) demo-run build *.egg-info
