"""The text of an answer, and the part of it that each token adds."""

import collections
import dataclasses
from collections.abc import Callable, Sequence

from ...tokenization_chatglm import _overlap
from ..answer_text import settled
from .answers import Token


class AnswerText:
    """Text of an answer, piece by piece, up to the stop string that is complete first.

    The pieces of all steps and of `finish`, joined, are what the whole answer would have given: text that a later token
    may change, or that may be the beginning of a stop string, appears once that is decided.

    Args:
        tokenizer: whose ids they are.
        process: `model.process_response` for an answer in a chat, or None for text as it is.
        stop: strings that end the text and are not part of it.
        begun: ids of the answer that the prompt has already; their text is not given again.

    Attributes:
        stopped: a stop string was found.
        length: of the text that the ids so far stand for, whether it is certain or not.
    """

    def __init__(
        self,
        tokenizer,
        process: Callable[[str], str] | None = None,
        stop: list[str] | None = None,
        begun: Sequence[int] = (),
    ):
        self.stopped = False
        self._decoder = tokenizer.decode_stream()
        self._process = process
        self._stop = stop or []
        self._shown = self.length = len("".join([self._decoder.step(token_id) for token_id in begun]))
        self._pending = ""  # what `process` may change yet
        self._left = ""  # stands for the text before it, of which `process` sees one character
        self._rest = ""  # certain and not shown: white space, and what a stop string may begin with

    def step(self, token_id: int) -> str:
        """Takes the next id and returns the text that is certain now. Once `stopped`, there is no more."""
        return self._advance(self._decoder.step(token_id), last=False)

    def finish(self) -> str:
        """Returns what was kept back, at the end of the answer."""
        return self._advance(self._decoder.flush(), last=True)

    def _advance(self, new: str, last: bool) -> str:
        """Constant work for each token: only text that is not shown yet is looked at."""
        if self.stopped:
            return ""
        text = new if self._process is None else self._processed(new, last)
        self._rest += text
        found = [(self._rest.find(stop), len(stop)) for stop in self._stop]
        # The one that is complete first, however the text is cut into tokens.
        stops = [(place + length, place) for place, length in found if place >= 0]
        self.stopped = bool(stops)
        end = min(stops)[1] if stops else len(self._rest)
        if not last and not stops:
            end -= max((_overlap(self._rest, stop) for stop in self._stop), default=0)
        if self._process is not None:
            self.length = self._shown + len((self._rest + self._pending).rstrip())
            end = len(self._rest[:end].rstrip())
        piece, self._rest = self._rest[:end], self._rest[end:]
        self._shown += end
        if self._process is None:
            self.length = self._shown + len(self._rest)
        return piece

    def _processed(self, new: str, last: bool) -> str:
        """The processed text that becomes certain with the next characters."""
        raw = self._left + self._pending + new
        text = self._process(raw)
        # The end of a response is stripped, but more may come, and a stop string may be in it.
        text = text and text[len(self._left) :] + raw[len(raw.rstrip()) :]
        certain = text if last else settled(text)
        self._pending = text[len(certain) :]  # as it was: `process` has not changed it
        if certain:
            self._left = "x" if certain[-1].isspace() else certain[-1]  # a space would be stripped
        return certain


class TokenTexts:
    """The part of an answer's text that each token adds. Joined, the parts are the text.

    A token is given out once the text up to its end is certain and another token has come: the last one takes what is
    left of the text. A token that completes no character has no text.
    """

    def __init__(self, begun: int):
        """`begun`: length of the text before the first token."""
        self._tokens: collections.deque[tuple[Token, int]] = collections.deque()  # each with the length up to its end
        self._text = ""  # what is certain and not given out
        self._given = begun

    def add(self, token: Token, text: str, length: int) -> None:
        """A token, the text that has become certain with it, and the `length` of its `AnswerText`."""
        self._text += text
        self._tokens.append((token, length))

    def take(self) -> list[Token]:
        """The tokens with certain text, since the last call."""
        taken = []
        while len(self._tokens) > 1 and self._tokens[0][1] <= self._given + len(self._text):
            token, length = self._tokens.popleft()
            taken.append(self._cut(token, max(length - self._given, 0)))
        return taken

    def finish(self, text: str) -> list[Token]:
        """All other tokens, given the end of the text; it belongs to the last one."""
        self._text += text
        taken = [self._cut(token, max(length - self._given, 0)) for token, length in self._tokens]
        if taken:
            taken[-1] = dataclasses.replace(taken[-1], text=taken[-1].text + self._text)
        self._tokens.clear()
        return taken

    def _cut(self, token: Token, size: int) -> Token:
        text, self._text = self._text[:size], self._text[size:]
        self._given += len(text)
        return dataclasses.replace(token, text=text)
