"""generate and stream_generate, against the goldens and against each other."""

import copy
import logging
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

from chatglm_int8.generation_chatglm import FiniteScores

CASES = [
    "base_single",
    "base_infill",
    "base_long",
    "base_padded",
    "int8_single",
    "int8_padded",
    "int4_single",
    "int4_padded",
    "prefix_single",
    "prefix_proj_single",
]
PROMPT = torch.tensor([[7, 8, 9, 501, 504]])


def prompt_of(cases: dict, case: str) -> dict[str, torch.Tensor]:
    prompt = {"input_ids": cases[f"{case}.input_ids"]}
    if f"{case}.attention_mask" in cases:
        prompt["attention_mask"] = (~cases[f"{case}.attention_mask"][:, 0, -1]).long()
    return prompt


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("case", CASES)
def test_goldens(case, attention, cases, golden_model):
    model = golden_model(case.rsplit("_", 1)[0], attention=attention)
    prompt = prompt_of(cases, case)
    greedy = cases[f"{case}.greedy"]
    assert torch.equal(model.generate(**prompt, do_sample=False, max_new_tokens=24), greedy)
    assert torch.equal(model.generate(**prompt, do_sample=False, max_new_tokens=24, use_cache=False), greedy)
    static = model.generate(**prompt, do_sample=False, max_new_tokens=24, cache_implementation="static")
    assert torch.equal(static, greedy)
    beams = model.generate(**prompt, do_sample=False, num_beams=3, max_new_tokens=12)
    assert torch.equal(beams, cases[f"{case}.beam3"])
    torch.manual_seed(1234)
    sampled = model.generate(**prompt, do_sample=True, top_p=0.7, temperature=0.95, max_new_tokens=16)
    assert torch.equal(sampled, cases[f"{case}.sample_seed1234"])


@pytest.mark.parametrize("case", CASES)
def test_stream_generate_goldens(case, cases, golden_model):
    model = golden_model(case.rsplit("_", 1)[0])
    prompt = prompt_of(cases, case)
    start = prompt["input_ids"].shape[1]
    for name, settings in (
        ("greedy", {"do_sample": False, "max_new_tokens": 24}),
        ("sample_seed1234", {"do_sample": True, "top_p": 0.7, "temperature": 0.95, "max_new_tokens": 16}),
    ):
        torch.manual_seed(1234)
        steps = list(model.stream_generate(**prompt, **settings))
        expected = cases[f"{case}.{name}"]
        for i, ids in enumerate(steps):
            assert torch.equal(ids, expected[:, : start + i + 1])
        assert steps[-1].shape[1] in (expected.shape[1] - 1, expected.shape[1])


def test_old_forms_of_mask_and_positions(cases, golden_model):
    model = golden_model("base")
    ids = cases["base_padded.input_ids"]
    mask, positions = cases["base_padded.attention_mask"], cases["base_padded.position_ids"]
    got = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=24)
    assert torch.equal(got, cases["base_padded.greedy"])
    derived = model.get_position_ids(ids, attention_mask=~mask[:, 0, -1])
    got = model.generate(ids, attention_mask=mask, position_ids=derived, do_sample=False, max_new_tokens=24)
    assert torch.equal(got, cases["base_padded.greedy"])
    with pytest.raises(ValueError, match="position_ids"):
        model.generate(ids, attention_mask=mask, position_ids=positions + 1, do_sample=False)


@pytest.mark.parametrize("name", ["base", "int8", "prefix", "pos1d"])
def test_alone_and_padded_answers_are_equal(name, golden_model):
    model = golden_model(name)
    generator = torch.Generator().manual_seed(5)
    prompts = [[*torch.randint(6, 490, (n,), generator=generator).tolist(), 501, 504] for n in (1, 4, 11, 23)]
    longest = max(map(len, prompts))
    ids = torch.tensor([[3] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    for settings in ({}, {"num_beams": 2}, {"cache_implementation": "static"}):
        together = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=12, **settings)
        inferred = model.generate(ids, do_sample=False, max_new_tokens=12, **settings)  # <pad> says it too
        assert torch.equal(inferred, together)
        for row, prompt in zip(together, prompts, strict=True):
            alone = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=12, **settings)
            answer = alone[0, len(prompt) :]
            assert torch.equal(row[longest : longest + len(answer)], answer)
            assert (row[longest + len(answer) :] == 3).all()


