"""Tokenizer of ChatGLM-6B: a SentencePiece vocabulary, the marks of the prompt, the chat format.

A sequence reads `context [gMASK] <sop> answer <eop>`. The vocabulary file `ice_text.model` is a serialised
SentencePiece `ModelProto` (unigram, `nmt_nfkc`, dummy prefix, byte fallback; format: google/sentencepiece,
`src/sentencepiece_model.proto`). Line breaks, tabs and runs of 2 to 80 spaces have pieces of their own, since
SentencePiece itself would fold them into one space.
"""

import dataclasses
import os
import re
from collections.abc import Iterable, Mapping
from types import SimpleNamespace
from typing import Any, ClassVar

import transformers
from sentencepiece import SentencePieceProcessor

if int(transformers.__version__.split(".")[0]) < 5:  # as in configuration_chatglm; this file stands alone
    raise ImportError(
        f"This code needs transformers 5 or newer, but version {transformers.__version__} is installed: "
        "pip install -U 'transformers>=5'."
    )

from transformers import BatchEncoding, PreTrainedTokenizer
from transformers.utils import to_py_obj

try:  # transformers asks for jinja2 itself, at the first chat template
    from jinja2.exceptions import TemplateError
except ImportError:
    TemplateError = Exception

VOCABULARY_NAME = "ice_text.model"
TRAINED_LENGTH = 2048

# Pieces for white space, each with the text that it stands for.
WHITE_SPACE = {"<n>": "\n", "<|tab|>": "\t", **{f"<|blank_{k}|>": " " * k for k in range(2, 81)}}
WHITE_SPACE_PIECES = {text: piece for piece, text in WHITE_SPACE.items()}
BYTES = {f"<0x{value:02X}>": value for value in range(256)}
CONTROL = ("<s>", "</s>", "<pad>", "[MASK]", "[gMASK]", "<sop>", "<eop>")

# Decoding drops the space before these, one replacement after the other. The release decodes so, by the default of its
# time; `clean_up_tokenization_spaces=False` leaves program text as it is.
CLEAN_UP = (
    *((f" {mark}", mark) for mark in ".?!,"),
    (" ' ", "'"),
    *((f" {ending}", ending) for ending in ("n't", "'m", "'s", "'ve", "'re")),
)
# Where a replacement may begin.
_CLEAN_UP_START = re.compile(f" (?:[{re.escape(''.join(sorted({spaced[1] for spaced, _ in CLEAN_UP})))}]|\\Z)")

# The normaliser of the vocabulary (nmt_nfkc) deletes this character. Put inside the name of a special token, it hides
# the name from the search for special tokens and changes no other id.
DELETED = "\x01"

