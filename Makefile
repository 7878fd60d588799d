# `make align`: the whole pipeline on the built-in world. `make assistant MODEL=FOLDER`: the same
# from a published model. `make test`: the tests. Each sets up .venv first.
PYTHON ?= python3
RUN ?= runs/align
SEED ?= 0
BIN := .venv/bin
# Huge pages (glibc 2.35 or later): a training step of the world preset takes 98 ms instead of 132
# on two CPU cores.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
export JAX_PLATFORMS ?= $(if $(wildcard /dev/nvidia0 /dev/accel0 /dev/vfio/0),,cpu)

.PHONY: align assistant model-folder test test-rest test-fast test-slow test-peers mutants lint clean

# LOCKED=1: the very versions that the tests ran with.
PACKAGES := $(if $(LOCKED),--require-hashes -r requirements.lock,-r requirements.txt -r requirements-dev.txt)
.venv: requirements.txt requirements-dev.txt requirements.lock
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check $(PACKAGES)
	touch .venv

# What reads the folders and the data sets of the Hugging Face Hub.
.venv/hf: requirements-hf.txt | .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-hf.txt
	touch .venv/hf

# The libraries that results are compared with, gigabytes of them.
.venv/bench: requirements-bench.txt | .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-bench.txt
	touch .venv/bench
PEERS := tests/test_families.py tests/test_weights.py tests/test_chat_template.py

# Two rounds: a short PPO run with a weak KL penalty exploits the first reward model; its responses
# are ranked too, so the second reward model knows the first one's holes.
FIRST := $(RUN)/round1
LABELS := --noise=0.1
RM := --eval_data=$(RUN)/held_out.jsonl --demonstrations=world --lm_coef=0.5 --seed=$(SEED)

align: .venv
	$(BIN)/python train_lm.py --run=$(RUN)/lm --seed=$(SEED)
	$(BIN)/python train_sft.py --init=$(RUN)/lm --run=$(RUN)/sft --seed=$(SEED)
	test -s $(RUN)/held_out.jsonl || $(BIN)/python -m collect.rank --init=$(RUN)/sft --out=$(RUN)/held_out.jsonl --split=heldout --prompts=500 --pairs --seed=$(SEED)
	test -s $(FIRST)/sft.jsonl || $(BIN)/python -m collect.rank --init=$(RUN)/sft --out=$(FIRST)/sft.jsonl --prompts=5000 $(LABELS) --seed=$(SEED)
	$(BIN)/python train_rm.py --init=$(RUN)/sft --data=$(FIRST)/sft.jsonl --run=$(FIRST)/rm --steps=400 $(RM)
	$(BIN)/python train_ppo.py --init=$(RUN)/sft --reward=$(FIRST)/rm --run=$(FIRST)/ppo --steps=10 --kl_coef=0.05 --optimizer.lr=5e-4 --eval_every=0 --seed=$(SEED)
	test -s $(FIRST)/ppo.jsonl || $(BIN)/python -m collect.rank --init=$(FIRST)/ppo --out=$(FIRST)/ppo.jsonl --prompts=6000 $(LABELS) --seed=$$((500 + $(SEED)))
	cat $(FIRST)/sft.jsonl $(FIRST)/ppo.jsonl > $(RUN)/comparisons.jsonl
	$(BIN)/python train_rm.py --init=$(FIRST)/rm --data=$(RUN)/comparisons.jsonl --run=$(RUN)/rm $(RM)
	$(BIN)/python train_ppo.py --init=$(RUN)/sft --reward=$(RUN)/rm --run=$(RUN)/ppo --seed=$(SEED)
	$(BIN)/python evaluate.py --run=$(RUN) --seed=$$((1000 + $(SEED)))  # prompts that no choice of ours has seen

