"""Generation: what `generate` adds to transformers' own, its decoding loop over recorded steps, streaming, pipelines.

Letters as in `modeling_chatglm`.
"""

import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import torch
from transformers import (
    FeatureExtractionPipeline,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteriaList,
    StopStringCriteria,
    TextGenerationPipeline,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.cache_utils import Cache
from transformers.generation import GenerationMode
from transformers.pipelines.text_generation import ReturnType
from transformers.utils import logging

from .configuration_chatglm import ChatGLMConfig
from .cuda_graphs import CACHE, StepCache, can_record, draw, new_cache, one_cache
from .sequences import answer_start, check_ids, check_mask, hidden_keys

logger = logging.get_logger(__name__)

# The id that gets all the weight when the scores are not finite; "▁" in the release. The public code's choice.
_FALLBACK_TOKEN_ID = 5

# The end tokens [E] of the beam search that runs, for the methods that transformers calls without them.
_BEAM_ENDS: ContextVar[torch.Tensor | None] = ContextVar("_BEAM_ENDS")


class FiniteScores(LogitsProcessor):
    """Puts all weight on one id where scores are NaN or infinite, as the public code does, and says so once.

    Single scores of minus infinity are left: other processors forbid ids so.
    """

    def __init__(self):
        self._seen: tuple[torch.Tensor, torch.cuda.Event] | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """int64 [B, S], float [B, V] → float [B, V]."""
        broken = ~scores.amax(dim=-1, keepdim=True).isfinite()  # a NaN is the largest of all
        if scores.is_cuda:
            # Whether any are broken is looked at in the next step: a GPU should not be waited for in this one.
            self.report()
            seen = torch.zeros((), dtype=torch.bool, device="cpu", pin_memory=True)
            seen.copy_(broken.any(), non_blocking=True)
            self._seen = seen, torch.cuda.current_stream(scores.device).record_event()
        elif broken.any():
            self._warn()
        else:
            return scores
        forced = torch.zeros_like(scores)
        forced[:, _FALLBACK_TOKEN_ID] = 5e4
        return torch.where(broken, forced, scores)

    def report(self) -> None:
        """Say it, if the last scores were broken."""
        if self._seen is not None:
            seen, copied = self._seen
            copied.synchronize()
            self._seen = None
            if seen:
                self._warn()

    def _warn(self) -> None:
        logger.warning_once(
            "The model's scores are NaN or infinite, so the answer will be empty or meaningless. Likely causes: a "
            "damaged weight file, an overflow in fp16 (try bfloat16 or float32), or a bad fine-tuned checkpoint."
        )


class ChatGLMGenerationMixin(GenerationMixin):
    """`generate`, `stream_generate` and what they call in a step."""

    def generate(self, inputs: torch.Tensor | None = None, *args, **kwargs):
        """`GenerationMixin.generate`, for prompts that end in `[gMASK] <sop>`, as the tokenizer makes them.

        Batches are padded on the left. An `attention_mask` may be 2-D, or 4-D in the forms of `ChatGLMModel.forward`.

        Raises:
            ValueError: an empty prompt, ids outside the vocabulary, a sequence without `<sop>`, positions other than
                the ids' own, or a way of generating that reads the prompt from left to right.
        """
        prompt = inputs if inputs is not None else kwargs.get("input_ids")
        if prompt is None:
            raise ValueError("generate needs input_ids: masks and positions come from them.")
        check_ids(self.config, prompt)
        without = (prompt != self.config.bos_token_id).all(dim=1).nonzero().flatten().tolist()
        if without:
            raise ValueError(
                f"Sequence {without[0]} of the prompt has no <sop> (id {self.config.bos_token_id}), so there is no "
                "place for an answer: end prompts in [gMASK] <sop>, as tokenizer(text) does by default."
            )
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.ndim == 4:
            if not mask.is_floating_point():
                check_mask(mask, *prompt.shape, range(prompt.shape[1], prompt.shape[1] + 1))
                mask = hidden_keys(mask, torch.arange(prompt.shape[1], device=mask.device))
            mask = (mask[:, 0, -1] == 0).long()  # the last query sees all but padding
            mask = kwargs["attention_mask"] = mask.expand(len(prompt), -1) if len(mask) == 1 else mask
        if mask is not None and (mask.shape != prompt.shape or not mask[:, -1].all()):
            raise ValueError(
                f"attention_mask {list(mask.shape)} must have the shape of the ids, {list(prompt.shape)}, with 1 for "
                "real tokens, and padding on the left: its last column is all 1."
            )
        position_ids = kwargs.pop("position_ids", None)
        if position_ids is not None:
            # Of an assistant model, transformers just counts the tokens.
            counted = ((torch.ones_like(prompt) if mask is None else mask).long().cumsum(dim=1) - 1).clamp(min=0)
            usual = (self.get_position_ids(prompt, attention_mask=mask), counted)
            if not any(torch.equal(position_ids, each) for each in usual):
                raise ValueError("generate derives position_ids from the ids and the attention_mask; these are others.")
        generation_config = kwargs.get("generation_config") or (args[0] if args else None) or self.generation_config
        given = (kwargs, vars(generation_config))
        if any(settings.get("prefill_chunk_size") is not None for settings in given):
            raise ValueError("prefill_chunk_size can't be used: the prompt sees itself both ways, so it is one piece.")
        if any(settings.get("assistant_early_exit") is not None for settings in given):
            raise ValueError(
                "assistant_early_exit can't be used: the LM head was trained on the last block only, and transformers "
                "would change the model's configuration during the call. Pass a smaller ChatGLM as assistant_model."
            )
        assistant = kwargs.get("assistant_model")
        if assistant is not None and getattr(assistant.config, "pre_seq_len", None) is not None:
            raise ValueError(
                "The assistant model has a P-Tuning v2 prefix, whose keys transformers would count as tokens: load it "
                "without pre_seq_len. The model itself may have one."
            )
        cache = one_cache(kwargs.pop("past_key_values", None), kwargs.pop("cache", None))
        if cache is not None:
            kwargs[CACHE] = cache
        filled = 0 if cache is None else int(cache.get_seq_length())
        if filled and self.config.pre_seq_len is not None:
            raise ValueError("With P-Tuning v2, generate starts from the prompt: pass no filled past_key_values.")
        if filled and not int(answer_start(self.config, prompt).max()) <= filled < prompt.shape[1]:
            raise ValueError(
                f"past_key_values hold {filled} of the prompt's {prompt.shape[1]} tokens. They must hold all up to its "
                "first <sop>, since those see each other both ways, and leave one to be read: pass all ids so far, "
                "and a cache that ends in the answer, or none."
            )
        if all(settings.get(name) is None for settings in given for name in ("max_length", "max_new_tokens")):
            kwargs["max_length"] = self.config.max_sequence_length  # else transformers stops after 20 tokens
        return super().generate(inputs, *args, **kwargs)

    def generate_batch(self, *args, **kwargs):
        """Refused: continuous batching reads prompts from left to right, and this model's prompts see both ways."""
        raise NotImplementedError(
            "Continuous batching and paged caches can't serve ChatGLM, whose prompts see both ways: use generate with "
            "a left-padded batch."
        )

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ):
        if self._can_step(generation_config, model_kwargs, generation_mode):
            mask = model_kwargs.get("attention_mask")
            padding = torch.zeros(batch_size, dtype=torch.int32, device=self.device)
            if mask is not None:
                mask = mask.to(self.device).long()
                padding = (mask == 0).sum(dim=1).int()
            repeated = max(1, generation_config.num_return_sequences or 1)
            if mask is None or torch.equal(mask == 0, mask.cumsum(dim=1) == 0):  # padding on the left, or none
                if len(padding) == batch_size and repeated > 1:
                    padding = padding.repeat_interleave(repeated)
                model_kwargs[CACHE] = StepCache(self, padding)
                return None
        if self._chooses_cache(generation_config, model_kwargs):
            model_kwargs[CACHE] = new_cache(self.config, self.device)
            return None
        # A static cache needs places for the prefix too.
        return super()._prepare_cache_for_generation(
            generation_config,
            model_kwargs,
            generation_mode,
            batch_size,
            max_cache_length + (self.config.pre_seq_len or 0),
        )

    @staticmethod
    def _chooses_cache(generation_config, model_kwargs: dict) -> bool:
        """Whether there is to be a cache, and its kind is left to the model."""
        return (
            generation_config.use_cache is not False
            and generation_config.cache_implementation is None
            and model_kwargs.get(CACHE) is None
        )

    def _can_step(self, generation_config, model_kwargs: dict, generation_mode) -> bool:
        """Whether a generation may use recorded steps: one token at a time, nothing but scores asked for."""
        return (
            generation_mode in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
            and self._chooses_cache(generation_config, model_kwargs)
            and not generation_config.output_attentions
            and not generation_config.output_hidden_states
            and not getattr(generation_config, "is_assistant", False)
            and model_kwargs.get("inputs_embeds") is None
            and can_record(self)
        )

    @torch.no_grad()
    def _sample(
        self,
        input_ids: torch.Tensor,
        logits_processor,
        stopping_criteria,
        generation_config,
        synced_gpus: bool = False,
        streamer=None,
        **model_kwargs,
    ):
        """Greedy decoding and sampling. With recorded steps the next one is on its way before this one's token is
        looked at, so that the GPU never waits; processors, criteria and streamer see what they always see."""
        cache = model_kwargs.get(CACHE)
        if not isinstance(cache, StepCache) or generation_config.return_dict_in_generate or synced_gpus:
            return super()._sample(
                input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, streamer, **model_kwargs
            )
        unfinished = torch.ones(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        pad = generation_config._pad_token_tensor if _has_end(stopping_criteria) else None
        flag = torch.zeros((), dtype=torch.bool, device="cpu", pin_memory=True)
        ended = torch.cuda.Event()
        # The end is looked for beside the next step; criteria of the user's own may expect the stream that they know.
        own = any(not type(criterion).__module__.startswith("transformers.") for criterion in stopping_criteria)
        # The streams that PyTorch hands out are shared; none of this priority records.
        side = torch.cuda.current_stream(input_ids.device) if own else torch.cuda.Stream(input_ids.device, priority=-1)
        before_top, top = logits_processor, None
        if generation_config.do_sample and [type(processor) for processor in logits_processor[-2:]] == [
            TopKLogitsWarper,
            TopPLogitsWarper,
        ]:
            before_top, top = LogitsProcessorList(logits_processor[:-2]), logits_processor[-2:]
        new = _not_stored(input_ids, cache)
        inputs = self.prepare_inputs_for_generation(input_ids, next_sequence_length=new, **model_kwargs)
        logits = self(**inputs, return_dict=True).logits
        while True:
            scores = logits[:, -1]
            if before_top or generation_config.do_sample:
                scores = before_top(input_ids, scores.float())
            if top is not None:
                tokens = _sample_top(scores, *top)
            elif generation_config.do_sample:
                tokens = draw(scores.softmax(dim=-1))
            else:
                tokens = scores.argmax(dim=-1)
            if pad is not None:
                tokens = torch.where(unfinished, tokens, pad)
            input_ids = torch.cat((input_ids, tokens[:, None]), dim=1)
            mask = model_kwargs.get("attention_mask")
            if mask is not None and not cache.knows_position():  # a recorded step needs none
                model_kwargs["attention_mask"] = torch.cat((mask, mask.new_ones(len(mask), 1)), dim=1)
            side.wait_stream(torch.cuda.current_stream(input_ids.device))
            with torch.cuda.stream(side):
                still_unfinished = unfinished & ~stopping_criteria(input_ids, None)
                flag.copy_(still_unfinished.any(), non_blocking=True)
                ended.record()
            limit = stopping_criteria.max_length
            if limit is None or input_ids.shape[1] < limit:
                inputs = self.prepare_inputs_for_generation(input_ids, next_sequence_length=1, **model_kwargs)
                logits = self(**inputs, return_dict=True).logits
            ended.synchronize()
            unfinished = still_unfinished  # not before: the step might be given the memory that the other stream reads
            if streamer is not None:
                streamer.put(tokens.cpu())
            if not flag:
                break
        if streamer is not None:
            streamer.end()
        return input_ids

    # Beams were scored by their mean over prompt and answer when the model was published, its <eop> not counted;
    # transformers 5 counts the answer alone, which prefers longer ones. These three keep the published answers.

    def _beam_search(self, input_ids, *args, generation_config, **kwargs):
        previous = _BEAM_ENDS.set(generation_config._eos_token_tensor)
        try:
            return super()._beam_search(input_ids, *args, generation_config=generation_config, **kwargs)
        finally:
            _BEAM_ENDS.reset(previous)

    def _update_finished_beams(self, topk_log_probs, topk_running_sequences, cur_len, length_penalty, **kwargs):
        ends = _BEAM_ENDS.get()
        if ends is not None:
            ended = torch.isin(topk_running_sequences[:, :, cur_len], ends.to(topk_running_sequences.device))
            uncounted = ((cur_len + 1) / cur_len) ** length_penalty
            topk_log_probs = torch.where(ended, topk_log_probs * uncounted, topk_log_probs)
        return super()._update_finished_beams(
            topk_log_probs=topk_log_probs,
            topk_running_sequences=topk_running_sequences,
            cur_len=cur_len,
            length_penalty=length_penalty,
            **{**kwargs, "decoder_prompt_len": 0},
        )

    def _check_early_stop_heuristic(self, early_stopping, **kwargs):
        kwargs["decoder_prompt_len"] = 0 if early_stopping == "never" else 1
        return super()._check_early_stop_heuristic(early_stopping=early_stopping, **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        next_sequence_length: int | None = None,
        cache_position: torch.Tensor | None = None,
        cache: Cache | None = None,
        **kwargs,
    ) -> dict:
        """What `forward` gets in a step of `generate`: the ids [B, S] that are not in the cache yet, and their
        positions, derived from all ids so far [B, T]."""
        past_key_values = one_cache(past_key_values, cache)
        own = ("position_ids", "is_first_iteration", "return_dict")  # ours, or the caller's to say
        others = {name: value for name, value in kwargs.items() if name not in own}
        if next_sequence_length is None and cache_position is not None:
            next_sequence_length = cache_position.shape[0]  # how early transformers 5 says it
        if isinstance(past_key_values, StepCache) and next_sequence_length == 1 and not torch.is_grad_enabled():
            # A recorded step moves its positions on by itself.
            if not past_key_values.knows_position():
                positions = self.get_position_ids(input_ids, attention_mask=attention_mask).view(
                    input_ids.shape[0], -1, input_ids.shape[1]
                )
                past_key_values.set_positions(positions[..., -1], positions[..., -1] - positions[..., -2])
            return {"input_ids": input_ids[:, -1:], CACHE: past_key_values, **others}
        new = slice(-next_sequence_length, None) if next_sequence_length is not None else slice(None)
        position_ids = self.get_position_ids(input_ids, attention_mask=attention_mask)
        if attention_mask is not None and past_key_values is not None and past_key_values.is_compileable:
            # A mask that grew would make torch.compile begin anew at every step.
            places = past_key_values.layers[0].max_cache_len - (self.config.pre_seq_len or 0)
            unfilled = places - attention_mask.shape[1]
            attention_mask = torch.nn.functional.pad(attention_mask, (0, unfilled), value=1)
        inputs = {
            "input_ids": input_ids[:, new].contiguous(),
            "position_ids": position_ids[..., new].contiguous(),
            "attention_mask": attention_mask,
            CACHE: past_key_values,
            **others,
        }
        device = self.device
        return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}

    def stream_generate(
        self,
        input_ids: torch.Tensor,
        generation_config=None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria=None,
        prefix_allowed_tokens_fn: Callable | None = None,
        **kwargs,
    ) -> Iterator[torch.Tensor]:
        """Generate one token at a time, greedily or by sampling; arguments as of `generate`.

        Yields:
            all ids so far, int64 [B, T], after each new token but the one that ends the generation (`<eop>`, or the
            last that `max_length` allows), as the public code does.

        Raises:
            ValueError: a streamer or beams, and as `generate`.
        """
        beams = kwargs.get("num_beams") or (generation_config or self.generation_config).num_beams or 1
        if kwargs.get("streamer") is not None or beams > 1:
            raise ValueError("stream_generate hands out each token itself, and has no beams: for those call generate.")
        if kwargs.get("stop_strings") and kwargs.get("tokenizer"):
            # For a loop that is not its own, transformers forgets the tokenizer.
            stop = StopStringCriteria(kwargs.pop("tokenizer"), kwargs.pop("stop_strings"))
            stopping_criteria = StoppingCriteriaList([*(stopping_criteria or []), stop])
        yield from self.generate(
            input_ids,
            generation_config,
            logits_processor,
            stopping_criteria,
            prefix_allowed_tokens_fn,
            custom_generate=_stream_tokens,
            **kwargs,
        )


