"""The reward server: what it answers, and what it refuses without falling over."""

import contextlib
import copy
import http.client
import http.server
import json
import socket
import threading
import time

import pytest
from running import fails

from data.tokenizer import Tokenizer
from rewards import serve
from rewards.client import ask
from runtime.errors import UserError
from tasks import rules, world

TEXTS = ["yes.", "it is stockholm, the capital of sweden.", "no."]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    texts = [world.demonstration(i)["response"] for i in range(200)]
    return Tokenizer.train(texts, folder / "t.model", 400), folder / "t.model"


@pytest.fixture(scope="module")
def server(tokenizer):
    config = serve.Config(
        reward="tasks.rules:brief", tokenizer=str(tokenizer[1]), port=0, max_mib=1
    )
    with serve.make_server(config) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def question_of(tokenizer, texts):
    """Return a question about `texts`, each after a prompt of two tokens."""
    rows = [[*tokenizer.encode(text), tokenizer.eos][:30] for text in texts]
    padded = [row + [tokenizer.pad] * (30 - len(row)) for row in rows]
    real = [[1] * len(row) + [0] * (30 - len(row)) for row in rows]
    batch = {
        "tokens_BT": [[2, 5, *row] for row in padded],
        "segment_ids_BT": [[1, 1, *row] for row in real],
        "positions_BT": [list(range(32)) for _ in rows],
        "response_BR": padded,
        "mask_BR": real,
    }
    records = [{"prompt": "hello."}] * len(texts)
    return {
        "tokenizer": tokenizer.sha256, "texts": list(texts), "records": records, "batch": batch,
    }  # fmt: skip


def post(server, body, **headers):
    """Post `body`, bytes or what JSON can hold; return (status, text)."""
    if not isinstance(body, bytes):
        body = json.dumps(body).encode()
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    named = {"Content-Type": "application/json", **named}
    connection.request("POST", "/", body, named)
    with contextlib.closing(connection):
        response = connection.getresponse()
        return response.status, response.read().decode()


@pytest.mark.parametrize("count", [1, 3, 12])
def test_rows_need_not_divide_among_the_devices(server, tokenizer, count):
    texts = (TEXTS * 4)[:count]
    status, text = post(server, question_of(tokenizer[0], texts))
    assert status == 200
    assert json.loads(text)["scores"] == [rules.brief(text, {}) for text in texts]


def other(change):
    """Return a change of a question as a function, for the list below."""

    def changed(question):
        change(question)
        return question

    return changed


WRONG = {
    "no JSON": lambda q: b"{",
    "not UTF-8": lambda q: b'{"a": "\xff"}',
    "a list": lambda q: [q],
    "null": lambda q: None,
    "a number": lambda q: 3,
    "deep": lambda q: b"[" * 100_000,
    "no tokenizer": other(lambda q: q.pop("tokenizer")),
    "another tokenizer": other(lambda q: q.update(tokenizer="0" * 64)),
    "a number for a tokenizer": other(lambda q: q.update(tokenizer=7)),
    "records as text": other(lambda q: q.update(records="abc")),
    "records of texts": other(lambda q: q.update(records=["a", "b", "c"])),
    "too few records": other(lambda q: q["records"].pop()),
    "too few texts": other(lambda q: q["texts"].pop()),
    "texts of numbers": other(lambda q: q.update(texts=[1, 2, 3])),
    "batch a list": other(lambda q: q.update(batch=[])),
    "batch null": other(lambda q: q.update(batch=None)),
    "an array missing": other(lambda q: q["batch"].pop("mask_BR")),
    "ragged rows": other(lambda q: q["batch"]["tokens_BT"][0].pop()),
    "a row missing": other(lambda q: q["batch"]["tokens_BT"].pop()),
    "one axis": other(lambda q: q["batch"].update(mask_BR=[1, 1, 1])),
    "texts for tokens": other(lambda q: q["batch"]["tokens_BT"][0].__setitem__(0, "5")),
    "a fraction": other(lambda q: q["batch"]["tokens_BT"][0].__setitem__(0, 1.5)),
    "a negative token": other(lambda q: q["batch"]["response_BR"][0].__setitem__(0, -1)),
    "an endless token": other(lambda q: q["batch"]["tokens_BT"][0].__setitem__(0, 10**40)),
    "a token beyond int32": other(lambda q: q["batch"]["tokens_BT"][0].__setitem__(0, 2**31)),
    "mask NaN": other(lambda q: q["batch"]["mask_BR"][0].__setitem__(0, float("nan"))),
    "mask 1e9": other(lambda q: q["batch"]["mask_BR"][0].__setitem__(0, 1e9)),
    "mask of truth": other(lambda q: q["batch"].update(mask_BR=[[True] * 30] * 3)),
    "another width": other(lambda q: q["batch"].update(mask_BR=[[1] * 29] * 3)),
    "positions beyond": other(lambda q: q["batch"]["positions_BT"][0].__setitem__(0, 32)),
}


