"""Serve a reward from a process of its own, over HTTP.

    python -m rewards.serve --reward=runs/align/rm --port=8600
    python train_grpo.py --init=runs/align/sft --reward=http://127.0.0.1:8600 --run=runs/served

For train_ppo.py, train_grpo.py, train_raft.py and decoding/best_of_n.py. One POST of JSON a batch:
{"tokenizer": SHA-256, "texts": [B], "records": [B], "batch": {name: [B][...]}} is answered by
{"scores": [B]}; a server of your own may look at texts and records alone. No question depends on
another, so the server may be killed and started again at any time: whoever asked waits.

A question that no rollout makes is answered by 400 and one line, one above --max_mib by 413, one
that has not arrived within a minute by 408. Askers do not wait for one another's lines, and are
scored one at a time. The server asks for no password: keep it to one machine. It then answers
nobody who calls the machine by another name, nor a web page.
"""

import runtime.interrupt  # noqa: F401

import contextlib
import dataclasses
import http.server
import ipaddress
import json
import socket
import sys
import threading
import traceback
import urllib.parse
from collections.abc import Callable, Mapping
from email.message import Message
from typing import Any

import numpy as np

from data.tokenizer import Tokenizer
from model_config import stored_model
from responses import filled
from rewards.client import SENT
from rewards.scorer import is_function, make_reward_scorer
from runtime import flags
from runtime.errors import UserError
from runtime.terminal import printable
from sharding import MeshConfig, along, make_mesh, to_mesh

Answer = Callable[[dict[str, Any]], dict[str, list[float]]]
DEADLINE = 60.0
"""Seconds in which a question must have arrived, and its answer been taken."""
LARGEST_ID = 2**31 - 1
"""Largest token id where no model says."""


class Refused(Exception):
    """A request that is not answered: an HTTP status, and a line that says why."""

    def __init__(self, status: int, fault: str):
        super().__init__(fault)
        self.status = status


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
    max_mib: int = 64
    """Largest question, in MiB."""
    mesh: MeshConfig = MeshConfig()
    """Devices along each axis."""


