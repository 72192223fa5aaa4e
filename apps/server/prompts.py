"""Prompts of conversations, texts and token ids."""

import bisect
import dataclasses
import itertools
import logging
import re

from ...tokenization_chatglm import DecodeStream
from .answers import Answer
from .forms import ChatForm, CompletionForm, TokenizeForm
from .pieces import Piece

logger = logging.getLogger("chatglm")

FINISHED = re.compile(r"\[gMASK\] ?<sop>")  # in a prompt that apply_chat_template has rendered


@dataclasses.dataclass
class Prompt:
    """Ids to read, and what is given of them before an answer: text, or each token's part of it, or nothing."""

    ids: list[int]
    echo: str = ""
    token_texts: list[str] = dataclasses.field(default_factory=list)
    begun: list[int] = dataclasses.field(default_factory=list)  # ids of the answer, behind `<sop>`

    def echoed(self, index: int, answer: Answer) -> Piece:
        pairs = zip(answer.prompt_tokens, self.token_texts, strict=True)
        return Piece(index, self.echo, [dataclasses.replace(token, text=text) for token, text in pairs])


class Prompts:
    """Makes prompts of at most `limit` tokens with the answer."""

    def __init__(self, tokenizer, limit: int):
        self._tokenizer = tokenizer
        self._limit = limit
        self._shortened = False  # a conversation, which is said once

    def of_chat(self, form: ChatForm) -> Prompt:
        """The prompt of a conversation, without its oldest rounds if it is too long, as `model.chat` does it.

        System messages stay.
        """
        messages = [message.model_dump() for message in form.messages]
        if messages[-1]["role"] == "assistant":
            raise ValueError('The last message has role "assistant": end with one of role "user".')
        spoken = [index for index, message in enumerate(messages) if message["role"] in ("user", "assistant")]
        rounds = [index for before, index in itertools.pairwise(spoken) if _begins_round(messages, before, index)]

        def encode(first: int) -> list[int]:
            kept = [message for index, message in enumerate(messages) if index >= first or index not in spoken]
            return self._tokenizer.apply_chat_template(kept, add_generation_prompt=True, return_dict=False)

        ids = encode(0)
        if rounds and len(ids) >= self._limit:
            first = bisect.bisect_left(rounds[:-1], True, key=lambda first: len(encode(first)) < self._limit)
            ids = encode(rounds[first])
            if not self._shortened:
                logger.warning("A conversation has grown past %d tokens: its oldest rounds are left out.", self._limit)
            self._shortened = True
        return Prompt(ids)

    def ids_of(self, form: TokenizeForm) -> list[int]:
        """The ids of a text, in which no name is a special token, or of a conversation's whole prompt."""
        if (form.prompt is None) == (form.messages is None):
            raise ValueError("Give either prompt, a text, or messages, a conversation.")
        if form.messages is not None:
            messages = [message.model_dump() for message in form.messages]
            return self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        options = {"add_special_tokens": form.add_special_tokens, "split_special_tokens": True}
        return self._tokenizer(form.prompt, **options)["input_ids"]

    def text_of(self, ids: list[int]) -> str:
        self._check(ids)
        return self._tokenizer.decode(ids)

    def _check(self, ids: list[int]) -> None:
        known = len(self._tokenizer)
        if wrong := [token_id for token_id in ids if not 0 <= token_id < known]:
            raise ValueError(f"{wrong[0]} is no token id of this model: expected 0 to {known - 1}.")

    def of_completion(self, form: CompletionForm, given: str | list[int]) -> Prompt:
        """A text or its ids, with `[gMASK] <sop>` behind them. A prompt that has `<sop>` is taken as it is."""
        bos = self._tokenizer.bos_token_id
        if isinstance(given, str):
            # As a text of its own, not as a query: unless it is a finished prompt, no name is a special token here.
            finished = FINISHED.search(given) is not None
            options = {"add_special_tokens": False, "split_special_tokens": not finished}
            own = self._tokenizer(given, **options)["input_ids"]
        else:
            own = given
        self._check(own)
        start = own.index(bos) + 1 if bos in own else len(own)
        if form.scores_prompt and start == len(own):
            raise ValueError(
                f"echo with logprobs scores the tokens behind <sop> (id {bos}), and there are none: the tokens before "
                "it see each other and can't be scored. Send token ids: context, [gMASK], <sop>, and the text to score."
            )
        ids = own if bos in own else self._tokenizer.build_inputs_with_special_tokens(own)
        begun = own[start:]
        if not form.echo:
            return Prompt(ids, begun=begun)
        if isinstance(given, str) and not form.scores_prompt:
            return Prompt(ids, given, begun=begun)
        # An answer's text starts anew behind <sop>.
        context, answer = DecodeStream(self._tokenizer, control_names=True), self._tokenizer.decode_stream()
        texts = [context.step(token_id) for token_id in own[:start]]
        texts[-1] += context.flush()
        texts += [answer.step(token_id) for token_id in begun]
        return Prompt(ids, "".join(texts), texts if form.scores_prompt else [], begun)


def _begins_round(messages: list[dict], before: int, index: int) -> bool:
    return messages[index]["role"] == "user" and messages[before]["role"] == "assistant"