def test_eight_threads_answer_as_one(golden_model):
    model = golden_model("int8", attention="sdpa")
    prompts = [torch.tensor([[7 + i, 8, 9 + 2 * i] + [11] * i + [501, 504]]) for i in range(8)]
    expected = [model.generate(prompt, do_sample=False, max_new_tokens=20) for prompt in prompts]
    barrier = threading.Barrier(8)

    def work(i: int) -> None:
        barrier.wait()
        for _ in range(3):
            got = model.generate(prompts[i], do_sample=False, max_new_tokens=20)
            *_, streamed = model.stream_generate(prompts[i], do_sample=False, max_new_tokens=20)
            assert torch.equal(got, expected[i])
            assert torch.equal(streamed, got[:, : streamed.shape[1]])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))


def test_going_on_from_a_returned_cache(golden_model):
    model = golden_model("base")
    whole = model.generate(PROMPT, do_sample=False, max_new_tokens=10)
    first = model.generate(PROMPT, do_sample=False, max_new_tokens=4, return_dict_in_generate=True)
    streamed = copy.deepcopy(first.past_key_values)
    rest = model.generate(first.sequences, past_key_values=first.past_key_values, do_sample=False, max_new_tokens=6)
    assert torch.equal(rest, whole)
    *_, rest = model.stream_generate(first.sequences, past_key_values=streamed, do_sample=False, max_new_tokens=6)
    assert torch.equal(rest, whole[:, :-1])


def test_going_on_from_a_cache_of_inference_mode(golden_model):
    model = golden_model("base")
    whole = model.generate(PROMPT, do_sample=False, max_new_tokens=10)
    with torch.inference_mode():
        first = model.generate(PROMPT, do_sample=False, max_new_tokens=4, return_dict_in_generate=True)
    ids, cache = first.sequences.clone(), first.past_key_values
    assert torch.equal(model.generate(ids, past_key_values=cache, do_sample=False, max_new_tokens=6), whole)


def test_a_cache_that_ends_in_the_prompt_is_refused(golden_model):
    """Its keys have not seen the rest of the prompt."""
    model = golden_model("base")
    for length in (3, 5):
        cache = DynamicCache(config=model.config)
        model(PROMPT[:, :length], past_key_values=cache)
        with pytest.raises(ValueError, match=f"hold {length} of the prompt's 5 tokens.*see each other both ways"):
            model.generate(PROMPT, past_key_values=cache, max_new_tokens=4)


