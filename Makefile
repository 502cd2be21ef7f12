# make demo       everything from an empty folder to a trained model that describes clips it never saw
# make test       checks and tests
# make thorough   all tests, with every example, kill, real clip, optimizer and engine
# make browser    tests of pages in a real browser: Debian's chromium (apt install chromium)
# make servers    tests with the code of vLLM and SGLang, which it installs (20 GB; SGLang's decoder needs apt install ffmpeg)

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
BIN = .venv/bin
export HF_HUB_OFFLINE ?= 1
# OpenMP's threads must not spin while they wait: on busy cores that costs several times the time.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: setup demo test thorough browser servers clean

setup: .venv/ready

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check -e ".[dev,deepspeed]"
	touch $@

demo: setup
	$(BIN)/python -m llamafactory_video.demo prepare
	test -f output/demo/tuned/train_results.json || CUDA_VISIBLE_DEVICES= $(BIN)/llamafactory-cli train recipes/demo.yaml
	$(BIN)/lmf-video eval output/demo/test.json --model base=output/demo/base --model tuned=output/demo/tuned --max-new-tokens 64 --batch-size 16 --out output/demo

test: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pytest

thorough: setup
	$(BIN)/pip install --disable-pip-version-check -q -e ".[thorough]"
	test -d .venv/transformers-5.24 || $(BIN)/pip install --disable-pip-version-check -q --target .venv/transformers-5.24 transformers==5.24.0
	THOROUGH=1 $(BIN)/pytest

browser: setup
	$(BIN)/pip install --disable-pip-version-check -q -e ".[browser]"
	BROWSER=1 $(BIN)/pytest -m browser

servers: setup
	test -d .venv/vllm || ($(PYTHON) -m venv .venv/vllm && .venv/vllm/bin/pip install --disable-pip-version-check -q vllm==0.33.0)
	test -d .venv/sglang || ($(PYTHON) -m venv .venv/sglang && .venv/sglang/bin/pip install --disable-pip-version-check -q sglang==0.5.23)
	SERVERS=1 $(BIN)/pytest -m servers -n 0

clean:
	rm -rf .venv output