# The prompt that the model was trained on. Alone, a query is its own prompt; otherwise rounds are counted from 0.
# Messages become rounds of a question and an answer so:
#
#   user                a question; several in a row are one, joined by line breaks
#   assistant           an answer, joined likewise; one before all questions answers an empty question
#   system, developer   lines before the round of the unanswered question, or of the next one; nothing if blank
#
# The last round needs a question. If it has an answer too, that stands behind [gMASK]<sop>. In messages the names of
# special tokens are spoilt by U+0001, so that a prompt that is rendered outside of this tokenizer can be encoded too.
# (`apply_chat_template` spoils them before: it has all names, and continue_final_message looks for the very message.)
CHAT_TEMPLATE = r"""
{#- The {% generation %} is all behind [gMASK]<sop>. return_assistant_tokens_mask finds
    these marks in the ids, so the template does without that tag, and jinja2 alone can read it. -#}
{%- macro text(message) -%}
  {%- set content = message['content'] -%}
  {%- set joined -%}
    {%- if content is string -%}{{- content -}}
    {%- elif content is defined and content is iterable and content is not mapping -%}
      {%- for part in content -%}
        {%- if part is mapping and part['type'] == 'text' and part['text'] is string -%}{{- part['text'] -}}
        {%- else -%}
          {{- raise_exception('Content may only have parts {"type": "text", "text": ...}: '
                              ~ 'this model reads text alone.') -}}
        {%- endif -%}
      {%- endfor -%}
    {%- else -%}
      {{- raise_exception('The content of a message has to be a string or a list of text parts; '
                          ~ 'the one of a message with role "' ~ message['role'] ~ '" is not.') -}}
    {%- endif -%}
  {%- endset -%}
  {{- joined | replace('[MASK]', '[\x01MASK]') | replace('<sop>', '<\x01sop>') | replace('<eop>', '<\x01eop>')
             | replace('<pad>', '<\x01pad>') | replace('<unk>', '<\x01unk>') -}}
{%- endmacro -%}
{%- if tools or documents -%}
  {{- raise_exception('This model was not trained on tools or documents: leave them out, or put '
                      ~ 'them in the text of a system message.') -}}
{%- endif -%}
{%- set now = namespace(rounds=[], system='', question=none, answer=none) -%}
{%- for message in messages -%}
  {%- set role = message['role'] -%}
  {%- if role not in ['system', 'developer', 'user', 'assistant'] -%}
    {%- set expected = 'user' if now.question is none or now.answer is not none else 'assistant' -%}
    {{- raise_exception('Message ' ~ loop.index0 ~ ' has role "' ~ role ~ '" where "' ~ expected
                        ~ '" was expected: roles are "system" (or "developer"), "user" and "assistant".') -}}
  {%- endif -%}
  {%- set said = text(message) -%}
  {%- if role == 'assistant' -%}
    {%- set now.answer = said if now.answer is none else now.answer ~ '\n' ~ said -%}
  {%- else -%}
    {%- if now.answer is not none -%}
      {%- set now.rounds = now.rounds + [[now.system, now.question or '', now.answer]] -%}
      {%- set now.system = '' -%}{%- set now.question = none -%}{%- set now.answer = none -%}
    {%- endif -%}
    {%- if role == 'user' -%}
      {%- set now.question = said if now.question is none else now.question ~ '\n' ~ said -%}
    {%- elif said | trim -%}
      {%- set now.system = now.system ~ said ~ '\n' -%}
    {%- endif -%}
  {%- endif -%}
{%- endfor -%}
{%- if now.question is none -%}
  {{- raise_exception('A conversation needs a message with role "user" to answer: its last '
                      ~ 'question is the prompt.') -}}
{%- elif now.answer is not none and add_generation_prompt -%}
  {{- raise_exception('The last message is an answer already: pass continue_final_message=True to '
                      ~ 'go on with it, or end with a message of role "user".') -}}
{%- elif now.rounds or now.system -%}
  {%- for system, question, answer in now.rounds -%}
    {{- system ~ '[Round ' ~ loop.index0 ~ ']\n问：' ~ question ~ '\n答：' ~ answer ~ '\n' -}}
  {%- endfor -%}
  {{- now.system ~ '[Round ' ~ now.rounds | length ~ ']\n问：' ~ now.question ~ '\n答：' -}}
{%- elif now.question == '' -%}
  {{- raise_exception('The query is empty: there is nothing to answer.') -}}
{%- else -%}{{- now.question -}}
{%- endif -%}
{%- if now.answer is not none -%}{{- '[gMASK]<sop>' ~ now.answer ~ '<eop>' -}}
{%- elif add_generation_prompt -%}{{- '[gMASK]<sop>' -}}
{%- endif -%}
"""


class ConversationError(ValueError, TemplateError):
    """A conversation that has no prompt. Libraries catch jinja2's TemplateError."""