def _sample_top(scores: torch.Tensor, top_k: TopKLogitsWarper, top_p: TopPLogitsWarper) -> torch.Tensor:
    """Ids [B] drawn from scores [B, V] as the two warpers leave them, without sorting all of the vocabulary."""
    count = min(top_k.top_k, scores.shape[-1])
    # Scores in half precision are often equal, and those that equal the k-th are all kept.
    scores, ids = scores.topk(min(count + 64, scores.shape[-1]), dim=-1)
    scores = scores.masked_fill(scores < scores[:, count - 1 : count], top_k.filter_value)
    kept = top_p(None, scores)
    return ids.gather(1, draw(kept.softmax(dim=-1))[:, None]).squeeze(1)


def _not_stored(input_ids: torch.Tensor, cache: Cache | None) -> int | None:
    """How many of the ids [B, T] a cache that was handed over does not hold yet; None: any."""
    stored = 0 if cache is None else int(cache.get_seq_length())
    return input_ids.shape[1] - stored if stored else None


def _has_end(stopping_criteria) -> bool:
    """Whether sequences of a batch can end one by one."""
    return any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)


@torch.no_grad()
def _stream_tokens(
    model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs
) -> Iterator[torch.Tensor]:
    """A decoding loop for `generate(custom_generate=…)` that yields the ids so far, [B, T], after each token."""
    unfinished = torch.ones(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
    pad = generation_config._pad_token_tensor if _has_end(stopping_criteria) else None
    next_sequence_length = _not_stored(input_ids, model_kwargs.get(CACHE))
    while unfinished.any():
        inputs = model.prepare_inputs_for_generation(
            input_ids, next_sequence_length=next_sequence_length, **model_kwargs
        )
        logits = model(**inputs, return_dict=True).logits[:, -1].to(input_ids.device, torch.float32)
        scores = logits_processor(input_ids, logits)
        tokens = draw(scores.softmax(dim=-1)) if generation_config.do_sample else scores.argmax(dim=-1)
        if pad is not None:
            tokens = torch.where(unfinished, tokens, pad)
        input_ids = torch.cat((input_ids, tokens[:, None]), dim=1)
        if model_kwargs.get("attention_mask") is not None:
            mask = model_kwargs["attention_mask"]
            model_kwargs["attention_mask"] = torch.cat((mask, torch.ones_like(mask[:, :1])), dim=1)
        if model_kwargs.get(CACHE) is not None:
            next_sequence_length = 1
        unfinished = unfinished & ~stopping_criteria(input_ids, None)
        if unfinished.any():
            yield input_ids


# `pipeline(…)` picks its class before it loads a checkpoint's code, and takes no advice from model or tokenizer. So the
# methods below stand in transformers' own classes; other models than ChatGLM get the usual ones.


def _in_pipeline(pipeline_class: type) -> Callable[[Callable], Callable]:
    """Put a function in the place of the method of its name. It is called with the usual method after `self`."""

    def put(method: Callable) -> Callable:
        usual = getattr(pipeline_class, method.__name__)

        @functools.wraps(usual)
        def adapted(self, *args, **kwargs):
            if getattr(self.model.config, "model_type", None) != ChatGLMConfig.model_type:
                return usual(self, *args, **kwargs)
            return method(self, usual, *args, **kwargs)

        adapted.of_chatglm = True
        if not hasattr(usual, "of_chatglm"):  # this file runs once in the package and once as a checkpoint's code
            setattr(pipeline_class, method.__name__, adapted)
        return method

    return put


@_in_pipeline(FeatureExtractionPipeline)
def _forward(self, usual: Callable, model_inputs):
    """The hidden states [B, S, hidden] of the network below the head."""
    return getattr(self.model, "transformer", self.model)(**model_inputs)


@_in_pipeline(TextGenerationPipeline)
def postprocess(
    self,
    usual: Callable,
    model_outputs: dict,
    return_type: ReturnType = ReturnType.FULL_TEXT,
    clean_up_tokenization_spaces: bool | None = None,
    **kwargs,
) -> list[dict]:
    """The usual records. Where the new tokens go on with a text, the space that they begin with is kept.

    transformers decodes the new tokens alone, as if they began a text.
    """
    records = usual(self, model_outputs, return_type, clean_up_tokenization_spaces, **kwargs)
    ids, prompt = model_outputs["input_ids"], model_outputs["prompt_text"]
    before = prompt if isinstance(prompt, str) else prompt.messages[-1]["content"]
    begins = int(ids[0, -1]) == self.model.config.bos_token_id
    has_space = isinstance(before, str) and before.endswith(" ")  # which is no token, so the new ones bring it too
    if return_type == ReturnType.TENSORS or begins or has_space:
        return records
    cleans = clean_up_tokenization_spaces
    cleans = self.tokenizer.clean_up_tokenization_spaces if cleans is None else cleans
    for record, sequence in zip(records, model_outputs["generated_sequence"][0].tolist(), strict=True):
        first = sequence[ids.shape[1] : ids.shape[1] + 1]
        if not "".join(self.tokenizer.convert_ids_to_tokens(first)).startswith("▁"):
            continue
        text = record["generated_text"]
        old = before if return_type == ReturnType.FULL_TEXT else ""
        whole = text if isinstance(text, str) else text[-1]["content"]
        new = " " + whole[len(old) :]
        whole = old + (self.tokenizer.clean_up_tokenization(new) if cleans else new)
        record["generated_text"] = whole if isinstance(text, str) else [*text[:-1], {**text[-1], "content": whole}]
    return records
