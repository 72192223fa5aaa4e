"""Chat: prompts of rounds, answers at once or piece by piece, and their clean-up."""

import bisect
import re
from collections.abc import Iterator

import torch
from transformers import LogitsProcessorList
from transformers.utils import logging

from .generation_chatglm import FiniteScores

logger = logging.get_logger(__name__)

# Punctuation that takes its full-width form next to a Chinese character.
_FULL_WIDTH = {",": "，", "!": "！", ":": "：", ";": "；", "?": "？"}
_TOUCHING_CJK = re.compile(r"(?<=[\u4e00-\u9fff])[,!:;?]|[,!:;?](?=[\u4e00-\u9fff])")


class ChatMixin:
    """`chat` and `stream_chat`, for a model that can generate."""

    def chat(
        self,
        tokenizer,
        query: str,
        history: list[tuple[str, str]] | None = None,
        max_length: int = 2048,
        num_beams: int = 1,
        do_sample: bool = True,
        top_p: float = 0.7,
        temperature: float = 0.95,
        logits_processor: list | None = None,
        **kwargs,
    ) -> tuple[str, list[tuple[str, str]]]:
        """Answer a query.

        Args:
            tokenizer: this model's `ChatGLMTokenizer`.
            history: rounds so far, (query, response); not changed. The oldest are left out of the prompt where it
                would fill `max_length` or the model's `max_sequence_length`.
            max_length: tokens of prompt and answer together.
            num_beams, do_sample, top_p, temperature, **kwargs: arguments of `generate`. A temperature of 0 is greedy.
            logits_processor: further processors of the scores.

        Returns:
            The response, and the history with this round at its end.

        Raises:
            ValueError: a query that is no text, empty, or too long by itself; a history of another form; another
                model's tokenizer.
        """
        history = _rounds(history)
        inputs = self.build_inputs(tokenizer, query, history, None if kwargs.get("max_new_tokens") else max_length)
        settings = _chat_settings(tokenizer, max_length, do_sample, top_p, temperature, logits_processor, kwargs)
        output_ids = self.generate(**inputs, num_beams=num_beams, **settings)
        settings["logits_processor"][-1].report()
        prompt_length = inputs["input_ids"].shape[1]
        response = self.process_response(tokenizer.decode(output_ids[0, prompt_length:].tolist()))
        return response, [*history, (query, response)]

    def stream_chat(
        self,
        tokenizer,
        query: str,
        history: list[tuple[str, str]] | None = None,
        max_length: int = 2048,
        do_sample: bool = True,
        top_p: float = 0.7,
        temperature: float = 0.95,
        logits_processor: list | None = None,
        **kwargs,
    ) -> Iterator[tuple[str, list[tuple[str, str]]]]:
        """Answer a query piece by piece; arguments and errors as of `chat`.

        Yields:
            the response so far and the history that goes with it, after each token of `stream_generate`. A character
            whose bytes are spread over tokens appears with its last one.
        """
        history = _rounds(history)
        inputs = self.build_inputs(tokenizer, query, history, None if kwargs.get("max_new_tokens") else max_length)
        settings = _chat_settings(tokenizer, max_length, do_sample, top_p, temperature, logits_processor, kwargs)
        decoder = tokenizer.decode_stream()
        text = ""
        for output_ids in self.stream_generate(**inputs, **settings):
            text += decoder.step(int(output_ids[0, -1]))
            response = self.process_response(text)
            yield response, [*history, (query, response)]
        settings["logits_processor"][-1].report()
        unfinished = decoder.flush()
        if unfinished:
            response = self.process_response(text + unfinished)
            yield response, [*history, (query, response)]

    def process_response(self, response: str) -> str:
        """Clean up decoded text: strip it, fill in the training date, and widen punctuation at Chinese characters."""
        response = response.strip().replace("[[训练时间]]", "2023年")
        return _TOUCHING_CJK.sub(lambda mark: _FULL_WIDTH[mark.group()], response)

    def build_inputs(
        self,
        tokenizer,
        query: str,
        history: list[tuple[str, str]] | None = None,
        max_length: int | None = 2048,
    ) -> dict[str, torch.Tensor]:
        """The prompt that `chat` gives to `generate`: the query behind as many of the last rounds as leave room.

        Args:
            tokenizer, query, history: as of `chat`.
            max_length: tokens of prompt and answer together, at least one for the answer; None: the model's
                `max_sequence_length`, which is a limit in any case.

        Returns:
            `input_ids` and `attention_mask`, int64 [1, S] on the model's device.

        Raises:
            ValueError: as of `chat`.
        """
        history = _rounds(history)
        if not isinstance(query, str):
            raise ValueError(f"The query must be a string, got {type(query).__name__}: {query!r}.")
        if not query.strip():
            raise ValueError(f"The query is empty: got {query!r}. Ask something.")
        config = self.config
        marks = tokenizer.convert_tokens_to_ids(["[gMASK]", "<sop>"])
        if marks != [config.gmask_token_id, config.bos_token_id]:
            raise ValueError(
                f"The tokenizer has [gMASK] and <sop> at {marks}, the model's configuration at "
                f"{[config.gmask_token_id, config.bos_token_id]}: use the ice_text.model of this model."
            )
        limit = config.max_sequence_length if max_length is None else min(config.max_sequence_length, max_length)

        def encode(first_round: int) -> dict:
            messages = []
            for question, answer in history[first_round:]:
                messages.append({"role": "user", "content": question})
                messages.append({"role": "assistant", "content": answer})
            messages.append({"role": "user", "content": query})
            return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)

        def fits(first_round: int) -> bool:
            return len(encode(first_round)["input_ids"]) < limit

        inputs = encode(0)
        if len(inputs["input_ids"]) >= limit:
            first_round = bisect.bisect_left(range(len(history)), True, key=fits)
            inputs = encode(first_round)
            length = len(inputs["input_ids"])
            if length >= limit:
                raise ValueError(
                    f"The query has {length} tokens, and the limit for query and answer together is {limit}: "
                    "shorten it, or raise max_length if that is below the model's max_sequence_length of "
                    f"{config.max_sequence_length}."
                )
            logger.warning_once(
                f"The conversation has grown past {limit} tokens: its oldest rounds are left out of the prompt."
            )
        # Not by return_tensors, which makes tensors on the default device.
        return {name: torch.tensor([inputs[name]], device=self.device) for name in ("input_ids", "attention_mask")}


def _rounds(history: list[tuple[str, str]] | None) -> list[tuple[str, str]]:
    """A copy of the history; a ValueError if it is something else."""
    expected = "history is a list of rounds, (query, response) each, two strings"
    if history and not isinstance(history, list | tuple):
        raise ValueError(f"{expected}; got {history!r}.")
    for round_ in history or ():
        if not isinstance(round_, list | tuple) or [isinstance(text, str) for text in round_] != [True, True]:
            raise ValueError(f"{expected}; got a round {round_!r}.")
    return list(history or ())


def _chat_settings(
    tokenizer,
    max_length: int,
    do_sample: bool,
    top_p: float,
    temperature: float,
    logits_processor: list | None,
    kwargs: dict,
) -> dict:
    """Arguments of `generate` for a chat."""
    settings = {"do_sample": do_sample, **kwargs}
    settings["logits_processor"] = LogitsProcessorList([*(logits_processor or []), FiniteScores()])
    if settings.get("max_new_tokens") is None:
        settings["max_length"] = max_length
    if settings.get("stop_strings"):
        settings["tokenizer"] = tokenizer
    if temperature == 0:
        settings["do_sample"] = False
    elif do_sample:
        settings.update(top_p=top_p, temperature=temperature)
    return settings
