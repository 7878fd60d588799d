"""What happens to a command whose terminal goes away, and a chat in one that stays."""

import pathlib
import signal
import subprocess
import sys

import jax
import pytest

import generate
from data.tokenizer import Tokenizer
from runtime.errors import UserError
from tasks import world, world_gold

ROOT = pathlib.Path(__file__).parents[1]
COMMAND = """
import sys
from runtime import terminal
from runtime.errors import UserError
terminal.prepare()
if {lasts}:
    terminal.outlive_stdout()
try:
    for number in range(5000):
        print("×", number, chr(0xdcff))
    print("told ×", file=sys.stderr, flush=True)
    sys.stdout.flush()
    open({done!r}, "w").close()
except UserError as fault:
    print("error:", fault, file=sys.stderr)
    raise SystemExit(2)
except terminal.PipeClosed:
    terminal.end_by_pipe()
"""
ENDS = {
    # How it is started: how a command ends that is there to be read, and if its work is done.
    "{} > /dev/null": (0, True),
    "{} | head -1": (128 + signal.SIGPIPE, False),
    "{} | true": (128 + signal.SIGPIPE, False),
    "{} 2>&1 | head -1": (128 + signal.SIGPIPE, False),
    "{} > /dev/full": (2, False),
    "{} >&-": (0, True),
    "{} > /dev/null 2>&-": (0, True),
    "{} > /dev/null 2> /dev/full": (0, True),
    "{} > /dev/null 2> >(true)": (0, True),
    "{} >&- 2>&- <&-": (0, True),
    "PYTHONIOENCODING=ascii {} > /dev/null": (0, True),
    "LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 {} > /dev/null": (0, True),
}


@pytest.mark.parametrize("lasts", [False, True])
def test_a_terminal_that_goes_away_ends_no_training_and_no_tool_with_a_traceback(tmp_path, lasts):
    done = tmp_path / "done"
    (tmp_path / "command.py").write_text(COMMAND.format(lasts=lasts, done=str(done)))
    command = f"PYTHONPATH={ROOT} {sys.executable} {tmp_path}/command.py"
    for how, (code, is_done) in ENDS.items():
        done.unlink(missing_ok=True)
        shell = f"{how.format(command)}; exit ${{PIPESTATUS[0]}}".replace("LC_ALL", "env LC_ALL")
        ended = subprocess.run(["bash", "-c", shell], capture_output=True, timeout=60)
        assert b"Traceback" not in ended.stderr and b"ignored" not in ended.stderr, how
        assert ended.returncode == (0 if lasts else code), (how, ended.stderr)
        assert done.exists() == (lasts or is_done), how


# --- a chat


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    texts = [world.demonstration(i)["response"] for i in range(200)]
    return Tokenizer.train(texts, tmp_path_factory.mktemp("tokenizer"), 400)


def chat(tokenizer, monkeypatch, lines, answers=(), room=40, pasted=()):
    """Chat by typing `lines`; return the prompts that were answered, as texts, and the last reply.

    `answers`: texts, or faults to be raised. `pasted`: numbers of the lines, from 0, that another
    one is pasted after.
    """
    typed = iter(lines)
    taken = []

    def next_line(prompt=""):
        try:
            taken.append(next(typed))
        except StopIteration:
            raise EOFError from None
        return taken[-1]

    monkeypatch.setattr("builtins.input", next_line)
    monkeypatch.setattr("sys.stdin", Terminal())
    monkeypatch.setattr("select.select", lambda *_: [[0]] if len(taken) - 1 in pasted else [[]])
    prompts = []
    replies = iter(answers)

    def reply(tokens, key):
        prompts.append(tokenizer.decode(tokens))
        answer = next(replies, "ok.")
        if isinstance(answer, BaseException):
            raise answer
        return tokenizer.encode(answer)

    last = generate.chat(reply, tokenizer, jax.random.key(0), room)
    return prompts, last


class Terminal:
    """A terminal's stdin."""

    def isatty(self):
        return True


def test_a_message_that_is_too_long_is_refused_and_forgets_nothing(tokenizer, monkeypatch, capsys):
    lines = ["hello.", "what? " * 40, "and now?", ""]
    prompts, last = chat(tokenizer, monkeypatch, lines)
    assert prompts == ["hello.", "hello.ok.and now?"] and last == "ok."
    assert "[too long: " in capsys.readouterr().out


def test_what_is_forgotten_to_make_room_is_told(tokenizer, monkeypatch, capsys):
    lines = [f"hello {number}." for number in range(6)]
    prompts, _ = chat(tokenizer, monkeypatch, lines, room=24)
    assert prompts[0] == "hello 0." and prompts[-1].endswith("hello 5.")
    assert "hello 0." not in prompts[-1] and "forgotten to make room" in capsys.readouterr().out


def test_ctrl_c_stops_the_reply_and_keeps_the_chat(tokenizer, monkeypatch, capsys):
    lines = ["hello.", "stop this.", "and now?"]
    answers = ["one.", KeyboardInterrupt(), "two."]
    prompts, last = chat(tokenizer, monkeypatch, lines, answers)
    assert prompts == ["hello.", "hello.one.stop this.", "hello.one.and now?"] and last == "two."
    assert "[stopped" in capsys.readouterr().out


def test_a_reply_that_was_cut_off_is_told(tokenizer, monkeypatch, capsys):
    part = tokenizer.encode("ok.")
    for tokens, is_told in ((part, True), ([*part, tokenizer.eos], False)):

        def reply(so_far, key, tokens=tokens):
            return tokens

        monkeypatch.setattr("generate.read_message", iter(["hello.", ""]).__next__)
        assert generate.chat(reply, tokenizer, jax.random.key(0), 40) == "ok."
        shown = capsys.readouterr().out
        assert (f"[cut off at --max_new_tokens={len(part)}]" in shown) == is_told


def test_lines_pasted_together_or_between_quotes_are_one_message(tokenizer, monkeypatch):
    lines = ["a", "", "b", '"""c', "", 'd"""', '"""e"""', "/clear", "f"]
    prompts, _ = chat(tokenizer, monkeypatch, lines, pasted=(0, 1), room=99)
    assert prompts == ["a\n\nb", "a\n\nbok.c\n\nd", "a\n\nbok.c\n\ndok.e", "f"]


def test_a_models_control_characters_do_not_reach_the_terminal(tokenizer, monkeypatch, capsys):
    chat(tokenizer, monkeypatch, ["hello."], ["\x1b]52;c;ZXZpbA==\x07\x9b2J"])
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\x07" not in out and "\x9b" not in out and "\\x1b]52" in out


def test_questions_that_are_proposed_can_be_answered(tmp_path):
    for question in generate.QUESTIONS:
        assert world_gold.parse(question)
    for data, is_told in (("world", True), ("mine.jsonl", False)):
        (tmp_path / "config.json").write_text(f'{{"script": "train_sft", "data": "{data}"}}')
        assert (generate.QUESTIONS[0] in generate.introduction(str(tmp_path))) == is_told


@pytest.mark.parametrize(
    "fields",
    [{"n": 0}, {"chat": True, "n": 2}, {"chat": True, "prompt": "a"}, {"prompt": "\udcff"}],
)
def test_flags_that_cannot_be_are_refused_before_the_run_is_read(fields):
    with pytest.raises(UserError, match="--"):
        generate.main(generate.Config(run="nowhere", **fields))
