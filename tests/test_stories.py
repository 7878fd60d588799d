"""The llama2.c importer: against an independent forward pass, and on real weights against the C program's text."""

import pathlib
import struct
import sys

import jax.numpy as jnp
import numpy as np

import config
import generate
from checkpoint import load_params
from config import load_config
from data.tokenizer import Tokenizer
from model import LanguageModel, ModelConfig, pure

sys.path.append(str(pathlib.Path(__file__).parents[1] / "experiments" / "stories"))
import import_llama2c


def imported(*argv):
    return import_llama2c.main(config.parse(import_llama2c.Config, [str(a) for a in argv]))


def forward(weights, tokens, heads, kv_heads):
    """llama2.c's own arithmetic in float64: rows are outputs, RoPE turns 2i with 2i + 1."""
    embed, norm1, wq, wk, wv, wo, norm2, w1, w2, w3, final = (np.asarray(w, np.float64) for w in weights)
    norm = lambda x, scale: x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * scale  # noqa: E731
    x_TD = embed[tokens]
    T, D = x_TD.shape
    H = D // heads

    def turned(x_TNH):
        angle = np.arange(T)[:, None] * 10_000.0 ** (-np.arange(0, H, 2) / H)
        z = (x_TNH[..., 0::2] + 1j * x_TNH[..., 1::2]) * np.exp(1j * angle)[:, None]
        return np.stack([z.real, z.imag], -1).reshape(x_TNH.shape)

    for layer in range(len(wq)):
        h = norm(x_TD, norm1[layer])
        q, k, v = ((h @ w[layer].T).reshape(T, -1, H) for w in (wq, wk, wv))
        q, k = turned(q), turned(k)
        out = np.zeros((T, heads, H))
        for t in range(T):
            for n in range(heads):
                scores = k[: t + 1, n * kv_heads // heads] @ q[t, n] / np.sqrt(H)
                p = np.exp(scores - scores.max())
                out[t, n] = (p / p.sum()) @ v[: t + 1, n * kv_heads // heads]
        x_TD = x_TD + out.reshape(T, D) @ wo[layer].T
        h = norm(x_TD, norm2[layer])
        gate = h @ w1[layer].T
        x_TD = x_TD + (gate / (1 + np.exp(-gate)) * (h @ w3[layer].T)) @ w2[layer].T
    return norm(x_TD, final) @ embed.T


def test_a_random_checkpoint_gives_the_logits_of_an_independent_forward_pass(tmp_path, capsys):
    tokenizer = Tokenizer.train(["a small text to train on"], tmp_path / "t.model", 300)
    D, F, L, N, K, V, T = 16, 24, 2, 4, 2, tokenizer.size, 32
    rng = np.random.default_rng(0)
    shapes = [(V, D), (L, D), (L, D, D), (L, D // 2, D), (L, D // 2, D), (L, D, D), (L, D), (L, F, D), (L, D, F)]
    weights = [rng.normal(size=s).astype("<f4") * 0.3 for s in [*shapes, (L, F, D), (D,)]]
    rope = np.zeros((2, T, D // N // 2), "<f4")
    content = struct.pack("<7i", D, F, L, N, K, V, T) + b"".join(w.tobytes() for w in [*weights, rope])
    (tmp_path / "model.bin").write_bytes(content)
    imported(tmp_path / "model.bin", tmp_path / "t.model", f"--run={tmp_path}/run")

    tokens_1T = rng.integers(0, V, (1, 9))
    model = ModelConfig(**load_config(f"{tmp_path}/run")["model"])
    ones = jnp.ones((1, 9), jnp.int32)
    logits, _ = pure(LanguageModel(model))[1](load_params(f"{tmp_path}/run"), tokens_1T, ones, jnp.arange(9)[None])
    np.testing.assert_allclose(logits[0], forward(weights, tokens_1T[0], N, K), atol=1e-4)


def test_real_weights_print_what_the_c_program_prints(shared_data, tmp_path, capsys):
    folder = shared_data / "stories260k"
    imported(folder / "stories260K.bin", folder / "tok512.model", f"--run={tmp_path}/run")
    capsys.readouterr()
    argv = [f"--run={tmp_path}/run", "--prompt=", "--temperature=0", "--max_new_tokens=200", "--raw"]
    generate.main(config.parse(generate.Config, argv))
    assert capsys.readouterr().out == (folder / "golden.txt").read_text()
