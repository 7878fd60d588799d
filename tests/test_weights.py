"""Hugging Face folders against an independent float64 forward pass, and against transformers."""

import dataclasses
import functools
import importlib.util
import io
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import sentencepiece
from safetensors.numpy import load_file, save_file

import train_sft
from data.sentencepiece_json import tokenizer_json
from data.tokenizer import Tokenizer
from data.tokenizer_json import read_tokenizer, tokenizer_files
from model import LanguageModel, init_and_apply, unembed
from model_config import PRESETS, ModelConfig, stored_model
from runtime import flags as config
from runtime.errors import UserError
from runtime.run_folder import lock_run
from tests.test_errors import fails
from tests.test_tokenizer import CORPUS
from train_state import load_params
from weights import convert as weights
from weights import families

D, F, L, N, K, V = 16, 24, 3, 4, 2, 384
SHAPE = {
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": F,
    "num_hidden_layers": L,
    "num_attention_heads": N,
    "num_key_value_heads": K,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100.0,
}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
QWEN = {"use_sliding_window": False, "sliding_window": 3, "max_window_layers": 0}
TIED = {"tie_word_embeddings": True}
# The fields of config.json beside SHAPE.
CONFIGS = {
    "llama 2": {"model_type": "llama", "hidden_act": "silu"},
    "llama 3": {"model_type": "llama", "rope_scaling": {"rope_type": "llama3", **LLAMA3}, **TIED},
    "linear rope": {
        "model_type": "llama",
        "rope_scaling": {"type": "linear", "factor": 4.0},
        "head_dim": 8,
    },
    "rope parameters": {
        "model_type": "llama",
        "rope_theta": None,
        "rope_parameters": {"rope_theta": 50.0, "rope_type": "default"},
    },
    "mistral": {"model_type": "mistral", "sliding_window": 4},
    "mistral without window": {"model_type": "mistral", "sliding_window": None, "head_dim": 6},
    "qwen 2": {"model_type": "qwen2", **QWEN},
    "qwen 2 with window": {"model_type": "qwen2", **QWEN, "use_sliding_window": True, **TIED},
    "qwen 3": {"model_type": "qwen3", **QWEN, "head_dim": 8, **TIED},
    "gemma": {
        "model_type": "gemma",
        "head_dim": 8,
        "hidden_act": "gelu",
        "num_key_value_heads": 1,
    },
}


