"""Chat templates of Hugging Face models: Jinja programs that write a conversation as one text.

A template is rendered as transformers does it, in Jinja's sandbox, with one exception: it is told
no date, so that a conversation is the same text on every day. Read are the first of
chat_template.jinja, chat_template.json, and the `chat_template` of tokenizer_config.json.
"""

import functools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from data.bad_rows import RecordRefused
from data.messages import Message
from runtime.errors import UserError
from runtime.foreign import TEXT, Kind, check_values, either, file_in, one_line
from runtime.foreign import read_object_if_there as read

TEMPLATE_FILE = "chat_template.jinja"
"""Its name in a folder."""
NAMED_TEMPLATES = Kind(
    "a list of templates, one with the name `default`",
    lambda value: type(value) is list and _default_of(value) is not None,
)
KINDS = {"chat_template": either(TEXT, NAMED_TEMPLATES)}


class ChatTemplate:
    """A template that has been compiled."""

    def __init__(self, source: str, tokens: Mapping[str, str]):
        """Compile `source`; raises UserError for what is no template, and without Jinja.

        `tokens`: spellings of special tokens by the names that templates have for them, such as
        `bos_token`.
        """
        self.source = source
        self._tokens = dict(tokens)
        self._template = _compiled(source)

    def render(self, messages: Sequence[Message], opens_answer: bool) -> str:
        """Return the conversation as a text; with `opens_answer`, the beginning of an answer too.

        Raises RecordRefused for messages that the template does not take, such as a system's turn,
        and UserError where it fails otherwise.
        """
        turns = [{name: message[name] for name in ("role", "content")} for message in messages]
        try:
            return self._template.render(
                messages=turns,
                add_generation_prompt=opens_answer,
                tools=None,
                documents=None,
                **self._tokens,
            )
        except RecordRefused as fault:
            raise RecordRefused(f"the model's chat template: {one_line(fault)}") from None
        # A template can fail in any way that a program can.
        except Exception as fault:
            raise UserError(f"the model's chat template: {one_line(fault)}") from None


@functools.cache
def _compiled(source: str) -> Any:
    """Return Jinja's template."""
    try:
        import jinja2
    except ImportError:
        raise UserError(
            "this model's chat template needs a package more: pip install -r requirements-hf.txt"
        ) from None
    try:
        return _environment().from_string(source)
    except jinja2.TemplateSyntaxError as fault:
        raise UserError(
            f"the model's chat template, line {fault.lineno}: {one_line(fault)}; restore it"
        ) from None


@functools.cache
def _environment() -> Any:
    """Return what templates are compiled in: the sandbox, and what transformers adds to it."""
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """{% generation %} marks what the assistant wrote; here it is written as it stands."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _as_json
    environment.globals["raise_exception"] = _refuse
    return environment


def _as_json(value: Any, **options: Any) -> str:
    """Return JSON as transformers has it: no letter is escaped for HTML."""
    return json.dumps(value, **{"ensure_ascii": False, **options})


def _refuse(message: str) -> NoReturn:
    """Refuse the messages, as a template asks for it."""
    raise RecordRefused(message)


# --- in folders


def read_template(folder: pathlib.Path) -> str | None:
    """Return the chat template of a Hugging Face folder, or None; raises UserError."""
    path = file_in(folder, TEMPLATE_FILE)
    if path.exists():
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as fault:
            raise UserError(f"{path}: not UTF-8 ({one_line(fault)}); restore it") from None
    for name in ("chat_template.json", "tokenizer_config.json"):
        content = read(folder / name)
        check_values(folder / name, content, KINDS)
        template = content.get("chat_template")
        if template is not None:
            return template if type(template) is str else _default_of(template)
    return None


def _default_of(templates: Any) -> str | None:
    """Return the template named `default` of a list of {"name", "template"}."""
    for entry in templates:
        if type(entry) is dict and entry.get("name") == "default":
            return entry.get("template") if type(entry.get("template")) is str else None
    return None
