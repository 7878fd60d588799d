"""A reward in a process of its own, behind HTTP: for train_grpo.py, train_raft.py and decoding/best_of_n.py.

    python -m rewards.serve --reward=runs/align/rm --port=8600
    python train_grpo.py --init=runs/align/sft --reward=http://127.0.0.1:8600 --run=runs/served

One POST a batch: {"tokenizer": SHA-256, "texts": [B], "records": [B], "batch": {name: [B][...]}} is answered by
{"scores": [B]}; a server of your own may look at texts and records alone. Nothing is kept between two questions, so
it may be killed and started again at any time: whoever asked waits. It knows no passwords; keep it to one machine.
"""

import dataclasses
import http.server
import json
import traceback

import numpy as np

from data.tokenizer import Tokenizer
from rewards.scorer import SENT, is_function, make_scorer
from runtime import flags
from runtime.errors import UserError
from sharding import MeshConfig, make_mesh, to_mesh


@dataclasses.dataclass(frozen=True)
class Config:
    reward: str = "runs/align/rm"
    """A run of train_rm.py, or module:function, called with (response, record)."""
    tokenizer: str | None = None
    """Run or .model file whose tokenizer the askers have; None: that of --reward."""
    host: str = "127.0.0.1"
    port: int = 8600
    mesh: MeshConfig = MeshConfig()


def make_answer(config: Config):
    """answer(question) -> {"scores": one a response}; raises UserError for a question it cannot answer."""
    mesh = make_mesh(config.mesh)
    if config.tokenizer is None and is_function(config.reward):
        raise UserError(
            f"--reward={config.reward}: a function has no tokenizer; give --tokenizer, the askers' run"
        )
    tokenizer = Tokenizer.load(config.tokenizer or config.reward)
    models, score = make_scorer([config.reward], tokenizer, mesh)
    types = {name: np.float32 if name == "mask_BR" else np.int32 for name in SENT}

    def answer(question: dict) -> dict[str, list[float]]:
        try:
            theirs, records, sent = question["tokenizer"], question["records"], question["batch"]
            batch = {name: np.array(sent[name], types[name]) for name in SENT} if records else {}
        except (KeyError, TypeError, ValueError) as fault:
            raise UserError(
                f"not a question about a batch ({type(fault).__name__}: {fault})"
            ) from None
        if theirs != tokenizer.sha256:
            raise UserError(
                f"the server's tokenizer is {tokenizer.sha256[:12]}, the asker's is {theirs[:12]}"
            )
        if not records:
            return {"scores": []}
        scores, _ = score(models, to_mesh(batch, mesh), records)
        return {"scores": np.asarray(scores[config.reward]).tolist()}

    return answer


def make_server(config: Config) -> http.server.HTTPServer:
    """A server that is bound and will answer once `serve_forever` runs; raises UserError."""
    answer = make_answer(config)

    class Handler(http.server.BaseHTTPRequestHandler):
        timeout = 60  # of one read, lest a silent asker keep the others waiting

        def do_POST(self) -> None:
            try:
                asked = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                status, body = 200, json.dumps(answer(json.loads(asked))).encode()
            except (UserError, json.JSONDecodeError) as fault:
                status, body = 400, str(fault).encode()
            except Exception as fault:
                status, body = 500, f"{type(fault).__name__} on the server: {fault}".encode()
                traceback.print_exc()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_request(self, *_) -> None:
            """Batches are not announced; faults are."""

    try:
        return http.server.HTTPServer((config.host, config.port), Handler)
    except (OSError, OverflowError) as fault:
        raise UserError(
            f"--host={config.host}, --port={config.port}: {fault}; give another port"
        ) from None


def main(config: Config) -> None:
    with make_server(config) as server:
        print(f"{config.reward} answers at http://{config.host}:{server.server_port}", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    flags.run(main, Config)
