"""Stand-ins without a model: a tokenizer of letters, sources in memory, samplers that are told."""

from types import SimpleNamespace

from data.sources import Source
from responses import LoadedRun


class Letters:
    """A tokenizer with a token for each letter: its code. Control tokens are below 10."""

    pad = 0
    bos = 1
    eos = turn_end = 2
    ends = (2,)
    user = 3
    assistant = 4
    system = 5
    size = 128
    sha256 = "letters"
    word_starts = frozenset()

    def encode(self, text):
        return [ord(letter) for letter in text]

    def decode(self, ids):
        return "".join(chr(i) for i in ids if i >= 10)

    def ended(self, responses):
        return [self.decode(ids) for ids in responses if ids and ids[-1] == self.eos]

    def newlines(self):
        return [ord("\n")]

    def chat(self, messages):
        tokens, mask = [self.bos], [0]
        for message in messages:
            is_answer = message["role"] == "assistant"
            end = [self.eos] if is_answer else []
            content = [*self.encode(message["content"]), *end]
            tokens += [getattr(self, message["role"]), *content]
            mask += [0] + [int(is_answer)] * len(content)
        return tokens, mask

    def prompt(self, messages):
        if isinstance(messages, str):
            messages = said(messages)
        return [*self.chat(messages)[0], self.assistant]

    def answer(self, text):
        """Return the tokens of a whole response."""
        return [*self.encode(text), self.eos]


def said(*contents):
    """Return messages of the user and the assistant in turn."""
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]


def source_of(records, name="tests"):
    return Source(name, range(len(records)), records.__getitem__)


def open_in_memory(records, opened=None):
    """Stand in for open_source: the same records whatever is asked for, which `opened` notes."""

    def open_source(data, schema, split, *, seed=0):
        if opened is not None:
            opened.append((data, schema, split))
        return source_of(records, data)

    return open_source


def load_letters(run, reward=False):
    """Stand in for load_run: a model of some context, whose parameters are its folder's name."""
    return LoadedRun(SimpleNamespace(context=512), Letters(), run)


def told(answers, calls=None):
    """Stand in for make_sampler: respond gives `answers[prompt's last text]`, lists of tokens.

    n of them to each prompt, over and over where there are fewer. `calls` gets the prompts' number
    of each call.
    """

    def make_sampler(config, sampling, tokenizer, n=1, **options):
        def respond(params, prompts, key, rows=256):
            if calls is not None:
                calls.append(len(prompts))
            responses = []
            for prompt in prompts:
                own = answers[Letters().decode(prompt)]
                responses += [own[i % len(own)] for i in range(n)]
            return responses

        return respond

    return make_sampler