def make_answer(config: Config) -> Answer:
    """Load the reward; return answer(question) -> {"scores": one float a response}.

    `question`: as rewards/client.py sends it, parsed from JSON; one without responses gets [].
    Threads may call answer together: they are scored one at a time. Raises UserError for a reward
    that cannot be loaded; answer does for a question that it cannot answer.
    """
    mesh = make_mesh(config.mesh)
    if config.tokenizer is None and is_function(config.reward):
        raise UserError(
            f"--reward={config.reward}: a function has no tokenizer; give --tokenizer, "
            "the askers' run"
        )
    tokenizer = Tokenizer.load(config.tokenizer or config.reward)
    models, score = make_reward_scorer([config.reward], tokenizer, mesh)
    ids = LARGEST_ID if is_function(config.reward) else stored_model(config.reward).vocab
    # Rows are dealt evenly to the devices along these.
    ways = along(mesh, "data", "fsdp")
    one_at_a_time = threading.Lock()

    def answer(question: dict[str, Any]) -> dict[str, list[float]]:
        try:
            theirs = question["tokenizer"]
            records = records_of(question)
            batch = arrays_of(question["batch"], len(records), ids) if records else {}
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as fault:
            raise UserError(
                f"not a question about a batch ({type(fault).__name__}: {fault})"
            ) from None
        if theirs != tokenizer.sha256:
            raise UserError(
                f"the server's tokenizer is {tokenizer.sha256[:12]}, "
                f"the asker's is {str(theirs)[:12]}"
            )
        # An empty question asks whether others would be answered.
        if not records:
            return {"scores": []}

        # As many rows for each device; what is filled up with is cut off.
        rows = -(-len(records) // ways) * ways
        batch = {name: np.stack(filled(list(array), rows)) for name, array in batch.items()}
        with one_at_a_time:
            scores, _ = score(models, to_mesh(batch, mesh), filled(records, rows))
        return {"scores": np.asarray(scores[config.reward])[: len(records)].tolist()}

    return answer


def records_of(question: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the records of a question, one a text.

    Raises ValueError, KeyError or TypeError for a question that has them otherwise.
    """
    texts = question["texts"]
    records = question["records"]
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError("texts: must be a list of texts")
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise ValueError("records: must be a list of objects")
    if len(texts) != len(records):
        raise ValueError(f"{len(texts)} texts and {len(records)} records: must be as many")
    return records


def arrays_of(sent: Mapping[str, Any], rows: int, ids: int) -> dict[str, np.ndarray]:
    """Return the arrays SENT by name, int32 but `mask_BR` float32, from the lists that JSON has.

    Each has `rows` rows; token ids are below `ids`. Raises KeyError, TypeError, ValueError or
    OverflowError for arrays that no rollout has.
    """
    arrays = {}
    for name in SENT:
        given = np.array(sent[name])
        # Numbers: no texts, no truth values, no rows of several lengths, no endless integers.
        if given.dtype.kind not in "iuf" or given.ndim != 2 or len(given) != rows:
            raise ValueError(f"{name}: must be {rows} rows of numbers, of one length")
        arrays[name] = given
    tokens_BT, segments_BT, positions_BT, response_BR, mask_BR = arrays.values()
    if not tokens_BT.shape == segments_BT.shape == positions_BT.shape:
        raise ValueError("tokens_BT, segment_ids_BT and positions_BT: must have one shape")
    if response_BR.shape != mask_BR.shape or mask_BR.shape[1] > tokens_BT.shape[1]:
        raise ValueError("response_BR and mask_BR: must have one shape, no longer than tokens_BT")

    # Each within its range; a fraction or a NaN is in none.
    ends = dict(zip(SENT, (ids, LARGEST_ID, tokens_BT.shape[1], ids, 2), strict=True))
    for name, array in arrays.items():
        end = ends[name]
        inside = (array >= 0) & (array < end) & (array == np.floor(array))
        if not inside.all():
            raise ValueError(f"{name}: must be whole numbers from 0 to below {end}")
        arrays[name] = array.astype(np.float32 if name == "mask_BR" else np.int32)
    return arrays


# --- HTTP


class Server(http.server.ThreadingHTTPServer):
    """A thread for each asker: a slow one holds up no other."""

    request_queue_size = 128

    def __init__(self, config: Config, answer: Answer):
        """Bind to the address; raises OSError or OverflowError."""
        self.config = config
        self.answer = answer
        super().__init__((config.host, config.port), Handler)


class Handler(http.server.BaseHTTPRequestHandler):
    """Answer one POST.

    200; 4xx for a question that is wrong, too large or too slow to arrive, and for one from a
    web page; 500 for a fault.
    """

    server: Server
    timeout = DEADLINE

    def handle(self) -> None:
        """Answer; what has not arrived after DEADLINE seconds, however slowly, is cut off."""
        self.is_late = False
        self.timer = threading.Timer(DEADLINE, self.cut_off)
        self.timer.daemon = True
        self.timer.start()
        # Whoever asked may be gone.
        with contextlib.suppress(OSError):
            super().handle()
        self.timer.cancel()

    def cut_off(self) -> None:
        """Let whoever reads from the connection see its end."""
        self.is_late = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RD)

    def do_POST(self) -> None:
        """Answer a question."""
        try:
            question = self.question()
            self.timer.cancel()
            self.reply(200, json.dumps(self.server.answer(question)))
        except Refused as fault:
            self.skip_body()
            self.reply(fault.status, str(fault))
        except (UserError, ValueError, RecursionError) as fault:
            self.reply(400, str(fault))
        except OSError:
            raise
        except Exception as fault:
            # The server goes on; whoever asked gets this line.
            traceback.print_exc()
            self.reply(500, f"{type(fault).__name__} on the server: {fault}")

    def question(self) -> dict[str, Any]:
        """Read the question; raise Refused, or ValueError for what is no JSON."""
        check_origin(self.headers, self.server.config.host)
        size = content_length(self.headers, self.server.config.max_mib)
        body = self.rfile.read(size)
        if self.is_late:
            raise Refused(408, f"the question did not arrive within {DEADLINE:.0f} s")
        question = json.loads(body)
        if not isinstance(question, dict):
            raise ValueError("not a question about a batch: must be a JSON object")
        return question

    def skip_body(self) -> None:
        """Read the rest of a question that is refused: only then does its sender listen."""
        stated = self.headers.get("Content-Length", "")
        left = int(stated) if stated.isdecimal() else 0
        while left > 0:
            piece = self.rfile.read(min(left, 1 << 20))
            if not piece:
                return
            left -= len(piece)

    def reply(self, status: int, text: str) -> None:
        """Send the answer, or the reason why there is none."""
        body = text.encode(errors="replace")
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_request(self, *_: Any) -> None:
        """Print nothing for a batch; faults are printed."""

    def log_message(self, form: str, *args: Any) -> None:
        """Print what HTTP's own code says of bytes that may be anything."""
        print(printable(f"{self.client_address[0]}: {form % args}"), file=sys.stderr)


def content_length(headers: Message, max_mib: int) -> int:
    """Return how many bytes a request's body has, from its headers.

    Raises Refused without a length or above `max_mib` MiB, and ValueError for what is no number.
    """
    stated = headers.get("Content-Length")
    if stated is None:
        raise Refused(411, "give a Content-Length")
    if not stated.strip().isdecimal():
        raise ValueError(f"Content-Length: {stated}: must be a number of bytes")
    if int(stated) > max_mib << 20:
        raise Refused(
            413,
            f"{int(stated):,} bytes: more than the server's --max_mib={max_mib}; raise it, "
            "or lower --batch_size",
        )
    return int(stated)


def check_origin(headers: Message, host: str) -> None:
    """Raise Refused for what a page in someone's browser could send to the server at `host`.

    Such a page cannot say that it sends JSON without asking first, which is never answered; nor,
    where the server listens at this machine alone, that it asks for this machine.
    """
    kind = headers.get("Content-Type") or ""
    if kind.partition(";")[0].strip().lower() != "application/json":
        raise Refused(415, "Content-Type: must be application/json")
    asked = urllib.parse.urlsplit(f"//{headers.get('Host')}").hostname or ""
    if is_loopback(host) and not is_loopback(asked):
        raise Refused(403, f"Host: {asked}: serve with --host to be asked from elsewhere")


def is_loopback(host: str) -> bool:
    """Tell whether `host`, a name or an address, is of this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def make_server(config: Config) -> http.server.HTTPServer:
    """Return a server bound to its port, which answers once `serve_forever` runs.

    Raises UserError for a reward that cannot be loaded or a port that cannot be had.
    """
    answer = make_answer(config)
    try:
        return Server(config, answer)
    except (OSError, OverflowError) as fault:
        raise UserError(
            f"--host={config.host}, --port={config.port}: {fault}; give another port"
        ) from None


def main(config: Config) -> None:
    """Serve until the process is ended. Raises UserError as `make_server` does."""
    with make_server(config) as server:
        if not is_loopback(config.host):
            print(
                f"warning: --host={config.host}: whoever reaches this machine may ask; "
                "there is no password",
                file=sys.stderr,
            )
        print(f"{config.reward} answers at http://{config.host}:{server.server_port}", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    flags.run(main, Config)
