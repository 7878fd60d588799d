"""Serve a reward from a process of its own, over HTTP.

    python -m rewards.serve --reward=runs/align/rm --port=8600
    python train_grpo.py --init=runs/align/sft --reward=http://127.0.0.1:8600 --run=runs/served

For train_ppo.py, train_grpo.py, train_raft.py and decoding/best_of_n.py. One POST a batch:
{"tokenizer": SHA-256, "texts": [B], "records": [B], "batch": {name: [B][...]}} is answered by
{"scores": [B]}; a server of your own may look at texts and records alone. No question depends on
another, so the server may be killed and started again at any time: whoever asked waits. It asks
for no password; keep it to one machine.
"""

import runtime.interrupt  # noqa: F401

import dataclasses
import http.server
import json
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np

from data.tokenizer import Tokenizer
from rewards.client import SENT
from rewards.scorer import is_function, make_reward_scorer
from runtime import flags
from runtime.errors import UserError
from sharding import MeshConfig, make_mesh, to_mesh

Answer = Callable[[dict[str, Any]], dict[str, list[float]]]
TYPES = {name: np.float32 if name == "mask_BR" else np.int32 for name in SENT}


@dataclasses.dataclass(frozen=True)
class Config:
    reward: str = "runs/align/rm"
    """A run of train_rm.py, or module:function, called with (response, record)."""
    tokenizer: str | None = None
    """Run or .model file whose tokenizer the askers have; None: that of --reward."""
    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0: all of this machine's."""
    port: int = 8600
    """Port to listen at; 0: any that is free."""
    mesh: MeshConfig = MeshConfig()
    """Devices along each axis."""


def make_answer(config: Config) -> Answer:
    """Load the reward; return answer(question) -> {"scores": one a response}.

    `question`: as rewards/client.py sends it, parsed from JSON. Raises UserError for a reward that
    cannot be loaded; answer does for a question that it cannot answer.
    """
    mesh = make_mesh(config.mesh)
    if config.tokenizer is None and is_function(config.reward):
        raise UserError(
            f"--reward={config.reward}: a function has no tokenizer; give --tokenizer, "
            "the askers' run"
        )
    tokenizer = Tokenizer.load(config.tokenizer or config.reward)
    models, score = make_reward_scorer([config.reward], tokenizer, mesh)

    def answer(question: dict[str, Any]) -> dict[str, list[float]]:
        # Parts that are missing or of another form.
        try:
            theirs = question["tokenizer"]
            records = question["records"]
            batch = arrays_of(question["batch"]) if records else {}
        except (KeyError, TypeError, ValueError) as fault:
            raise UserError(
                f"not a question about a batch ({type(fault).__name__}: {fault})"
            ) from None
        if theirs != tokenizer.sha256:
            raise UserError(
                f"the server's tokenizer is {tokenizer.sha256[:12]}, the asker's is {theirs[:12]}"
            )
        # An empty question asks whether others would be answered.
        if not records:
            return {"scores": []}
        scores, _ = score(models, to_mesh(batch, mesh), records)
        return {"scores": np.asarray(scores[config.reward]).tolist()}

    return answer


def arrays_of(sent: dict[str, Any]) -> dict[str, np.ndarray]:
    """Return the arrays SENT of the lists that JSON has.

    Raises KeyError, TypeError or ValueError.
    """
    return {name: np.array(sent[name], TYPES[name]) for name in SENT}


def make_handler(answer: Answer) -> type[http.server.BaseHTTPRequestHandler]:
    """Make the class that answers one POST each: 200, 400 for a bad question, 500 for a fault."""

    class Handler(http.server.BaseHTTPRequestHandler):
        # Seconds for one read: a silent asker must not keep the others waiting.
        timeout = 60

        def do_POST(self) -> None:
            try:
                length = int(self.headers.get("Content-Length", 0))
                question = json.loads(self.rfile.read(length))
                self.reply(200, json.dumps(answer(question)))
            except (UserError, json.JSONDecodeError) as fault:
                self.reply(400, str(fault))
            except Exception as fault:
                # The server goes on; whoever asked ends with this line.
                traceback.print_exc()
                self.reply(500, f"{type(fault).__name__} on the server: {fault}")

        def reply(self, status: int, text: str) -> None:
            body = text.encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_request(self, *_: Any) -> None:
            """Print nothing for a batch; faults are printed."""

    return Handler


def make_server(config: Config) -> http.server.HTTPServer:
    """Return a server bound to its port, which answers once `serve_forever` runs.

    Raises UserError for a reward that cannot be loaded or a port that cannot be had.
    """
    handler = make_handler(make_answer(config))
    try:
        return http.server.HTTPServer((config.host, config.port), handler)
    except (OSError, OverflowError) as fault:
        raise UserError(
            f"--host={config.host}, --port={config.port}: {fault}; give another port"
        ) from None


def main(config: Config) -> None:
    """Serve until the process is ended."""
    with make_server(config) as server:
        print(f"{config.reward} answers at http://{config.host}:{server.server_port}", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    flags.run(main, Config)