@pytest.mark.parametrize("name", ["base", "int8", "pos1d"])
def test_an_assistant_model(name, golden_model):
    model = golden_model(name)
    expected = model.generate(PROMPT, do_sample=False, max_new_tokens=20)
    for assistant in (golden_model(name), golden_model("int4")):
        if assistant.config.position_encoding_2d == model.config.position_encoding_2d:
            given = {"assistant_model": assistant, "do_sample": False, "max_new_tokens": 20}
            assert torch.equal(model.generate(PROMPT, **given), expected)


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_a_cache_under_either_name(name, caplog, golden_model, monkeypatch, recwarn):
    """transformers calls it `cache` since 5.24, `past_key_values` before. Neither is complained of where it goes in."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    logging.Logger.warning_once.cache_clear()
    model = golden_model("base")
    whole = model.generate(PROMPT, do_sample=False, max_new_tokens=10)
    cache = DynamicCache(config=model.config)
    first = model.generate(PROMPT, do_sample=False, max_new_tokens=4, **{name: cache})
    assert cache.get_seq_length() == first.shape[1] - 1
    rest = model.generate(first, do_sample=False, max_new_tokens=6, **{name: cache})
    assert torch.equal(rest, whole)
    *_, streamed = model.stream_generate(
        PROMPT, do_sample=False, max_new_tokens=10, **{name: DynamicCache(config=model.config)}
    )
    assert torch.equal(streamed, whole[:, : streamed.shape[1]])
    cache = DynamicCache(config=model.config)
    output = model(PROMPT, **{name: cache})
    with torch.no_grad():
        model.transformer(whole[:, 5:6], **{name: cache})
    assert cache.get_seq_length() == PROMPT.shape[1] + 1
    assert not caplog.messages
    assert not [str(warning.message) for warning in recwarn if "deprecated" in str(warning.message)]
    assert output.past_key_values is output["past_key_values"] is output[1] is cache
    for call in (model, model.transformer, model.generate):
        with pytest.raises(ValueError, match="two names"):
            call(PROMPT, past_key_values=cache, cache=cache)


def test_outputs_processors_and_criteria(golden_model):
    model = golden_model("base")
    output = model.generate(
        PROMPT,
        do_sample=False,
        max_new_tokens=6,
        return_dict_in_generate=True,
        output_scores=True,
        output_hidden_states=True,
        output_attentions=True,
    )
    assert len(output.scores) == len(output.hidden_states) == len(output.attentions) == 6
    assert output.attentions[0][0].shape == (1, 4, 5, 5)
    forced = model.generate(
        PROMPT, do_sample=False, max_new_tokens=6, prefix_allowed_tokens_fn=lambda batch, ids: [17, 18]
    )
    assert set(forced[0, 5:].tolist()) <= {17, 18}

    class AtSeven(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 7)

    criteria = StoppingCriteriaList([AtSeven()])
    assert model.generate(PROMPT, do_sample=False, stopping_criteria=criteria).shape[1] == 7
    assert [ids.shape[1] for ids in model.stream_generate(PROMPT, do_sample=False, stopping_criteria=criteria)] == [6]


@pytest.mark.parametrize("early", [False, True, "never"])
@pytest.mark.parametrize("penalty", [1.0, 2.0])
def test_beams_are_scored_over_prompt_and_answer_without_the_end(penalty, early, golden_model):
    """As when the model was published."""
    model = golden_model("base")
    given = {"num_beams": 4, "num_return_sequences": 4, "do_sample": False, "max_new_tokens": 8}
    ends = model.generate(PROMPT, eos_token_id=511, **given)[:, 5:].unique().tolist()
    given |= {"early_stopping": early, "length_penalty": penalty, "return_dict_in_generate": True}
    ended = 0
    for end in ends:
        model.config.eos_token_id = end
        output = model.generate(PROMPT, eos_token_id=end, pad_token_id=3, output_scores=True, **given)
        for ids, score in zip(output.sequences, output.sequences_scores, strict=True):
            is_end = ids[5:] == end
            ids = ids[: 6 + is_end.nonzero()[0, 0]] if is_end.any() else ids[ids != 3]
            with torch.no_grad():
                logprobs = model(ids[None]).logits[0, 4:-1].log_softmax(dim=-1)
            total, length = logprobs.gather(1, ids[5:, None]).sum().item(), len(ids) - int(is_end.any())
            assert score.item() == pytest.approx(total / length**penalty, rel=1e-4)
            ended += int(is_end.any())
    assert ended > 0


@pytest.mark.parametrize("early", [False, True, "never"])
def test_beams_end_where_generation_does(early, golden_model):
    """Generation's end tokens count, one, several or none, whatever the configuration's is."""
    model = golden_model("base")
    ids = torch.cat((PROMPT, PROMPT + torch.tensor([[1, 1, 1, 0, 0]])))
    given = {"num_beams": 3, "do_sample": False, "max_new_tokens": 8, "pad_token_id": 3, "early_stopping": early}
    ends = model.generate(ids, eos_token_id=511, **given)[:, 5:].unique()[:3].tolist()

    def answers(configured, eos_token_id, chosen):
        model.config.eos_token_id = configured
        model.generation_config.eos_token_id = chosen
        output = model.generate(
            ids, **given, **eos_token_id, return_dict_in_generate=True, output_scores=True, num_return_sequences=3
        )
        return output.sequences, output.sequences_scores

    for end in (None, ends[0], ends):
        expected = answers(end if isinstance(end, int) else ends[0], {}, end)
        for configured in (None, 511, ends[-1]):
            for eos_token_id, chosen in (({}, end), ({"eos_token_id": end}, 511)):
                if end is None and eos_token_id:
                    continue  # transformers takes None for "as configured"
                for got, wanted in zip(answers(configured, eos_token_id, chosen), expected, strict=True):
                    assert torch.equal(got, wanted)
        if end == ends[0]:
            assert torch.equal(answers(511, {"eos_token_id": [end]}, None)[1], expected[1])
    # Of several ends each leaves its own token out of the mean.
    sequences, scores = answers(None, {}, ends)
    for row, (sequence, score) in enumerate(zip(sequences, scores, strict=True)):
        is_end = torch.isin(sequence[5:], torch.tensor(ends))
        sequence = sequence[: 6 + is_end.nonzero()[0, 0]] if is_end.any() else sequence[sequence != 3]
        with torch.no_grad():
            logprobs = model(sequence[None]).logits[0, 4:-1].log_softmax(dim=-1)
        total = logprobs.gather(1, sequence[5:, None]).sum().item()
        assert score.item() == pytest.approx(total / (len(sequence) - int(is_end.any())), rel=1e-4), row


@pytest.mark.parametrize("pad_token_id", [None, 3])
def test_a_finished_row_of_a_stream_is_padded_as_by_generate(pad_token_id, golden_model):
    model = golden_model("base")
    model.config.pad_token_id = model.generation_config.pad_token_id = pad_token_id
    ids = torch.cat((PROMPT, PROMPT + torch.tensor([[1, 1, 1, 0, 0]])))
    mask = torch.ones_like(ids)
    given = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 8}
    free = model.generate(ids, eos_token_id=511, **given)[:, 5:]
    end = next(token for token in free[0].tolist() if token not in free[1, :-1])
    expected = model.generate(ids, eos_token_id=[end, 511], **given)
    *_, streamed = model.stream_generate(ids, eos_token_id=[end, 511], **given)
    assert torch.equal(streamed, expected[:, : streamed.shape[1]])
    assert (expected[0] == (end if pad_token_id is None else 3)).sum() > 1


def test_length_by_default_is_the_models(golden_model):
    model = golden_model("base")
    model.config.max_sequence_length = 40
    model.generation_config.eos_token_id = None
    assert model.generate(PROMPT, do_sample=False, eos_token_id=None).shape[1] == 40
    assert model.generate(PROMPT, do_sample=False, max_length=9).shape[1] <= 9
    settings = GenerationConfig(max_new_tokens=3, pad_token_id=3)
    assert model.generate(PROMPT, generation_config=settings).shape[1] == 8


def test_a_stream_can_be_left_in_the_middle(golden_model):
    model = golden_model("base")
    stream = model.stream_generate(PROMPT, do_sample=False, max_new_tokens=10)
    next(stream)
    assert torch.is_grad_enabled()  # the stream switches gradients off for itself only
    stream.close()
    expected = model.generate(PROMPT, do_sample=False, max_new_tokens=10)
    assert torch.equal(model.generate(PROMPT, do_sample=False, max_new_tokens=10), expected)


def test_broken_scores_give_a_fixed_id_and_one_warning(caplog, golden_model, monkeypatch):
    model = golden_model("base")
    model.transformer.final_layernorm.weight.data[0] = float("nan")
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    logging.Logger.warning_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        ids = model.generate(PROMPT, do_sample=False, max_new_tokens=4, logits_processor=[FiniteScores()])
    assert ids[0, 5:].tolist() == [5, 5, 5, 5]
    assert len([message for message in caplog.messages if "NaN or infinite" in message]) == 1
    infinite = float("inf")
    fine = torch.tensor([[0.0] * 8, [-infinite] * 3 + [1.0] * 5])
    assert torch.equal(FiniteScores()(None, fine), fine)
    for wrong in (infinite, float("nan")):
        fixed = FiniteScores()(None, torch.cat((fine, torch.tensor([[1.0] * 7 + [wrong]]))))
        assert torch.equal(fixed[:2], fine)
        assert fixed[2].argmax() == 5
    assert FiniteScores()(None, torch.full((1, 8), -infinite)).argmax() == 5


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[7, 8, 9]], r"Sequence 0 of the prompt has no <sop> \(id 504\)"),
        ([[7, 501, 504], [7, 8, 9]], r"Sequence 1 of the prompt has no <sop>"),
        ([[7, 512, 501, 504]], r"0 to 511"),
        ([[-1, 501, 504]], r"-1"),
        ([[]], r"empty"),
        ([7, 501, 504], r"shape \[3\], and \[B, S\] was expected"),
        ([[[7, 501, 504]]], r"shape \[1, 1, 3\], and \[B, S\] was expected"),
        ([[7.0, 501.0, 504.0]], r"int64 tensor \[B, S\].*got torch.float32"),
        ([[False, True, True]], r"int64 tensor \[B, S\].*got torch.bool"),
    ],
)
def test_bad_prompts(ids, message, golden_model):
    model = golden_model("base")
    with pytest.raises(ValueError, match=r"int64 tensor .*got list"):
        model.generate(ids)
    ids = torch.tensor(ids) if any(ids) else torch.zeros(1, 0, dtype=torch.long)
    with pytest.raises(ValueError, match=message):
        model.generate(ids)
    with pytest.raises(ValueError, match=message):
        next(model.stream_generate(ids))


@pytest.mark.parametrize("mask", [[[0, 1, 1, 1]], [[0, 1, 1, 1, 1, 1]], [0, 1, 1, 1, 1], [[1, 1, 1, 1, 0]], [[0] * 5]])
def test_bad_masks(mask, golden_model):
    model = golden_model("base")
    mask = torch.tensor(mask)
    with pytest.raises(ValueError, match=r"must have the shape of the ids, \[1, 5\].*padding on the left"):
        model.generate(PROMPT, attention_mask=mask)
    with pytest.raises(ValueError, match="padding on the left"):
        next(model.stream_generate(PROMPT, attention_mask=mask))


def test_an_early_exit_is_refused_and_leaves_nothing_behind(golden_model):
    model = golden_model("base")
    expected = model.generate(PROMPT, do_sample=False, max_new_tokens=4)
    settings = GenerationConfig(assistant_early_exit=1, max_new_tokens=4)
    for given in ({"assistant_early_exit": 1}, {"generation_config": settings}):
        with pytest.raises(ValueError, match="smaller ChatGLM as assistant_model"):
            model.generate(PROMPT, **given)
    assert torch.equal(model.generate(PROMPT, do_sample=False, max_new_tokens=4), expected)


def test_an_assistant_with_a_prefix_is_refused_by_name(golden_model):
    model = golden_model("prefix")
    expected = model.generate(PROMPT, do_sample=False, max_new_tokens=8)
    with pytest.raises(ValueError, match=r"assistant model has a P-Tuning v2 prefix.*without pre_seq_len"):
        model.generate(PROMPT, assistant_model=golden_model("prefix"), do_sample=False, max_new_tokens=8)
    plain = golden_model("base")
    assert torch.equal(model.generate(PROMPT, assistant_model=plain, do_sample=False, max_new_tokens=8), expected)


def test_arguments_of_a_subclass_reach_its_forward(golden_model):
    model = golden_model("base")
    seen = []

    class Own(type(model)):
        def forward(self, *args, weight=None, **kwargs):
            seen.append(weight)
            return super().forward(*args, **kwargs)

    model.__class__ = Own
    model.generate(PROMPT, weight=3, do_sample=False, max_new_tokens=2)
    assert seen == [3, 3]
    inputs = model.prepare_inputs_for_generation(PROMPT, weight=3, is_first_iteration=True)
    assert inputs["weight"] == 3
    assert "is_first_iteration" not in inputs
    golden_model("base").generate(PROMPT, return_dict=True, do_sample=False, max_new_tokens=2)


def test_what_reads_from_left_to_right_is_refused(golden_model):
    model = golden_model("prefix")
    with pytest.raises(ValueError, match="input_ids"):
        model.generate(inputs_embeds=torch.zeros(1, 3, 64))
    with pytest.raises(ValueError, match="prefill_chunk_size"):
        model.generate(PROMPT, prefill_chunk_size=2)
    with pytest.raises(ValueError, match="prefill_chunk_size"):
        model.generate(PROMPT, generation_config=GenerationConfig(prefill_chunk_size=2, max_new_tokens=2))
    with pytest.raises(NotImplementedError, match="left-padded"):
        model.generate_batch([[7, 501, 504]])
    filled = model.generate(PROMPT, do_sample=False, max_new_tokens=2, return_dict_in_generate=True)
    with pytest.raises(ValueError, match="past_key_values"):
        model.generate(filled.sequences, past_key_values=filled.past_key_values)


def test_what_a_stream_can_not_do_is_refused(golden_model):
    model = golden_model("base")
    model.generation_config.num_beams = 2
    with pytest.raises(ValueError, match="call generate"):
        next(model.stream_generate(PROMPT))
    model.generation_config.num_beams = 1
    for given in ({"num_beams": 3}, {"generation_config": GenerationConfig(num_beams=3)}, {"streamer": object()}):
        with pytest.raises(ValueError, match="call generate"):
            next(model.stream_generate(PROMPT, **given))


def test_text_iterator_streamer(golden_model):
    class Letters:
        """Enough of a tokenizer for a streamer."""

        def decode(self, ids, **kwargs):
            return "".join(f"{int(i)} " for i in ids)

    model = golden_model("base")
    streamer = TextIteratorStreamer(Letters(), skip_prompt=True)
    settings = {"do_sample": False, "max_new_tokens": 8, "streamer": streamer}
    thread = threading.Thread(target=model.generate, args=(PROMPT,), kwargs=settings)
    thread.start()
    text = "".join(streamer)
    thread.join()
    expected = model.generate(PROMPT, do_sample=False, max_new_tokens=8)[0, 5:].tolist()
    assert [int(word) for word in text.split()] == expected
