"""The text of an answer, piece by piece: what the whole text would have given, in constant work for each token."""

import random
from pathlib import Path

import pytest

from chatglm_int8 import ChatGLMTokenizer
from chatglm_int8.apps.answer_text import settled
from chatglm_int8.apps.server.answer_text import AnswerText
from chatglm_int8.chat_chatglm import ChatMixin
from chatglm_int8.tokenization_chatglm import _overlap

ROOT = Path(__file__).resolve().parent.parent


class WholeText:
    """The same as `AnswerText`, from the whole text at each token."""

    def __init__(self, tokenizer, process=None, stop=()):
        self.stopped, self.length, self.shown, self.raw = False, 0, 0, ""
        self.decoder, self.process, self.stop = tokenizer.decode_stream(), process, stop

    def step(self, token_id: int) -> str:
        self.raw += self.decoder.step(token_id)
        return self.advance(last=False)

    def finish(self) -> str:
        self.raw += self.decoder.flush()
        return self.advance(last=True)

    def advance(self, last: bool) -> str:
        if self.stopped:
            return ""
        text = self.raw
        if self.process is not None:
            space = text[len(text.rstrip()) :]
            text = self.process(text)
            self.length = len(text)
            text = text and text + space
            text = text if last else settled(text)
        else:
            self.length = len(text)
        found = [(text.find(stop, self.shown), len(stop)) for stop in self.stop]
        stops = [(place + length, place) for place, length in found if place >= 0]
        self.stopped = bool(stops)
        end = min(stops)[1] if stops else len(text)
        if not last and not stops:
            end -= max((_overlap(text[self.shown :], stop) for stop in self.stop), default=0)
        if self.process is not None:
            end = len(text[:end].rstrip())
        piece, self.shown = text[self.shown : end], max(self.shown, end)
        return piece


@pytest.fixture(scope="module")
def tokenizer():
    return ChatGLMTokenizer(ROOT / "ice_text.model")


def test_pieces_are_those_of_the_whole_text(tokenizer):
    """For ids of the vocabulary: half characters, line breaks, blanks, the date and punctuation at characters."""
    generator = random.Random(7)
    texts = [
        "[[训练时间]]",
        "[[训练时",
        "间]]",
        "[[[",
        "中,",
        "文!",
        "a:",
        ";中",
        "? ",
        "\n",
        "   ",
        "\t",
        "é🙂",
        "年,",
    ]
    parts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    bytes_of = [[index] for index in range(len(tokenizer)) if tokenizer.convert_ids_to_tokens(index).startswith("<0x")]
    process = ChatMixin().process_response
    stopped = 0
    for case in range(1500):
        ids = []
        while len(ids) < 25:
            kind = generator.random()
            source = parts if kind < 0.6 else bytes_of if kind < 0.75 and bytes_of else None
            ids += generator.choice(source) if source else [generator.randrange(len(tokenizer))]
        stop = generator.sample(["中", "，", "2023", "a:", "\n", " ", "间]]", "[["], k=generator.choice([0, 0, 1, 2]))
        chat = process if case % 3 else None
        got, expected = AnswerText(tokenizer, chat, stop), WholeText(tokenizer, chat, stop)
        for token_id in ids:
            assert got.step(token_id) == expected.step(token_id), (ids, stop)
            assert (got.length, got.stopped) == (expected.length, expected.stopped), (ids, stop)
        assert got.finish() == expected.finish(), (ids, stop)
        stopped += got.stopped
    assert 100 < stopped < 1400


def test_work_does_not_grow_with_the_answer():
    """`process` sees what is new and one character before it."""
    longest = 0

    def process(text: str) -> str:
        nonlocal longest
        longest = max(longest, len(text))
        return ChatMixin().process_response(text)

    class Words:
        def decode_stream(self):
            return type("Stream", (), {"step": lambda _, i: "word ", "flush": lambda _: ""})()

    text = AnswerText(Words(), process, ["stop"])
    assert "".join([text.step(index) for index in range(3000)]) + text.finish() == " ".join(["word"] * 3000)
    assert longest < 20