class DecodeStream:
    """Text of one answer, token by token, in constant work a token.

    The strings of all steps and of `flush`, joined, are `tokenizer.decode` of all ids. A character whose bytes come as
    several tokens appears with its last byte; bytes that can form no character become U+FFFD, one for each, as in
    SentencePiece. A space that the next token may make superfluous (see `CLEAN_UP`) appears with that token.

    Args:
        tokenizer: whose ids they are.
        skip_special_tokens: leave out `<unk>` and special tokens that you added, too.
        clean_up_tokenization_spaces: as in `tokenizer.decode`.
        control_names: show control tokens by their names. They are left out otherwise.
    """

    def __init__(
        self,
        tokenizer: "ChatGLMTokenizer",
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        control_names: bool = False,
    ):
        if clean_up_tokenization_spaces is None:
            clean_up_tokenization_spaces = tokenizer.clean_up_tokenization_spaces
        self._tokenizer = tokenizer
        self._skipped = frozenset(tokenizer.all_special_ids if skip_special_tokens else ())
        self._named = tokenizer._control if control_names else frozenset()
        self._bytes = bytearray()
        self._started = False
        self._held = [""] * len(CLEAN_UP) if clean_up_tokenization_spaces else []

    def step(self, token_id: int) -> str:
        """Takes the next id and returns the text it completes, perhaps "". ValueError: an id outside the vocabulary."""
        token_id = int(token_id)
        if token_id in self._skipped:
            return ""
        return self._add(self._tokenizer.convert_ids_to_tokens(token_id))

    def flush(self) -> str:
        """Returns what is left at the end of the sequence."""
        return self._clean_up(self._characters(last=True), last=True)

    def _add(self, token: str) -> str:
        if token in BYTES:
            self._bytes.append(BYTES[token])
            text = self._characters(last=False)
        else:
            text = self._characters(last=True)
            text += self._surface(token, at_start=not (self._started or text))
        # The text behind a special token was encoded on its own, with a dummy prefix.
        self._started = token not in self._named and (self._started or text != "")
        return self._clean_up(text, last=False)

    def _characters(self, last: bool) -> str:
        text = ""
        while self._bytes:
            lead = self._bytes[0]
            length = 4 if 0xF0 <= lead < 0xF8 else 3 if lead >= 0xE0 else 2 if lead >= 0xC0 else 1
            head = bytes(self._bytes[:length])
            if len(head) < length and not last and all(byte & 0xC0 == 0x80 for byte in head[1:]):
                break
            try:
                text += head.decode("utf-8")
            except UnicodeDecodeError:
                text, length = text + "\ufffd", 1
            del self._bytes[:length]
        return text

    def _clean_up(self, text: str, last: bool) -> str:
        if not any(self._held) and not _CLEAN_UP_START.search(text):
            return text
        # Each replacement keeps back the end of the text that may begin what it replaces.
        for i, (held, (spaced, joined)) in enumerate(zip(self._held, CLEAN_UP, strict=False)):
            *done, rest = (held + text).split(spaced)
            keep = 0 if last else _overlap(rest, spaced)
            self._held[i] = rest[len(rest) - keep :]
            text = joined.join([*done, rest[: len(rest) - keep]])
        return text

    def _surface(self, token: str, at_start: bool) -> str:
        if token in WHITE_SPACE:
            return WHITE_SPACE[token]
        if token == "<unk>":
            return " ⁇ "
        if token not in self._tokenizer._vocabulary:  # added by the user
            return token
        if token in self._tokenizer._control:
            return token if token in self._named else ""
        if at_start:  # the dummy prefix
            token = token.removeprefix("▁")
        return token.replace("▁", " ")