# A small assistant of one's own: low-rank adapters on a published model (docs/assistant.md).
# CHATS, PAIRS and PROMPTS are what --data takes. Flags in *_FLAGS come last, and win.
CHATS ?= world
PAIRS ?= world
PROMPTS ?= $(PAIRS)
LENGTH ?= 512
LORA := --lora.rank=16 --lora.alpha=32
OFTEN := --save_every=50 --eval_every=150
ROLLOUT := --max_prompt=256 --max_new_tokens=128
SFT = --data='$(CHATS)' --length=$(LENGTH) --steps=300 --optimizer.lr=2e-4 $(LORA) $(OFTEN) $(SFT_FLAGS)
REWARD = --data='$(PAIRS)' --length=$(LENGTH) --steps=300 --batch_size=8 --optimizer.lr=1e-4 --eval_records=200 $(LORA) $(OFTEN) $(REWARD_FLAGS)
DPO = --data='$(PAIRS)' --length=$(LENGTH) --steps=300 --batch_size=8 --optimizer.lr=5e-5 --eval_records=200 $(LORA) $(OFTEN) $(ROLLOUT) $(DPO_FLAGS)
PPO = --data='$(PROMPTS)' --steps=50 --batch_size=32 --kl_coef=0.05 --optimizer.lr=5e-5 --value_optimizer.lr=1e-4 --save_every=5 --eval_every=25 $(LORA) $(ROLLOUT) $(PPO_FLAGS)

ifeq ($(origin RUN),file)
assistant: RUN := runs/assistant
endif
assistant: model-folder .venv .venv/hf
	$(BIN)/python -m weights.convert --read='$(MODEL)' --run='$(RUN)/base'
# All rows of pairs and prompts are checked now, and the first 500 written as tokens, so that most
# mistakes in them do not show after hours.
	$(BIN)/python train_dpo.py --init='$(RUN)/base' --run='$(RUN)/dry_run' --dry_run $(DPO) > '$(RUN)/pairs.txt'
	$(BIN)/python train_ppo.py --init='$(RUN)/base' --reward=tasks.rules:brief --run='$(RUN)/dry_run' --dry_run $(PPO) > '$(RUN)/prompts.txt'
	$(BIN)/python train_sft.py --init='$(RUN)/base' --run='$(RUN)/sft' --seed=$(SEED) $(SFT)
	$(BIN)/python train_rm.py --init='$(RUN)/sft' --run='$(RUN)/rm' --seed=$(SEED) $(REWARD)
	$(BIN)/python train_dpo.py --init='$(RUN)/sft' --run='$(RUN)/dpo' --seed=$(SEED) $(DPO)
	$(BIN)/python train_ppo.py --init='$(RUN)/sft' --reward='$(RUN)/rm' --run='$(RUN)/ppo' --seed=$(SEED) $(PPO)
# An export of an earlier state stands in the way: remove $(RUN)/dpo-hf or $(RUN)/ppo-hf then.
	test '$(RUN)/dpo-hf/config.json' -nt '$(RUN)/dpo/checkpoints' || $(BIN)/python -m weights.convert --run='$(RUN)/dpo' --write='$(RUN)/dpo-hf'
	test '$(RUN)/ppo-hf/config.json' -nt '$(RUN)/ppo/checkpoints' || $(BIN)/python -m weights.convert --run='$(RUN)/ppo' --write='$(RUN)/ppo-hf'
	@echo "Talk to it: $(BIN)/python generate.py --run='$(RUN)/ppo' --chat --temperature=0.7 --max_new_tokens=256"

# Asked before anything is installed, and by the shell, which takes a folder as Python does.
model-folder:
	$(if $(shell test -f '$(MODEL)/config.json' && echo there),,$(error MODEL=$(MODEL): has no config.json; give the folder of a model, as docs/assistant.md says, without ~))

test: .venv
	$(BIN)/python -m pytest -q -rs -n 2 --dist loadfile

# What has not passed since `make test` began: after one that was cut off or had failures.
test-rest: .venv
	$(BIN)/python -m pytest -q -rs --rest

# Two minutes of what differs from main touches, the most direct first.
test-fast: .venv
	$(BIN)/python tests/changed.py --seconds=120

test-slow: .venv
	$(BIN)/python -m pytest -q -rs -m slow -n 2 --dist loadfile -o faulthandler_timeout=7200

# What `make test` leaves out: models, templates and tokenizers beside transformers.
test-peers: .venv .venv/hf .venv/bench
	$(BIN)/python -m pytest -q -rs -n 2 --dist loadfile $(PEERS)

# Faults planted in what measures: each must fail its test.
mutants: .venv
	$(BIN)/python tests/mutants.py

lint: .venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv runs/align .pytest_cache .ruff_cache .mypy_cache
