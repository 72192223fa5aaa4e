"""Data files: JSON objects, and the conversations in them."""

import collections
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from .settings import Settings

# Names of roles in conversations, ours and those of ShareGPT.
ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}
DEFAULT_MESSAGES = ("messages", "conversations")


def read_rows(path: str | os.PathLike) -> Iterator[tuple[str, dict]]:
    """The objects of a JSONL file or of a JSON list, each with its place: "FILE, line 3".

    Raises:
        OSError: no such file.
        ValueError: a line that is not a JSON object.
    """
    data = Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf")
    if data.lstrip().startswith(b"["):
        try:
            rows = json.loads(data)
        except ValueError as error:
            raise ValueError(f"{path} begins like a JSON list, but is none: {error}.") from None
        numbered = ((f"{path}, item {number}", row) for number, row in enumerate(rows, start=1))
    else:
        lines = ((f"{path}, line {number}", line) for number, line in enumerate(data.split(b"\n"), start=1))
        numbered = ((place, _parsed(place, line)) for place, line in lines if line.strip())
    for place, row in numbered:
        if not isinstance(row, dict):
            raise ValueError(
                f"{place}: expected an object with columns, got {json.dumps(row, ensure_ascii=False)!s:.60}"
            )
        yield place, row


def _parsed(place: str, line: bytes) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:  # a UnicodeDecodeError is a ValueError
        raise ValueError(f"{place} is not JSON in UTF-8 ({error}): {line.strip()[:60]!r}") from None


class Conversations:
    """Reads rows as conversations of messages that end with an answer to learn.

    Attributes:
        unused: how many rows have something in a column that is not read, by the column's name.
    """

    def __init__(self, settings: Settings):
        self.question, self.answer, self.messages = (
            settings.prompt_column,
            settings.response_column,
            settings.messages_column,
        )
        named = {name: getattr(settings, f"{name}_column") for name in ("input", "system", "history")}
        self.named = [name for name in named.values() if name]
        # A column that has not been named is read where there is one, unless it is the question or the answer.
        self.input, self.system, self.history = (
            name or (default if default not in (self.question, self.answer) else None)
            for default, name in named.items()
        )
        self.unused: collections.Counter[str] = collections.Counter()

    def of(self, place: str, row: dict) -> list[list[dict]]:
        """The conversations of a row. Raises ValueError with what is wrong."""
        half = re.search("[\ud800-\udfff]", json.dumps(row, ensure_ascii=False))
        if half:
            raise ValueError(f"{place} holds half a character, {half[0]!r}: an emoji was cut in two.")
        column = self.messages
        if not column and self.question not in row:
            column = next((name for name in DEFAULT_MESSAGES if name in row), None)
        needed = [column] if column else [self.question, self.answer]
        for name in [*needed, *self.named]:
            if name not in row:
                raise ValueError(
                    f"{place} has no column {name!r}; its columns are {', '.join(map(repr, row))}. Name them with "
                    "--prompt-column and --response-column, or --messages-column."
                )
        system = _text(place, row, self.system)
        head = [{"role": "system", "content": system}] if system else []
        conversations = self._answers(place, row, column) if column else [self._round(place, row)]
        read = {*needed, self.system, *(() if column else (self.input, self.history))}
        self.unused.update(name for name, value in row.items() if name not in read and value not in (None, "", [], {}))
        return [head + conversation for conversation in conversations]

    def _answers(self, place: str, row: dict, column: str) -> list[list[dict]]:
        """A list of messages up to its first, second, … answer."""
        messages = []
        for entry in row[column] if isinstance(row[column], list) else [row[column]]:
            names = ("from", "value") if isinstance(entry, dict) and "from" in entry else ("role", "content")
            role, text = (entry.get(name) if isinstance(entry, dict) else None for name in names)
            if not isinstance(role, str) or role not in ROLES or not isinstance(text, str) or not text.strip():
                raise ValueError(
                    f"{place}: expected {column!r} to hold messages with a role ({', '.join(ROLES)}) and a text, got "
                    f"{json.dumps(entry, ensure_ascii=False):.80}"
                )
            self.unused.update(f"{column}: {name}" for name, value in entry.items() if name not in names and value)
            messages.append({"role": ROLES[role], "content": text})
        roles = [message["role"] for message in messages]
        ends = [i for i in range(1, len(roles)) if roles[i - 1 : i + 1] == ["user", "assistant"]]
        if not ends:
            raise ValueError(f"{place}: {column!r} has no answer of the assistant to a question.")
        if ends[-1] + 1 < len(messages):
            self.unused[f"{column}: messages after the last answer"] += 1
        return [messages[: end + 1] for end in ends]

    def _round(self, place: str, row: dict) -> list[dict]:
        """The messages of a row with a question, an answer and perhaps earlier rounds."""
        question, answer = (_text(place, row, name) for name in (self.question, self.answer))
        for name, text in ((self.question, question), (self.answer, answer)):
            if not text:
                raise ValueError(f"{place}: the column {name!r} is empty.")
        more = _text(place, row, self.input)
        messages = []
        rounds = row.get(self.history) or []
        for pair in rounds if isinstance(rounds, list) else [rounds]:
            if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
                raise ValueError(
                    f"{place}: expected {self.history!r} to hold pairs [question, answer], got {pair!r:.60}"
                )
            messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
        messages.append({"role": "user", "content": f"{question}\n{more}" if more else question})
        messages.append({"role": "assistant", "content": answer})
        return messages


def _text(place: str, row: dict, name: str | None) -> str | None:
    """The text in a column; None where there is none but white space."""
    text = row.get(name)
    if text is not None and not isinstance(text, str):
        raise ValueError(f"{place}: the column {name!r} is no text: {text!r:.60}")
    return text if text and text.strip() else None