def checkpoint(c, seed=0):
    """Return random tensors by their names in a folder of the family, in the published layout."""
    rng = np.random.default_rng(seed)
    n = c["num_attention_heads"]
    k = c["num_key_value_heads"]
    h = c.get("head_dim", D // N)
    layer = {
        "self_attn.q_proj": (n * h, D),
        "self_attn.k_proj": (k * h, D),
        "self_attn.v_proj": (k * h, D),
    }
    layer |= {
        "self_attn.o_proj": (D, n * h),
        "mlp.gate_proj": (F, D),
        "mlp.up_proj": (F, D),
        "mlp.down_proj": (D, F),
    }
    tensors = {"model.embed_tokens.weight": rng.normal(size=(V, D))}
    for i in range(L):
        at = f"model.layers.{i}."
        tensors |= {
            f"{at}{name}.weight": 0.3 * rng.normal(size=shape) for name, shape in layer.items()
        }
        norms = {"input_layernorm": D, "post_attention_layernorm": D}
        if c["model_type"] == "qwen3":
            norms |= {"self_attn.q_norm": h, "self_attn.k_norm": h}
        if c["model_type"] == "qwen2":
            tensors |= {
                f"{at}self_attn.{x}_proj.bias": rng.normal(size=m * h)
                for x, m in {"q": n, "k": k, "v": k}.items()
            }
        tensors |= {
            f"{at}{name}.weight": 1 + 0.3 * rng.normal(size=size) for name, size in norms.items()
        }
    tensors["model.norm.weight"] = 1 + 0.3 * rng.normal(size=D)
    if not c.get("tie_word_embeddings", c["model_type"] == "gemma"):
        tensors["lm_head.weight"] = 0.3 * rng.normal(size=(V, D))
    return {name: x.astype(np.float32) for name, x in tensors.items()}


def turned(x_TNH, c):
    """Turn pairs (i, i + H/2) as complex numbers: RoPE.

    Llama 3 scales by wavelength, in the cases of its reference code.
    """
    T, _, H = x_TNH.shape
    rope = {
        "rope_theta": c["rope_theta"],
        **c.get("rope_scaling", {}),
        **c.get("rope_parameters", {}),
    }
    angles = []
    for i in range(H // 2):
        f = rope["rope_theta"] ** (-2 * i / H)
        if "low_freq_factor" in rope:
            wavelength = 2 * np.pi / f
            old = rope["original_max_position_embeddings"]
            low, high = rope["low_freq_factor"], rope["high_freq_factor"]
            if wavelength > old / low:
                f /= rope["factor"]
            elif wavelength > old / high:
                smooth = (old / wavelength - low) / (high - low)
                f = (1 - smooth) * f / rope["factor"] + smooth * f
        elif "factor" in rope:
            f /= rope["factor"]
        angles.append(f)
    z = x_TNH[..., : H // 2] + 1j * x_TNH[..., H // 2 :]
    z = z * np.exp(1j * np.arange(T)[:, None] * np.array(angles))[:, None]
    return np.concatenate([z.real, z.imag], -1)


def forward(tensors, c, tokens_T):
    """Return float64 logits [T, V], a query at a time; rows of their matrices are outputs."""
    w = {name: np.asarray(x, np.float64) for name, x in tensors.items()}
    gemma = c["model_type"] == "gemma"
    n = c["num_attention_heads"]
    k = c["num_key_value_heads"]
    T = len(tokens_T)
    window = c.get("sliding_window") if c.get("use_sliding_window", True) else None

    def norm(x, scale):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + c["rms_norm_eps"]) * (scale + gemma)

    def act(x):
        if not gemma:
            return x / (1 + np.exp(-x))
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    x_TD = w["model.embed_tokens.weight"][tokens_T] * (np.sqrt(D) if gemma else 1)
    for i in range(L):
        p = {
            name.removeprefix(f"model.layers.{i}."): x
            for name, x in w.items()
            if name.startswith(f"model.layers.{i}.")
        }
        y = norm(x_TD, p["input_layernorm.weight"])
        heads = {}
        for x in "qkv":
            flat = y @ p[f"self_attn.{x}_proj.weight"].T + p.get(f"self_attn.{x}_proj.bias", 0)
            heads[x] = flat.reshape(T, n if x == "q" else k, -1)
            if x != "v" and c["model_type"] == "qwen3":
                heads[x] = norm(heads[x], p[f"self_attn.{x}_norm.weight"])
        q = turned(heads["q"], c)
        key = turned(heads["k"], c)
        v = heads["v"]
        out = np.zeros_like(q)
        for t in range(T):
            first = 0 if window is None else max(0, t - window + 1)
            for head in range(n):
                scores = key[first : t + 1, head * k // n] @ q[t, head] / np.sqrt(q.shape[-1])
                weight = np.exp(scores - scores.max())
                out[t, head] = weight / weight.sum() @ v[first : t + 1, head * k // n]
        x_TD = x_TD + out.reshape(T, -1) @ p["self_attn.o_proj.weight"].T
        y = norm(x_TD, p["post_attention_layernorm.weight"])
        x_TD = (
            x_TD
            + (act(y @ p["mlp.gate_proj.weight"].T) * (y @ p["mlp.up_proj.weight"].T))
            @ p["mlp.down_proj.weight"].T
        )
    return (
        norm(x_TD, w["model.norm.weight"])
        @ w.get("lm_head.weight", w["model.embed_tokens.weight"]).T
    )


def write(folder, c, tensors, files=1):
    """Write a folder as others do; with several `files`, an index says what is where."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(c))
    if not (folder / "tokenizer.model").exists():
        Tokenizer.train(CORPUS, folder / "tokenizer.model", V)
    names = (
        [f"model-{i + 1:05}-of-{files:05}.safetensors" for i in range(files)]
        if files > 1
        else ["model.safetensors"]
    )
    where = {name: names[i % files] for i, name in enumerate(tensors)}
    for name in names:
        save_file(
            {t: np.ascontiguousarray(x) for t, x in tensors.items() if where[t] == name},
            folder / name,
        )
    if files > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return folder


def run_of(folder, run, *flags):
    return weights.main(config.parse(weights.Config, [f"--read={folder}", f"--run={run}", *flags]))


def exported(run, folder, *flags):
    weights.main(config.parse(weights.Config, [f"--run={run}", f"--write={folder}", *flags]))
    return folder


@functools.cache
def logits_of(model):
    """Return a compiled (params, tokens_BT) -> logits_BTV of the decoder."""
    apply = init_and_apply(LanguageModel(model))[1]

    def logits_BTV(params, tokens_BT):
        positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        output = apply(params, tokens_BT, jnp.ones_like(tokens_BT), positions_BT)
        return unembed(output.x_BTD, output.unembed_DV)

    return jax.jit(logits_BTV)


def logits(run):
    return np.asarray(logits_of(stored_model(str(run)))(load_params(str(run)), TOKENS[None])[0])


TOKENS = np.random.default_rng(1).integers(0, V, 21).astype(np.int32)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_of_a_random_checkpoint_and_its_round_trip(name, tmp_path, capsys):
    c = SHAPE | CONFIGS[name]
    tensors = checkpoint(c)
    sharded = ["--mesh.data=2", "--mesh.fsdp=2", "--mesh.tensor=2"]
    run_of(
        write(tmp_path / "theirs", c, tensors, files=1 + len(name) % 3), tmp_path / "run", *sharded
    )
    want = forward(tensors, c, TOKENS)
    np.testing.assert_allclose(logits(tmp_path / "run"), want, atol=1e-4)
    # Control: position, window, norms and biases all matter to these numbers.
    other = {
        **c,
        "rope_theta": 7.0,
        "rope_parameters": {},
        "rms_norm_eps": 0.01,
        "sliding_window": 2,
    }
    assert np.abs(forward(tensors, other, TOKENS) - want).max() > 1e-2

    folder = exported(tmp_path / "run", tmp_path / "ours")
    again = load_file(folder / "model.safetensors")
    assert again.keys() == tensors.keys() and all(
        np.array_equal(again[name], x) for name, x in tensors.items()
    )
    mine = families.model_of(folder / "config.json")
    stored = stored_model(str(tmp_path / "run"))
    assert dataclasses.replace(mine, preset="") == dataclasses.replace(stored, preset="")
    assert mine.preset == c["model_type"]
    run_of(folder, tmp_path / "again")
    trees = [load_params(str(tmp_path / run)) for run in ("run", "again")]
    assert jax.tree.all(jax.tree.map(np.array_equal, *trees))
    assert (folder / "tokenizer.model").read_bytes() == (
        tmp_path / "theirs" / "tokenizer.model"
    ).read_bytes()
    weights.save(tmp_path / "saved", *weights.load(folder), Tokenizer.load(tmp_path / "run"))
    for name in ("config.json", "model.safetensors", "tokenizer.model"):
        assert (tmp_path / "saved" / name).read_bytes() == (folder / name).read_bytes()


WRONG = {
    "q transposed": lambda t: (
        t
        | {"model.layers.1.self_attn.q_proj.weight": t["model.layers.1.self_attn.q_proj.weight"].T}
    ),
    "k and v swapped": lambda t: swap(
        t, "model.layers.0.self_attn.k_proj.weight", "model.layers.0.self_attn.v_proj.weight"
    ),
    "gate and up swapped": lambda t: swap(
        t, "model.layers.2.mlp.gate_proj.weight", "model.layers.2.mlp.up_proj.weight"
    ),
    "two layers swapped": lambda t: swap(
        t, "model.layers.0.mlp.down_proj.weight", "model.layers.1.mlp.down_proj.weight"
    ),
    "norms swapped": lambda t: swap(
        t, "model.layers.0.input_layernorm.weight", "model.norm.weight"
    ),
    "heads interleaved": lambda t: (
        t
        | {
            "model.layers.0.self_attn.o_proj.weight": t["model.layers.0.self_attn.o_proj.weight"]
            .reshape(D, N, D // N)
            .swapaxes(1, 2)
            .reshape(D, D)
        }
    ),
}


def swap(tensors, a, b):
    return {**tensors, a: tensors[b], b: tensors[a]}


def test_a_weight_in_a_wrong_place_would_be_seen(tmp_path):
    c = SHAPE | CONFIGS["llama 2"]
    tensors = checkpoint(c)
    want = forward(tensors, c, TOKENS)
    for name, wrong in {"right": lambda t: t, **WRONG}.items():
        model, params = weights.load(write(tmp_path / "theirs", c, wrong(tensors)))
        gap = np.abs(logits_of(model)(params, TOKENS[None])[0] - want).max()
        assert gap < 1e-4 if name == "right" else gap > 0.05, name


def test_half_precision_is_read_exactly_and_exports_are_cut_into_files(tmp_path, monkeypatch):
    c = SHAPE | CONFIGS["mistral"]
    half = {name: x.astype(ml_dtypes.bfloat16) for name, x in checkpoint(c).items()}
    params = run_of(write(tmp_path / "theirs", c, half), tmp_path / "run")
    assert jax.tree.all(jax.tree.map(lambda x: x.dtype == jnp.float32, params))
    monkeypatch.setattr(weights, "SHARD_BYTES", 9000)
    folder = exported(tmp_path / "run", tmp_path / "ours", "--dtype=bfloat16")
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1
    files = sorted(folder.glob("*.safetensors"))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    found = {}
    for path in files:
        part = load_file(path)
        assert all(index["weight_map"][name] == path.name for name in part)
        assert len(part) == 1 or sum(x.nbytes for x in part.values()) <= 9000
        found |= part
    assert len(files) > 2 and files[-1].name.endswith(f"-of-{len(files):05}.safetensors")
    assert found.keys() == half.keys() == index["weight_map"].keys()
    assert all(
        found[name].dtype == x.dtype and np.array_equal(found[name], x) for name, x in half.items()
    )
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in half.values())


def test_mistakes_are_one_line(tmp_path, capsys):
    c = SHAPE | CONFIGS["llama 2"]
    tensors = checkpoint(c)
    norm, embed = "model.layers.1.input_layernorm.weight", "model.embed_tokens.weight"

    def told(c=c, tensors=tensors, spoil=lambda folder: None, **options):
        folder = write(tmp_path / f"m{len(list(tmp_path.iterdir()))}", c, tensors, **options)
        spoil(folder)
        line = fails(weights, [f"--read={folder}", f"--run={tmp_path / 'run'}"], capsys)
        assert not (tmp_path / "run").exists() and str(folder) in line
        return line

    assert f"{norm}: missing (of 1)" in told(
        tensors={k: x for k, x in tensors.items() if k != norm}
    )
    assert "model.extra: unknown" in told(
        tensors={**tensors, "model.extra": np.zeros(3, np.float32)}
    )
    assert f"{norm}: shape (15,), by config.json (16,)" in told(
        tensors={**tensors, norm: np.zeros(15, np.float32)}
    )
    assert f"{norm}: type I32" in told(tensors={**tensors, norm: np.zeros(D, np.int32)})
    assert "lm_head.weight: missing" in told(
        tensors={k: x for k, x in tensors.items() if k != "lm_head.weight"}
    )
    assert "model_type 'gpt2' is not covered" in told({**c, "model_type": "gpt2"})
    assert "model_type None" in told({k: x for k, x in c.items() if k != "model_type"})
    assert "'longrope' is not covered" in told(
        {**c, "rope_scaling": {"rope_type": "longrope", "factor": 4.0}}
    )
    assert "'factor' is missing" in told({**c, "rope_scaling": {"rope_type": "linear"}})
    biased = {"model_type": "mistral", "attention_bias": True}
    assert "attention_bias is not covered" in told({**c, **biased})
    assert "quantization_config" in told({**c, "quantization_config": {"bits": 4}})
    assert "hidden_act 'relu'" in told({**c, "hidden_act": "relu"})
    assert "'hidden_size' is missing" in told({k: x for k, x in c.items() if k != "hidden_size"})
    mixed = {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}
    assert "layer_types contradicts" in told({**c, "model_type": "mistral", **mixed})

    def cut(folder):
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-9])

    assert "no readable safetensors file" in told(spoil=cut)
    assert "no readable safetensors file" in told(
        spoil=lambda f: (f / "model.safetensors").unlink()
    )
    assert "-of-00002.safetensors" in told(
        spoil=lambda f: next(f.glob("*-00002.safetensors")).unlink(), files=2
    )
    index = "model.safetensors.index.json"
    assert f"{index}: not readable" in told(spoil=lambda f: (f / index).write_text("{}"), files=2)
    assert "not readable as a JSON object" in told(
        spoil=lambda f: (f / "config.json").write_text("[1]")
    )
    assert "config.json: missing" in told(spoil=lambda f: (f / "config.json").unlink())
    assert "no tokenizer.model" in told(spoil=lambda f: (f / "tokenizer.model").unlink())
    assert "tokenizer cannot be read" in told(
        spoil=lambda f: (f / "tokenizer.model").write_bytes(b"oops")
    )
    assert "--read" in fails(weights, [], capsys)

    run_of(write(tmp_path / "good", c, tensors | {embed: tensors[embed] + 1}), tmp_path / "run")
    write(tmp_path / "other", c, tensors)
    assert "name another --run" in fails(
        weights, [f"--read={tmp_path / 'other'}", f"--run={tmp_path / 'run'}"], capsys
    )
    assert "exists" in fails(
        weights, [f"--run={tmp_path / 'run'}", f"--write={tmp_path / 'good'}"], capsys
    )
    strange = ModelConfig(qk_norm=True, qkv_bias=True)
    with pytest.raises(UserError, match="qkv_bias and qk_norm together"):
        families.config_of(strange, None, "float32")


def test_presets_are_exported_as_their_own_families():
    tokenizer = type("Tokenizer", (), {"bos": 1, "eos": 2, "pad": 0, "ends": [2]})
    kinds = {
        n: families.config_of(m, tokenizer, "float32")["model_type"] for n, m in PRESETS.items()
    }
    assert kinds["llama3.2-1b"] == kinds["llama3-70b"] == "llama"
    assert (kinds["qwen3-0.6b"], kinds["mistral-7b"]) == ("qwen3", "mistral")


def test_a_run_without_role_tokens_is_fine_tuned(tmp_path, capsys):
    c = SHAPE | CONFIGS["gemma"]
    folder = write(tmp_path / "theirs", c, checkpoint(c))
    options = {
        "model_type": "bpe",
        "vocab_size": V - 20,
        "hard_vocab_limit": False,
        "byte_fallback": True,
    }
    with open(folder / "tokenizer.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS), model_writer=file, **options, minloglevel=2
        )
    run_of(folder, tmp_path / "run")
    chats = tmp_path / "chats.jsonl"
    chats.write_text(
        "".join(json.dumps({"prompt": f"say {i}", "response": f"{i}!"}) + "\n" for i in range(100))
    )
    argv = [
        f"--init={tmp_path}/run",
        f"--run={tmp_path}/sft",
        f"--data={chats}",
        "--steps=2",
        "--batch_size=8",
    ]
    told = train_sft.main(
        config.parse(
            train_sft.Config, [*argv, "--optimizer.warmup=0", "--length=48", "--eval_every=0"]
        )
    )
    assert np.isfinite(told["loss"])
    found = load_file(exported(tmp_path / "sft", tmp_path / "ours") / "model.safetensors")
    assert not np.array_equal(found["model.norm.weight"], checkpoint(c)["model.norm.weight"])
    assert Tokenizer.load(tmp_path / "sft").user is None


def byte_pairs(tokenizers, folder):
    """Write a tokenizer.json as Qwen's and Llama 3's: byte pairs, and special tokens beside."""
    made = tokenizers.ByteLevelBPETokenizer()
    made.train_from_iterator(CORPUS, V - 4, show_progress=False)
    made.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    made.save(str(folder / "tokenizer.json"))
    options = {
        "eos_token": "<|endoftext|>",
        "bos_token": None,
        "pad_token": {"content": "<|endoftext|>"},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(options))
    return made


def test_a_tokenizer_json_keeps_the_contract_of_tokenizers(tmp_path, capsys):
    tokenizers = pytest.importorskip("tokenizers")
    c = SHAPE | CONFIGS["qwen 3"]
    folder = write(tmp_path / "theirs", c, checkpoint(c))
    (folder / "tokenizer.model").unlink()
    made = byte_pairs(tokenizers, folder)
    run_of(folder, tmp_path / "run")
    t = Tokenizer.load(tmp_path / "run")
    end, start = made.token_to_id("<|endoftext|>"), made.token_to_id("<|im_start|>")
    # No token is for padding: what opens a turn is not taken for it.
    assert (t.bos, t.eos, t.pad, t.user, t.size) == (end, end, end, None, made.get_vocab_size())
    for text in (*CORPUS[:3], " a  b ", "\n\n", "▁x", "é 😀", ""):
        assert t.encode(text) == made.encode(text).ids and t.decode(t.document(text)) == text
    spelled = "hello <|endoftext|><|im_start|>"
    assert not {t.eos, start} & set(t.encode(spelled)) and t.decode(t.encode(spelled)) == spelled
    # Control: the package by itself does take the text for the token.
    assert end in made.encode(spelled).ids
    tokens, mask = t.chat(
        [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "The cat."}]
    )
    assert tokens[-sum(map(int, mask)) :] == [*t.encode("The cat."), t.eos]

    ours = exported(tmp_path / "run", tmp_path / "ours")
    theirs, exported_json = (
        json.loads((where / "tokenizer.json").read_text()) for where in (folder, ours)
    )
    # Theirs puts nothing in front of a text; a run begins with the eos, and other tools shall too.
    template = exported_json.pop("post_processor")["processors"][-1]
    assert template["special_tokens"]["<|endoftext|>"]["ids"] == [end]
    theirs.pop("post_processor")
    assert exported_json == theirs
    again = run_of(ours, tmp_path / "again")
    assert again and Tokenizer.load(tmp_path / "again").sha256 == t.sha256
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "tokenizers", None)
        assert "requirements-hf.txt" in fails(
            weights, [f"--read={folder}", f"--run={tmp_path}/other"], capsys
        )
    (folder / "tokenizer.json").write_text('{"added_tokens": []}')
    assert "tokenizer cannot be read" in fails(
        weights, [f"--read={folder}", f"--run={tmp_path}/other"], capsys
    )


# --- memory

MEMORY = """
import sys, pathlib, threading, time
sys.path.insert(0, sys.argv[1])
import jax, numpy as np
from weights import convert as weights
from safetensors.numpy import load_file
folder, most, done = pathlib.Path(sys.argv[2]), [0, 0], threading.Event()

# RssAnon is the process's own; VmRSS has the pages of mapped files too, which the kernel may drop.
def now():
    lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return [int(lines[name].split()[0]) * 1024 for name in ("RssAnon", "VmRSS")]

def watch():
    while not done.is_set():
        most[:] = map(max, most, now())
        time.sleep(0.002)

eight = jax.make_mesh((8,), ("x",))
ones = jax.device_put(np.ones(8), jax.NamedSharding(eight, jax.P("x")))
jax.block_until_ready(jax.jit(jax.numpy.sin)(ones))
before = now()
watcher = threading.Thread(target=watch)
watcher.start()
if sys.argv[3] == "read":
    params = weights.load(folder)[1]
else:
    held = load_file(folder / "model.safetensors")
    params = {name: jax.numpy.array(x) for name, x in held.items()}
jax.block_until_ready(params)
done.set()
watcher.join()
print(*(x - y for x, y in zip(most, before)), sum(x.nbytes for x in jax.tree.leaves(params)))
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not os.path.exists("/proc/self/status"), reason="peak memory is read from /proc"
)
def test_reading_holds_the_model_once(tmp_path):
    """A gigabyte onto eight devices takes the model itself and little more.

    On CPU the devices' memory is the host's own.
    """
    shape = {
        "vocab_size": 32000,
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 19,
    }
    c = SHAPE | CONFIGS["llama 2"] | shape | {"tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(c))
    model = families.model_of(tmp_path / "config.json")
    noise = np.random.default_rng(0).normal(size=1000 * 1024).astype(np.float32)
    tensors = {name: np.resize(noise, shape) for name, _, _, shape in weights.their_tensors(model)}
    save_file(tensors, tmp_path / "model.safetensors")
    root = str(pathlib.Path(__file__).parents[1])
    ratios = {}
    for how in ("read", "held"):
        command = [sys.executable, "-c", MEMORY, root, str(tmp_path), how]
        environment = os.environ | {
            "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
            "JAX_PLATFORMS": "cpu",
        }
        out = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=True
        ).stdout
        *grown, size = map(int, out.split())
        assert size > 1e9
        ratios[how] = [x / size for x in grown]
    print(f"peak over the model's bytes, anonymous and resident: {ratios}")
    # The second is a control: the whole file and the arrays.
    assert max(ratios["read"]) < 1.2 and min(ratios["held"]) > 1.9


# --- against transformers


def tiny(transformers, c):
    """Make a random model of a config.json, by transformers."""
    import torch

    torch.manual_seed(0)
    options = {k: x for k, x in c.items() if k != "model_type" and (k, x) != ("rope_theta", None)}
    if c["model_type"] == "gemma":
        options["hidden_act"] = "gelu_pytorch_tanh"
    config = transformers.AutoConfig.for_model(c["model_type"], **options)
    make = transformers.AutoModelForCausalLM.from_config
    model = make(config, attn_implementation="eager").eval()
    assert type(model).__name__ == families.FAMILIES[c["model_type"]].architecture
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def their_logits(model):
    import torch

    with torch.no_grad():
        return model(torch.tensor(TOKENS[None])).logits[0].float().numpy()


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_agrees_both_ways(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    theirs = tiny(transformers, SHAPE | CONFIGS[name])
    theirs.save_pretrained(tmp_path / "theirs")
    tokenizer = Tokenizer.train(CORPUS, tmp_path / "theirs" / "tokenizer.model", V)
    run_of(tmp_path / "theirs", tmp_path / "run")
    want = their_logits(theirs)
    np.testing.assert_allclose(logits(tmp_path / "run"), want, atol=1e-4)
    folder = exported(tmp_path / "run", tmp_path / "ours")
    loaded, told = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", output_loading_info=True
    )
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(loaded) is type(theirs)
    np.testing.assert_array_equal(their_logits(loaded), want)
    # For qwen2, AutoTokenizer passes over the folder's class: published folders name a wrong one.
    auto = (
        transformers.PreTrainedTokenizerFast
        if CONFIGS[name]["model_type"] == "qwen2"
        else transformers.AutoTokenizer
    )
    reader = auto.from_pretrained(folder)
    for text in (*CORPUS[:3], "  two  spaces é 😀 12 7\n\n", "hello 1234\tx", ""):
        assert reader(text)["input_ids"] == [tokenizer.bos, *tokenizer.encode(text)]
        assert reader.decode(tokenizer.encode(text)) == text
    assert reader("<|user|>hi<|assistant|>")["input_ids"] == tokenizer.prompt("hi")
    ids = (reader.bos_token_id, reader.eos_token_id, reader.pad_token_id)
    assert ids == (tokenizer.bos, tokenizer.eos, tokenizer.pad)


# --- what is wrong in files of others


# Values of config.json's fields that are refused.
REFUSED = {
    "num_hidden_layers": [10**9, 0, "2", 2.5, True],
    "hidden_size": ["32", -1, {}],
    "head_dim": [0, 3, "8"],
    "num_key_value_heads": [0, "2"],
    "max_position_embeddings": [128.5, 0],
    "rms_norm_eps": ["1e-5", 0, float("nan")],
    "tie_word_embeddings": ["false", 1],
    "hidden_act": ["relu", 3],
    "model_type": [[], "x" * 5000],
    "rope_theta": [0, -1, float("inf"), "1e4"],
    "rope_scaling": ["linear", {"type": "linear", "factor": 0}, {"full_attention": {}}],
    "partial_rotary_factor": [0.5],
    "sliding_window": [0, -4],
    "layer_types": [["full_attention"], ["linear_attention"] * L, ["sliding_attention"] * L],
    "eos_token_id": ["2", -1, [], [[2]], V + 1],
    "torch_dtype": ["int8"],
    "num_experts": [8],
}
UNREADABLE = {
    "empty": b"",
    "a list": b"[1]",
    "a key twice": b'{"a": 1, "a": 2}',
    "not UTF-8": b'{"a": "\xff"}',
    "deep": b'{"a": ' + b"[" * 100_000,
    "a number of 5000 digits": b'{"a": ' + b"9" * 5000 + b"}",
}


def refused(folder):
    """Return the line by which a folder is refused."""
    with pytest.raises(UserError) as fault:
        weights.find_model(folder)
        Tokenizer(read_tokenizer(folder))
    assert "\n" not in str(fault.value) and len(str(fault.value)) < 500
    return str(fault.value)


@pytest.fixture
def theirs(tmp_path):
    """Return a folder as others make it, and its tensors."""
    c = SHAPE | CONFIGS["llama 2"]
    tensors = checkpoint(c)
    return write(tmp_path / "theirs", c, tensors), c, tensors


def test_any_value_of_a_config_is_right_or_refused(theirs):
    folder, c, _ = theirs
    path = folder / "config.json"
    for field, values in REFUSED.items():
        for value in values:
            path.write_text(json.dumps({**c, field: value}))
            assert field.removeprefix("num_") in refused(folder) or field == "rope_scaling", value
    for name, content in UNREADABLE.items():
        path.write_bytes(content)
        assert "config.json: not readable" in refused(folder), name
    path.write_text(json.dumps(c))
    # Control: the folder as it was.
    assert weights.find_model(folder)[0].layers == L


def test_the_files_beside_are_right_or_refused(theirs):
    folder, _, _ = theirs
    wrong = {
        "tokenizer_config.json": [{"eos_token": 3}, {"eos_token": "[NOPE]"}, {"bos_token": {}}],
        "generation_config.json": [{"eos_token_id": "</s>"}, {"eos_token_id": [3, 4000]}],
        "added_tokens.json": [{"<x>": -1}, {"<x>": "320"}],
    }
    for name, contents in wrong.items():
        for content in (*map(json.dumps, contents), *UNREADABLE.values()):
            if content == UNREADABLE["a key twice"]:
                continue
            text = content if isinstance(content, bytes) else content.encode()
            (folder / name).write_bytes(text)
            refused(folder)
        (folder / name).unlink()
    for content in (b"", b"oops", b"{", b'{"a": 1}'):
        (folder / "tokenizer.model").write_bytes(content)
        refused(folder)


def test_the_index_decides_and_files_lie_in_the_folder(tmp_path):
    c = SHAPE | CONFIGS["llama 2"]
    tensors = checkpoint(c)
    folder = write(tmp_path / "theirs", c, tensors, files=2)
    path = folder / "model.safetensors.index.json"
    file_of = json.loads(path.read_text())["weight_map"]
    first, second = sorted(set(file_of.values()))
    name = next(name for name, file in file_of.items() if file == first)

    # A tensor in two shards is that of the index.
    twice = {**load_file(folder / second), name: tensors[name] + 1}
    save_file(twice, folder / second)
    _, files = weights.find_model(folder)
    assert files[name].name == first

    for other in (
        {**file_of, name: None},
        {**file_of, name: "../theirs/" + first},
        {**file_of, name: str(folder / first)},
        {**file_of, name: "gone.safetensors"},
        {**file_of, "model.extra": first},
        {key: file for key, file in file_of.items() if key != name},
        [],
    ):
        path.write_text(json.dumps({"weight_map": other}))
        refused(folder)
    path.write_text(json.dumps({"weight_map": file_of}))
    save_file(tensors, folder / "model.safetensors")
    assert "out of date" in refused(folder)
    (folder / "model.safetensors").unlink()

    # A link may not lead out of the folder, but for a cache of the hub.
    (tmp_path / "blobs").mkdir()
    (folder / first).rename(tmp_path / "blobs" / "1")
    (folder / first).symlink_to(tmp_path / "blobs" / "1")
    assert "outside" in refused(folder)
    (tmp_path / "snapshots").mkdir()
    folder.rename(tmp_path / "snapshots" / "abc")
    assert weights.find_model(tmp_path / "snapshots" / "abc")[1].keys() == tensors.keys()


def test_a_tensor_with_nan_or_infinity_is_named(tmp_path):
    c = SHAPE | CONFIGS["llama 2"]
    name = "model.layers.1.mlp.up_proj.weight"
    for value in (np.nan, np.inf):
        tensors = checkpoint(c)
        tensors[name][3, 4] = value
        with pytest.raises(UserError, match=f"{name}: holds NaN or infinity"):
            weights.load(write(tmp_path / str(value), c, tensors))


def test_a_head_of_its_own_is_kept_where_the_config_ties_it(tmp_path, capsys):
    c = SHAPE | CONFIGS["llama 3"]
    tensors = checkpoint(c)
    embed = tensors["model.embed_tokens.weight"]
    copy = write(tmp_path / "copy", c, {**tensors, "lm_head.weight": embed})
    assert weights.find_model(copy)[0].tied and "note" not in capsys.readouterr().err
    other = {**tensors, "lm_head.weight": embed[::-1].copy()}
    model, params = weights.load(write(tmp_path / "other", c, other))
    assert not model.tied and "lm_head.weight" in capsys.readouterr().err
    np.testing.assert_array_equal(params["unembed"], other["lm_head.weight"].T)


HF_CASES = pathlib.Path(__file__).parents[2] / "shared" / "cases" / "hf"


@pytest.mark.skipif(not HF_CASES.exists(), reason="models that transformers saved are not here")
def test_models_that_transformers_saved():
    for folder in sorted(HF_CASES.iterdir()):
        case = np.load(folder / "case.npz")
        model, params = weights.load(folder)
        want_TV = case["logits"]
        found_BTV = logits_of(model)(params, case["ids"])
        np.testing.assert_allclose(
            found_BTV[0], want_TV, atol=2e-2 if "bf16" in folder.name else 1e-4
        )


def test_ends_and_tokens_beside_a_sentencepiece_model_are_taken_over(theirs):
    folder, c, _ = theirs
    (folder / "config.json").write_text(json.dumps({**c, "vocab_size": V + 2}))
    plain = Tokenizer(read_tokenizer(folder))
    model = (folder / "tokenizer.model").read_bytes()
    assert plain.ends == [plain.eos] and plain.model == model
    # Ends alone are kept with the model, and its file is exported as it was.
    more = [plain.eos, 9, 7, 9]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": more}))
    ending = Tokenizer(read_tokenizer(folder))
    assert ending.ends == [plain.eos, 9, 7] and ending.encode(CORPUS[0]) == plain.encode(CORPUS[0])
    assert families.generation_of(ending)["eos_token_id"] == ending.ends
    assert tokenizer_files(ending)["tokenizer.model"] == model
    pytest.importorskip("tokenizers")
    # As chat models are published: an end of its own, and the old one still ends a response.
    beside = {
        "eos_token": "<|im_end|>",
        "added_tokens_decoder": {str(plain.size): {"content": "<|im_end|>"}},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(beside))
    ends = [plain.size, plain.eos]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    taken = Tokenizer(read_tokenizer(folder))
    assert taken.ends == ends and taken.size == plain.size + 1
    for text in (*CORPUS[:3], " a  b ", "\n", "▁x", "é 😀", ""):
        assert taken.encode(text) == plain.encode(text)
        assert taken.decode([*taken.encode(text), *ends]) == text
    assert taken.ended([[5, plain.eos], [5, plain.size], [5]]) == [taken.decode([5])] * 2

    # Exported, and imported again.
    for name, content in tokenizer_files(taken).items():
        (folder / name).write_bytes(content)
    (folder / "tokenizer.model").unlink()
    (folder / "generation_config.json").write_text(json.dumps(families.generation_of(taken)))
    first, again = json.loads(taken.model), json.loads(read_tokenizer(folder))
    # Its roles were exported as a chat template, which it has now.
    templates = [one["plumb_special"].pop("chat_template") for one in (first, again)]
    assert templates[0] is None and templates[1] and again == first


# --- tokenizers that are not ours, in other tools

NORMALIZED = {"normalization_rule_name": "nmt_nfkc"}
PLAIN = {"normalization_rule_name": "identity", "byte_fallback": True}
TRAINED = {
    "bpe": {"model_type": "bpe", **PLAIN},
    "bpe, spaces kept": {"model_type": "bpe", "remove_extra_whitespaces": False, **PLAIN},
    "bpe, symbols": {"model_type": "bpe", "user_defined_symbols": ["<tag>", "\n"], **PLAIN},
    "bpe, normalised": {"model_type": "bpe", **NORMALIZED},
    "unigram": {"model_type": "unigram", **PLAIN},
    "unigram, normalised": {"model_type": "unigram", **NORMALIZED},
}
TEXTS = (
    *CORPUS[:4],
    *(
        "",
        " ",
        "hello world",
        "  two  spaces ",
        "\n    return x",
        "a<tag> b",
        "é 😀 日本",
        "½ ﬁ Ａ",
    ),
)


def foreign_models():
    """Yield name and bytes of SentencePiece models that are not Plumb's."""
    for name, options in TRAINED.items():
        out = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS),
            model_writer=out,
            vocab_size=330,
            hard_vocab_limit=False,
            minloglevel=2,
            **options,
        )
        yield name, out.getvalue()
    found = importlib.util.find_spec("mistral_common")
    if found is not None:
        for name in ("tokenizer.model.v1", "mistral_instruct_tokenizer_240323.model.v3"):
            path = pathlib.Path(found.submodule_search_locations[0]) / "data" / name
            yield name, path.read_bytes()


def test_a_tokenizer_json_of_a_sentencepiece_model_gives_its_ids():
    tokenizers = pytest.importorskip("tokenizers")
    for name, model in foreign_models():
        pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        made = tokenizers.Tokenizer.from_str(json.dumps(tokenizer_json(model)))
        for text in TEXTS:
            ids = pieces.encode(text)
            assert made.encode(text, add_special_tokens=False).ids == ids, (name, text)
            assert made.decode(ids, skip_special_tokens=False) == pieces.decode(ids), (name, text)


def test_exported_tokenizers_give_the_same_ids_in_transformers(tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    for name, model in foreign_models():
        tokenizer = Tokenizer(model)
        for family in ("llama", "mistral", "qwen3", "gemma"):
            folder = tmp_path / name / family
            folder.mkdir(parents=True)
            (folder / "config.json").write_text(json.dumps({"model_type": family}))
            for file_name, content in tokenizer_files(tokenizer).items():
                (folder / file_name).write_bytes(content)
            reader = transformers.AutoTokenizer.from_pretrained(folder)
            for text in TEXTS:
                ids = tokenizer.encode(text)
                assert reader(text)["input_ids"] == [tokenizer.bos, *ids], (name, family, text)
                # Without a pad of its own, a run pads with unk, and leaves it out of a text.
                if tokenizer.pad not in ids:
                    assert reader.decode(ids) == tokenizer.decode(ids), (name, family, text)
        # Where that is not sure for every text, the user is told.
        assert ("normalised" in name or "unigram" in name) == ("note" in capsys.readouterr().err)


# --- whole exports


def test_an_export_leaves_nothing_behind_and_gives_all_its_files(tmp_path):
    c = SHAPE | CONFIGS["llama 2"]
    theirs = write(tmp_path / "theirs", c, checkpoint(c))
    model, params = weights.load(theirs)
    tokenizer = Tokenizer(read_tokenizer(theirs))
    killed, alive = (tmp_path / f".ours.{number:08x}.partial" for number in (1, 2))
    lock = lock_run(tmp_path / "ours", alive)
    killed.mkdir()
    weights.save(tmp_path / "ours", model, params, tokenizer)
    os.close(lock)
    assert not killed.exists() and alive.exists()
    modes = {path.name: path.stat().st_mode for path in (tmp_path / "ours").iterdir()}
    assert len(set(modes.values())) == 1 and "generation_config.json" in modes, modes


def test_an_export_says_what_made_the_model(tmp_path):
    c = SHAPE | CONFIGS["llama 2"]
    run_of(write(tmp_path / "theirs", c, checkpoint(c)), tmp_path / "run")
    argv = [f"--run={tmp_path}/run", f"--write={tmp_path}/ours", "--license=apache-2.0"]
    weights.main(config.parse(weights.Config, argv))
    card = (tmp_path / "ours" / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\n") and "| script | weights |" in card
    assert "# ours" in card and str(tmp_path) not in card