class _ChatTemplates:
    """Conversations to prompts."""

    def apply_chat_template(
        self,
        conversation: list[dict] | list[list[dict]],
        tools: list | None = None,
        documents: list[dict] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        tokenize: bool = True,
        *,
        return_dict: bool = True,
        return_assistant_tokens_mask: bool = False,
        tokenizer_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Makes the prompt of one conversation, or of several.

        Arguments and results are those of `PreTrainedTokenizer.apply_chat_template`, but:

        - What stands in the messages never becomes a special token, with any template (`sanitize_control_tokens` of
          newer versions is always on), nor when the string of `tokenize=False` is encoded later.
        - A message may be any object with `role` and `content`.
        - `return_assistant_tokens_mask=True` gives `assistant_masks`, 1 for each token behind `[gMASK] <sop>`, `<eop>`
          too: earlier answers are context, which this model reads both ways.

        `CHAT_TEMPLATE` says which roles and orders there are. Ended by the user, a conversation gives the prompt, with
        `add_generation_prompt` and `[gMASK] <sop>`; ended by the assistant, `prompt [gMASK] <sop> answer <eop>`, or
        without `<eop>` with `continue_final_message`.

        Raises:
            ConversationError: a ValueError and jinja2's TemplateError: a mistake in a conversation.
        """
        if return_assistant_tokens_mask and not (tokenize and return_dict):
            raise ValueError("return_assistant_tokens_mask=True requires return_dict=True and tokenize=True.")
        kwargs.pop("sanitize_control_tokens", None)
        names = self.all_special_tokens
        try:
            out = super().apply_chat_template(
                _hide(_conversation(conversation), names),
                tools=_hide(tools, names),
                documents=_hide(documents, names),
                chat_template=chat_template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tokenize=tokenize,
                return_dict=return_dict,
                tokenizer_kwargs={**(tokenizer_kwargs or {}), "genuine_marks": True},
                **kwargs,
            )
        except TemplateError as error:
            if type(error) is not TemplateError:  # a mistake in the template, not in its input
                raise
            raise ConversationError(str(error)) from None
        if not tokenize:
            return self._show(out) if isinstance(out, str) else [self._show(text) for text in out]
        if return_assistant_tokens_mask:
            rows, attended = to_py_obj(out["input_ids"]), to_py_obj(out["attention_mask"])
            if isinstance(rows[0], int):
                out["assistant_masks"] = self._answer_mask(rows, attended)
            else:
                out["assistant_masks"] = [self._answer_mask(*row) for row in zip(rows, attended, strict=True)]
            out.convert_to_tensors(kwargs.get("return_tensors"))
        return out

    def _show(self, text: str) -> str:
        """Drops each U+0001 of a rendered conversation that keeps no name from being read."""
        if DELETED not in text:
            return text
        names = {*self.all_special_tokens, *(f"{self.gmask_token}{space}{self.bos_token}" for space in ("", " "))}
        names -= self._plain_names()
        shown = re.sub(f"{DELETED}(?!{'|'.join(re.escape(name[1:]) for name in names)})", "", text)
        return shown if self.tokenize(shown) == self.tokenize(text) else text

    def _answer_mask(self, ids: list[int], attention_mask: list[int]) -> list[int]:
        """1 for what stands behind `[gMASK] <sop>` and is no padding."""
        marks = self._find_marks(ids)
        start = len(ids) if marks is None else marks + 2
        return [0] * start + attention_mask[start:]


class _Decoding:
    """Ids to text."""

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Joins tokens to text: control tokens vanish, `<unk>` is " ⁇ ", bytes form characters."""
        stream = DecodeStream(self, clean_up_tokenization_spaces=False)
        return "".join([stream._add(token) for token in tokens]) + stream.flush()

    def decode(
        self,
        token_ids: Any,
        skip_special_tokens: bool | None = None,
        clean_up_tokenization_spaces: bool | None = None,
        **kwargs: Any,
    ) -> str | list[str]:
        """Turns ids into text.

        Args:
            token_ids: one id, the ids of a sequence, or several sequences, as lists, arrays or tensors.
            skip_special_tokens: None, the default, decodes as the release does, without control tokens; False shows
                them by their names, as `<eop>`; True leaves out `<unk>` and special tokens that you added, too.
            clean_up_tokenization_spaces: drop spaces before punctuation and English endings; None:
                as `tokenizer.clean_up_tokenization_spaces` says.
            kwargs: ignored, as in `PreTrainedTokenizer`.

        Returns the text, or the texts of several sequences. Raises ValueError for an id outside of the vocabulary.
        """
        token_ids = to_py_obj(token_ids)
        if isinstance(token_ids, int):
            token_ids = [token_ids]
        elif token_ids and isinstance(token_ids[0], (list, tuple)):
            return [self.decode(ids, skip_special_tokens, clean_up_tokenization_spaces) for ids in token_ids]
        names = skip_special_tokens is not None and not skip_special_tokens
        stream = DecodeStream(self, clean_up_tokenization_spaces=False, control_names=names)
        tokens = self.convert_ids_to_tokens(token_ids, bool(skip_special_tokens))
        text = "".join(map(stream._add, tokens)) + stream.flush()
        if clean_up_tokenization_spaces is None:
            clean_up_tokenization_spaces = self.clean_up_tokenization_spaces
        return self.clean_up_tokenization(text) if clean_up_tokenization_spaces else text

    def batch_decode(self, sequences: Any, skip_special_tokens: bool | None = None, *args: Any, **kwargs: Any):
        """Returns the texts of several sequences; arguments as of `decode`."""
        return super().batch_decode(sequences, skip_special_tokens, *args, **kwargs)

    def clean_up_tokenization(self, text: str) -> str:
        """Drops spaces before punctuation and English endings; `decode` does it by default."""
        for spaced, joined in CLEAN_UP:
            text = text.replace(spaced, joined)
        return text

    def decode_stream(
        self, skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool | None = None
    ) -> DecodeStream:
        """Returns an object that decodes one sequence token by token, without control tokens: a `DecodeStream`."""
        return DecodeStream(self, skip_special_tokens, clean_up_tokenization_spaces)


class ChatGLMTokenizer(_ChatTemplates, _Decoding, PreTrainedTokenizer):
    """Turns text into ids of ChatGLM-6B and back.

    Calling it returns `input_ids` and a 2-D `attention_mask` (1 = real), padded on the left unless `padding_side` says
    otherwise. Special tokens go behind the text: `a [gMASK] <sop>`, and for a pair `a [gMASK] <sop> b <eop>`.

    In plain text `[MASK]`, `<sop>`, `<eop>`, `<pad>`, `<unk>` and tokens that you added name those tokens, and the text
    on either side is encoded on its own; `[gMASK]` and `</s>` are ordinary text. With `split_special_tokens=True` no
    text can become a special token.

    The exception is `[gMASK]<sop>`, with no or one space between: text that has it is a finished prompt, to which an
    answer may be joined, and gets no marks behind it. So a string rendered by `apply_chat_template` gives the ids that
    `tokenize=True` gives, whatever `add_special_tokens` is. Without `add_generation_prompt` it has no marks, and is
    encoded like all plain text. U+0001 inside the names in it keeps typed text from becoming marks: leave it there.

    Args:
        vocab_file: path of `ice_text.model`.
        do_lower_case: lower the text first.
        remove_space: strip the text first, and fold white space inside it into one space.
        num_image_tokens: how many ids `<image_0>`, `<image_1>`, ... stand before the text ids, which are shifted up by
            as many. 0 in the release; 20000, the default, is what an old checkpoint without this setting means.
        bos_token, eos_token, end_token, mask_token, gmask_token, pad_token, unk_token: names.
        kwargs: of `PreTrainedTokenizer`; by default `model_max_length=2048, clean_up_tokenization_spaces=True`.

    Raises:
        FileNotFoundError: there is no vocabulary file.
        ValueError: the file is a Git LFS pointer, damaged, or no vocabulary of this model.
    """

    vocab_files_names: ClassVar[dict[str, str]] = {"vocab_file": VOCABULARY_NAME}
    model_input_names: ClassVar[list[str]] = ["input_ids", "attention_mask"]
    padding_side = "left"
    chat_template = CHAT_TEMPLATE
    SPECIAL_TOKENS_ATTRIBUTES: ClassVar[list[str]] = [
        *PreTrainedTokenizer.SPECIAL_TOKENS_ATTRIBUTES,
        "end_token",
        "gmask_token",
    ]

    def __init__(
        self,
        vocab_file: str | os.PathLike | None = None,
        *,
        do_lower_case: bool = False,
        remove_space: bool = False,
        num_image_tokens: int = 20000,
        bos_token: str = "<sop>",
        eos_token: str = "<eop>",
        end_token: str = "</s>",
        mask_token: str = "[MASK]",
        gmask_token: str = "[gMASK]",
        pad_token: str = "<pad>",
        unk_token: str = "<unk>",
        **kwargs: Any,
    ):
        tokens = {"bos_token": bos_token, "eos_token": eos_token, "end_token": end_token, "mask_token": mask_token}
        tokens |= {"gmask_token": gmask_token, "pad_token": pad_token, "unk_token": unk_token}
        self.vocab_file = vocab_file
        self.do_lower_case = do_lower_case
        self.remove_space = remove_space
        self.num_image_tokens = num_image_tokens
        self.sp_model = _load_vocabulary(vocab_file, kwargs.get("name_or_path"))
        pieces = [self.sp_model.id_to_piece(i) for i in range(self.sp_model.get_piece_size())]
        self._control = frozenset(p for i, p in enumerate(pieces) if self.sp_model.is_control(i))
        self._tokens = [f"<image_{i}>" for i in range(num_image_tokens)] + pieces
        self._vocabulary = {token: index for index, token in enumerate(self._tokens)}
        kwargs = {"model_max_length": TRAINED_LENGTH, "clean_up_tokenization_spaces": True, **kwargs}
        super().__init__(
            vocab_file=vocab_file,
            do_lower_case=do_lower_case,
            remove_space=remove_space,
            num_image_tokens=num_image_tokens,
            **tokens,
            **kwargs,
        )
        if self.chat_template is None:
            self.chat_template = CHAT_TEMPLATE

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args: Any, **kwargs: Any):
        """As in `PreTrainedTokenizer`, but an error for a missing or broken vocabulary file names that file."""
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except OSError as error:
            # transformers replaces the message of any OSError by one that names no file.
            if isinstance(error.__context__, FileNotFoundError):
                raise error.__context__ from None
            raise

    # Vocabulary

    @property
    def sp_tokenizer(self) -> SimpleNamespace:
        """Where the published code had the vocabulary: converters read `sp_tokenizer.text_tokenizer.sp`."""
        return SimpleNamespace(text_tokenizer=SimpleNamespace(sp=self.sp_model))

    @property
    def vocab_size(self) -> int:
        """Number of pieces and image tokens, without added tokens."""
        return len(self._tokens)

    def get_vocab(self) -> dict[str, int]:
        """Returns all tokens with their ids, added ones too."""
        return {**self._vocabulary, **self.added_tokens_encoder}

    def _convert_token_to_id(self, token: str) -> int:
        return self._vocabulary.get(token, self._vocabulary["<unk>"])

    def _convert_id_to_token(self, index: int) -> str:
        if not 0 <= index < len(self._tokens):
            raise ValueError(
                f"Token id {index} is outside of the vocabulary: expected 0 to {len(self) - 1}. Take padding such as "
                "-100 out of labels before decoding; for larger ids, check that num_image_tokens "
                f"({self.num_image_tokens}) is the one of the model."
            )
        return self._tokens[index]

    def save_vocabulary(self, save_directory: str | os.PathLike, filename_prefix: str | None = None) -> tuple[str]:
        """Writes `ice_text.model` into the folder and returns its path in a tuple."""
        path = os.path.join(save_directory, (f"{filename_prefix}-" if filename_prefix else "") + VOCABULARY_NAME)
        with open(path, "wb") as file:  # from memory: the file read from may be gone by now
            file.write(self.sp_model.serialized_model_proto())
        return (path,)

    # Text to ids

    def tokenize(self, text: str, genuine_marks: bool = False, **kwargs: Any) -> list[str]:
        """Splits text into the names of its tokens.

        Args:
            text: plain text, or a prompt rendered from a chat template.
            genuine_marks: the text is such a prompt, where the names of all special tokens, `[gMASK]` and `</s>` too,
                mean the tokens. Raises ValueError if nothing else is in it. Messages that went into it must have been
                through `_hide` before.
            kwargs: of `PreTrainedTokenizer.tokenize`, as `split_special_tokens`.

        Raises NotImplementedError for `return_offsets_mapping=True`.
        """
        if kwargs.pop("return_offsets_mapping", False):
            raise NotImplementedError(
                "return_offsets_mapping=True: this tokenizer, written in Python, has no offsets. "
                "For the tokens of an answer there is apply_chat_template(return_assistant_tokens_mask=True)."
            )
        if not genuine_marks:
            marks = f"{self.gmask_token}{self.bos_token}"
            parts = re.split(f"{re.escape(str(self.gmask_token))} ?{re.escape(str(self.bos_token))}", text)
            return super().tokenize(marks.join(_hide(part, self._plain_names()) for part in parts), **kwargs)
        tokens = super().tokenize(text, **{**kwargs, "split_special_tokens": False})
        if not set(tokens) - {self.gmask_token, self.bos_token, self.eos_token}:
            raise ConversationError("The conversation has no text that gives tokens: the query is empty.")
        return tokens

    def _plain_names(self) -> set[str]:
        """Names of special tokens that are ordinary text in plain text: `[gMASK]` and `</s>`."""
        named = {self.bos_token, self.eos_token, self.pad_token, self.unk_token, self.mask_token, None}
        return {self.gmask_token, self.end_token} - named

    def _find_marks(self, ids: list[int]) -> int | None:
        """Index of the first `[gMASK] <sop>` in ids."""
        marks = [self.gmask_token_id, self.bos_token_id]
        return next((i for i in range(len(ids) - 1) if ids[i : i + 2] == marks), None)

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        if self.remove_space:
            text = " ".join(text.split())
        if self.do_lower_case:
            text = text.lower()
        # SentencePiece takes valid Unicode only: join surrogate pairs, replace lone halves.
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        text = re.sub(r"\n|\t| {2,80}", lambda run: WHITE_SPACE_PIECES[run.group()], text)
        return self.sp_model.encode(text, out_type=str)

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Returns ids `a [gMASK] <sop>`, or for a pair `a [gMASK] <sop> b <eop>`; `a` may have these marks."""
        ids = list(token_ids_0)
        if self._find_marks(ids) is None:
            ids += [self.gmask_token_id, self.bos_token_id]
        return ids if token_ids_1 is None else [*ids, *token_ids_1, self.eos_token_id]

    def get_special_tokens_mask(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None, already_has_special_tokens: bool = False
    ) -> list[int]:
        """Returns 1 for each special token and 0 for each other, of what `build_inputs_with_special_tokens` makes of
        the arguments, or of finished ids."""
        if already_has_special_tokens:
            return super().get_special_tokens_mask(token_ids_0, token_ids_1, True)
        if self._find_marks(token_ids_0) is None:
            mask = [0] * len(token_ids_0) + [1, 1]
        else:
            mask = super().get_special_tokens_mask(token_ids_0, already_has_special_tokens=True)
        return mask if token_ids_1 is None else [*mask, *[0] * len(token_ids_1), 1]

    def prepare_for_model(
        self, ids: list[int], pair_ids: list[int] | None = None, add_special_tokens: bool = True, **kwargs: Any
    ) -> BatchEncoding:
        """As in `PreTrainedTokenizer`; ids that have their marks `[gMASK] <sop>` get no others."""
        if not add_special_tokens or self._find_marks(ids) is None:
            return super().prepare_for_model(ids, pair_ids, add_special_tokens, **kwargs)
        if pair_ids is not None:
            ids = [*ids, *pair_ids, self.eos_token_id]
        tensors, axis = kwargs.pop("return_tensors", None), kwargs.pop("prepend_batch_axis", False)
        out = super().prepare_for_model(ids, None, False, **kwargs)
        if "special_tokens_mask" in out:
            out["special_tokens_mask"] = self.get_special_tokens_mask(out["input_ids"], already_has_special_tokens=True)
        return BatchEncoding(out, tensor_type=tensors, prepend_batch_axis=axis)

    def truncate_sequences(
        self,
        ids: list[int],
        pair_ids: list[int] | None = None,
        num_tokens_to_remove: int = 0,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[list[int], list[int] | None, list[int]]:
        """As in `PreTrainedTokenizer`, but the marks `[gMASK] <sop>` of a rendered conversation
        stay: from the right, the answer behind them goes first and then the end of the prompt; from the left, the start
        of the prompt first."""
        at = self._find_marks(ids)
        if pair_ids is not None or at is None:
            return super().truncate_sequences(ids, pair_ids, num_tokens_to_remove, *args, **kwargs)
        prompt, marks, answer = ids[:at], ids[at : at + 2], ids[at + 2 :]
        if self.truncation_side == "right":
            of_answer = min(num_tokens_to_remove, len(answer))
        else:
            of_answer = max(num_tokens_to_remove - len(prompt), 0)
        of_prompt = num_tokens_to_remove - of_answer
        prompt, _, lost = super().truncate_sequences(prompt, None, of_prompt, *args, **kwargs)
        answer, _, more = super().truncate_sequences(answer, None, of_answer, *args, **kwargs)
        return prompt + marks + answer, None, lost + more


def _load_vocabulary(path: str | os.PathLike | None, checkpoint: str | None) -> SentencePieceProcessor:
    """Reads the vocabulary file; says what is wrong with one that is none."""
    if path is None or not os.path.isfile(path):
        raise FileNotFoundError(
            f"There is no vocabulary file {path or VOCABULARY_NAME}{f' in {checkpoint}' if checkpoint else ''}. It "
            "belongs to every ChatGLM-6B checkpoint: download it (THUDM/chatglm-6b-int8 has it) to that place."
        )
    with open(path, "rb") as file:
        data = file.read()
    remedy = "Download it again; the file of the release has 2,706,249 bytes."
    if data.startswith(b"version https://git-lfs"):
        raise ValueError(
            f"{path} is a Git LFS pointer of {len(data)} bytes, not the vocabulary. Run `git lfs pull` in its folder, "
            "or download the file itself."
        )
    try:
        model = SentencePieceProcessor()
        model.LoadFromSerializedProto(data)
        pieces = {model.id_to_piece(i) for i in range(model.get_piece_size())}
    except RuntimeError as error:
        broken = f"{path} ({len(data)} bytes) is no SentencePiece model, or only a part of one. {remedy}"
        raise ValueError(broken) from error
    missing = [p for p in ("<unk>", *CONTROL, *WHITE_SPACE, *BYTES) if p not in pieces]
    if missing:
        raise ValueError(
            f"{path} ({len(data)} bytes) is no vocabulary of ChatGLM-6B, or only a part of one: of the special pieces "
            f"expected, {len(missing)} are missing, {missing[0]} first. {remedy}"
        )
    if model.encode(DELETED):
        raise ValueError(
            f"{path} was not built with the normaliser nmt_nfkc: it keeps U+0001, which this "
            f"tokenizer relies on to be deleted. {remedy}"
        )
    return model


def _overlap(text: str, pattern: str) -> int:
    """Length of the longest proper prefix of `pattern` that `text` ends with."""
    lengths = range(len(pattern) - 1, 0, -1)
    return next((length for length in lengths if text.endswith(pattern[:length])), 0)


def _hide(value: Any, tokens: Iterable[str]) -> Any:
    """Spoils the names of special tokens in all strings of `value`, for the search alone.

    A name begun at the end of a string is spoilt too, in case a template joins it to another.
    """
    if isinstance(value, str):
        for token in tokens:
            value = value.replace(token, token[0] + DELETED + token[1:])
            if begun := _overlap(value, token):
                value = value[:-begun] + token[0] + DELETED + token[1:begun]
        return value
    if isinstance(value, Mapping):
        return {key: _hide(item, tokens) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_hide(item, tokens) for item in value]
    return value


def _conversation(value: Any) -> list:
    """Returns a conversation as a list of dicts, or a list of such lists for several."""
    messages = getattr(value, "messages", value)
    if isinstance(messages, (list, tuple)) and messages:
        if all(isinstance(item, (list, tuple)) or hasattr(item, "messages") for item in messages):
            return [_conversation(item) for item in messages]
        found = [_message(message) for message in messages]
        if all(isinstance(message, dict) for message in found):
            return found
    raise ConversationError(
        f'A conversation is a list of at least one message {{"role": ..., "content": ...}}; got {messages!r:.200}.'
    )


def _message(value: Any) -> Any:
    """Returns a message, and the parts of its content, as dicts, lists and strings."""
    if isinstance(value, str):
        return str.__str__(value)  # of a member of an enumeration, the value
    if isinstance(value, Mapping):
        return {key: _message(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_message(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _message(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if callable(getattr(value, "model_dump", None)):  # pydantic
        return _message(value.model_dump())
    if hasattr(value, "role") and hasattr(value, "content"):
        return {"role": _message(value.role), "content": _message(value.content)}
    return value


ChatGLMTokenizer.register_for_auto_class()