def test_what_is_no_question_is_refused_in_a_line(server, tokenizer, capsys):
    question = question_of(tokenizer[0], TEXTS)
    for name, change in WRONG.items():
        status, text = post(server, change(copy.deepcopy(question)))
        assert (name, status) == (name, 400) and "\n" not in text and text
    assert post(server, question)[0] == 200
    assert "Traceback" not in capsys.readouterr().err


def test_requests_that_are_no_askers_are_refused(server, tokenizer):
    question = question_of(tokenizer[0], TEXTS)
    assert post(server, question, Content_Type="text/plain")[0] == 415
    assert post(server, question, Host="attacker.example:80")[0] == 403
    assert post(server, question, Content_Length="-1")[0] == 400
    assert post(server, question, Content_Length="many")[0] == 400
    assert post(server, b" " * (2 << 20))[0] == 413
    for host in ("localhost:8600", "127.0.0.1", "[::1]:8600"):
        assert post(server, question, Host=host)[0] == 200


def test_a_drip_is_cut_off_and_holds_up_no_one(server, tokenizer, monkeypatch):
    monkeypatch.setattr(serve, "DEADLINE", 1.0)
    address = ("127.0.0.1", server.server_port)
    head = "POST / HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.create_connection(address) as slow, socket.create_connection(address) as silent:
        slow.sendall(f"{head}Content-Length: 1000\r\n\r\n".encode())
        began = time.monotonic()
        assert post(server, question_of(tokenizer[0], TEXTS))[0] == 200
        assert time.monotonic() - began < 1
        # A byte at a time, until it is answered.
        slow.settimeout(0.1)
        answer = b""
        while not answer and time.monotonic() - began < 10:
            slow.sendall(b" ")
            with contextlib.suppress(TimeoutError):
                answer = slow.recv(1000)
        assert b" 408 " in answer and time.monotonic() - began < 5
        silent.settimeout(10)
        assert silent.recv(1000) == b""


@pytest.mark.parametrize("path", ["/", "/score", "/score?model=a&n=2", "/?n=1"])
def test_the_whole_address_is_asked(path):
    asked = []

    class Echo(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            asked.append(self.path)
            body = b'{"scores": [1.0]}'
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *unused):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Echo) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        # Without a path the root is asked.
        given = path.removeprefix("/") if path == "/" else path
        address = f"http://127.0.0.1:{server.server_port}{given}"
        question = {"tokenizer": "", "texts": ["a"], "records": [{}], "batch": {}}
        assert ask(address, question) == [1.0]
    assert asked == [path]


def test_a_server_takes_some_question(capsys):
    assert "--max_mib=0: must be at least 1" in fails(serve, ["--max_mib=0"], capsys)


def test_a_server_for_all_says_so_and_a_function_needs_a_tokenizer():
    assert serve.is_loopback("127.0.0.9") and serve.is_loopback("::1")
    assert not serve.is_loopback("0.0.0.0") and not serve.is_loopback("myhost")
    with pytest.raises(UserError, match="give --tokenizer"):
        serve.make_answer(serve.Config(reward="tasks.rules:brief"))
