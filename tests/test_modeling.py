"""The network against what the public implementation computed (tests/data, made with transformers 4.27.1)."""

import copy
import re

import pytest
import torch
from transformers import DynamicCache, StaticCache

from chatglm_int8 import ChatGLMConfig, ChatGLMForConditionalGeneration, cuda_graphs
from chatglm_int8.modeling_chatglm import apply_rotary, rotary_embedding

# Largest difference over the largest number of the reference.
FP32_TOLERANCE = 1e-4
FP16_TOLERANCE = 2e-2  # the two fp16 goldens ran in another order of operations; 2^-11 a rounding, many roundings

FORWARD_CASES = [
    "base_single",
    "base_infill",
    "base_long",
    "base_padded",
    "base_labels",
    "pos1d_single",
    "prefix_single",
    "prefix_proj_single",
    "int8_single",
    "int8_padded",
    "int4_single",
    "int4_padded",
]


def model_of(case: str) -> str:
    return case.removesuffix("_fp16").rsplit("_", 1)[0]


def of_case(cases: dict, case: str) -> dict:
    return {key.removeprefix(f"{case}."): value for key, value in cases.items() if key.startswith(f"{case}.")}


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    assert got.shape == expected.shape
    return ((got.detach().float() - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("case", FORWARD_CASES)
def test_forward_equals_golden(case, attention, cases, golden_model):
    golden = of_case(cases, case)
    model = golden_model(model_of(case), attention=attention)
    with torch.no_grad():
        output = model(
            golden["input_ids"],
            attention_mask=golden.get("attention_mask"),
            position_ids=golden.get("position_ids"),
            labels=golden.get("labels"),
            output_hidden_states=True,
            output_attentions=True,
        )
    assert error(output.logits, golden["logits"]) < FP32_TOLERANCE
    if "loss" in golden:
        assert error(output.loss.view(1), golden["loss"]) < FP32_TOLERANCE
    compared = 0
    for i, hidden in enumerate(output.hidden_states):
        if f"hidden.{i}" in golden:
            assert error(hidden, golden[f"hidden.{i}"]) < FP32_TOLERANCE
            compared += 1
    for i, probs in enumerate(output.attentions):
        if f"attn.{i}" in golden:
            assert error(probs.flatten(0, 1), golden[f"attn.{i}"]) < FP32_TOLERANCE
            compared += 1
    assert compared > 0
    assert len(output.hidden_states) == model.config.num_layers + 1
    # The interface under test, not the eager path that gives probabilities.
    with torch.no_grad():
        logits = model(
            golden["input_ids"],
            attention_mask=golden.get("attention_mask"),
            position_ids=golden.get("position_ids"),
        ).logits
    assert error(logits, golden["logits"]) < FP32_TOLERANCE


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_far_positions_equal_golden(attention, cases, golden_model):
    ids = cases["base_2k.input_ids"]
    with torch.no_grad():
        exact = golden_model("base", attention=attention)(ids, logits_to_keep=32).logits
        half = golden_model("base", torch.float16, attention)(ids, logits_to_keep=32).logits
    assert error(exact, cases["base_2k.last_logits"]) < FP32_TOLERANCE
    assert error(half, cases["base_2k_fp16.last_logits"]) < FP16_TOLERANCE


def test_half_equals_golden(cases, golden_model):
    with torch.no_grad():
        logits = golden_model("base", torch.float16)(cases["base_long.input_ids"]).logits
    assert logits.dtype == torch.float16
    assert error(logits, cases["base_long_fp16.logits"]) < FP16_TOLERANCE


def test_bfloat16_is_close_to_fp32(cases, golden_model):
    ids = cases["base_2k.input_ids"]
    with torch.no_grad():
        logits = golden_model("base", torch.bfloat16)(ids, logits_to_keep=32).logits
    # Far positions would be off by their whole angle if bf16 touched them: 8 bits do not count to 1900.
    assert error(logits, cases["base_2k.last_logits"]) < 8 * FP16_TOLERANCE


@pytest.mark.parametrize("case", ["base_padded", "base_labels", "int8_padded", "int4_padded"])
def test_masks_and_positions_are_derived(case, cases, golden_model):
    golden = of_case(cases, case)
    model = golden_model("base")
    real = ~golden["attention_mask"][:, 0, -1]
    hidden = model.get_masks(golden["input_ids"], attention_mask=real)
    queries = real[:, None, :, None].expand_as(hidden)  # what padding itself sees does not matter
    assert torch.equal(hidden[queries], golden["attention_mask"][queries])
    positions = model.get_position_ids(golden["input_ids"], attention_mask=real)
    columns = real[:, None].expand_as(positions)
    assert torch.equal(positions[columns], golden["position_ids"][columns])
    with torch.no_grad():
        logits = model(golden["input_ids"], attention_mask=real.long()).logits
        expected = model(
            golden["input_ids"], attention_mask=golden["attention_mask"], position_ids=golden["position_ids"]
        ).logits
    assert error(logits[real], expected[real]) < FP32_TOLERANCE


def test_positions_by_hand(golden_model):
    model = golden_model("base")
    gmask, mask, sop, pad = 501, 500, 504, 3
    rows = {
        "gmask": ([7, 8, gmask, sop, 9, 9], [0, 1, 2, 2, 2, 2], [0, 0, 0, 1, 2, 3]),
        "gmask wins over an earlier mask": ([mask, 8, gmask, sop, 9, 9], [0, 1, 2, 2, 2, 2], [0, 0, 0, 1, 2, 3]),
        "mask in the middle": ([7, mask, 8, sop, 9, 9], [0, 1, 2, 1, 1, 1], [0, 0, 0, 1, 2, 3]),
        "no mask: the last of the context": ([7, 8, 9, sop, 9, 9], [0, 1, 2, 2, 2, 2], [0, 0, 0, 1, 2, 3]),
        "no sop: all context": ([7, 8, 9, gmask, 9, 9], [0, 1, 2, 3, 4, 5], [0, 0, 0, 0, 0, 0]),
        "a second sop is an answer's token": ([7, 8, gmask, sop, sop, 9], [0, 1, 2, 2, 2, 2], [0, 0, 0, 1, 2, 3]),
        "marks of the answer don't count": ([7, 8, 9, sop, mask, gmask], [0, 1, 2, 2, 2, 2], [0, 0, 0, 1, 2, 3]),
        "sop first": ([sop, 7, 8, 9, 9, 9], [0, 0, 0, 0, 0, 0], [1, 2, 3, 4, 5, 6]),
    }
    ids = torch.tensor([ids for ids, _, _ in rows.values()])
    expected = torch.tensor([[place, count] for _, place, count in rows.values()])
    assert torch.equal(model.get_position_ids(ids), expected)
    # Behind padding, the same.
    padded = torch.cat((torch.full((len(rows), 2), pad), ids), dim=1)
    assert torch.equal(model.get_position_ids(padded, attention_mask=padded != pad)[..., 2:], expected)
    # As fine-tuning scripts call it.
    old = model.get_position_ids(ids[:2], mask_positions=[2, 2], device=torch.device("cpu"), use_gmasks=[True, True])
    assert torch.equal(old, expected[:2])


def test_positions_1d(golden_model):
    model = golden_model("pos1d")
    ids = torch.tensor([[7, 8, 501, 504, 9, 9], [7, 500, 8, 504, 9, 9]])
    expected = torch.tensor([[0, 1, 2, 3, 4, 5], [0, 1, 2, 1, 1, 1]])
    assert torch.equal(model.get_position_ids(ids), expected)
    assert torch.equal(model.get_position_ids(ids, mask_positions=[2, 1], use_gmasks=[True, False]), expected)


def test_masks_by_hand(golden_model):
    hidden = golden_model("base").get_masks(torch.tensor([[7, 501, 504, 9]]), device="cpu")
    assert hidden.shape == (1, 1, 4, 4)
    expected = [[0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1], [0, 0, 0, 0]]
    assert torch.equal(hidden[0, 0].int(), torch.tensor(expected, dtype=torch.int32))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["base", "pos1d", "prefix", "prefix_proj", "int8"])
def test_cached_steps_equal_one_forward(name, attention, golden_model):
    model = golden_model(name, attention=attention)
    ids = torch.tensor([[7, 8, 9, 500, 10, 504, 11, 12, 13, 14]])
    with torch.no_grad():
        whole = model(ids).logits
        for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=24)):
            parts, start = [], 0
            for end in (7, 8, 10):
                output = model(ids[:, start:end], past_key_values=cache)
                parts.append(output.logits)
                start = end
            assert error(torch.cat(parts, dim=1), whole) < FP32_TOLERANCE
        cache = DynamicCache(config=model.config)
        positions = model.get_position_ids(ids)
        model(ids[:, :7], position_ids=positions[..., :7], past_key_values=cache)
        with pytest.raises(ValueError, match="position_ids"):
            model(ids[:, 7:], past_key_values=cache)
        last = model(ids[:, 7:], position_ids=positions[..., 7:], past_key_values=cache).logits
    assert error(last, whole[:, 7:]) < FP32_TOLERANCE


@pytest.mark.parametrize("name", ["base", "prefix"])
@torch.no_grad()
def test_derived_positions_follow_the_cache(name, golden_model):
    """Or are refused, if what it holds is not known."""
    model = golden_model(name)
    ids = torch.tensor([[7, 8, 9, 500, 10, 504, 11, 12, 13, 14]])
    expected = model(ids).logits[:, 8:9]
    positions = model.get_position_ids(ids)

    def filled() -> DynamicCache:
        cache = DynamicCache(config=model.config)
        model(ids[:, :8], past_key_values=cache)
        return cache

    cache = filled()
    model(torch.tensor([[77]]), past_key_values=cache)
    cache.crop(-1)
    assert error(model(ids[:, 8:9], past_key_values=cache).logits, expected) < FP32_TOLERANCE

    stepped, repeated = filled(), filled()
    model(ids[:, 8:9], position_ids=positions[..., 8:9], past_key_values=stepped)
    with pytest.raises(ValueError, match="needs position_ids"):
        model(ids[:, 9:], past_key_values=stepped)
    repeated.batch_repeat_interleave(2)
    with pytest.raises(ValueError, match="needs position_ids"):
        model(ids[:, 8:9].expand(2, 1), past_key_values=repeated)


def test_embeddings_in_place_of_ids(golden_model):
    model = golden_model("base")
    ids = torch.tensor([[7, 8, 501, 504, 9]])
    embeddings = model.get_input_embeddings()(ids)
    with torch.no_grad():
        expected = model(ids).logits
        assert torch.equal(model(inputs_embeds=embeddings, position_ids=model.get_position_ids(ids)).logits, expected)
    with pytest.raises(ValueError, match="position_ids"):
        model(inputs_embeds=embeddings)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model(ids, inputs_embeds=embeddings)
    model = golden_model("pos1d")
    with pytest.raises(ValueError, match="pass a 4-D attention_mask"):
        model(inputs_embeds=model.get_input_embeddings()(ids), position_ids=model.get_position_ids(ids))


def test_logits_to_keep_and_tuples(golden_model):
    model = golden_model("base")
    ids = torch.tensor([[7, 8, 501, 504, 9]])
    with torch.no_grad():
        whole = model(ids).logits
        assert error(model(ids, logits_to_keep=2).logits, whole[:, -2:]) < FP32_TOLERANCE
        assert error(model(ids, logits_to_keep=torch.tensor([0, 3])).logits, whole[:, [0, 3]]) < FP32_TOLERANCE
        assert torch.equal(model(ids, return_dict=False)[0], whole)
        assert model(ids, labels=ids.where(ids == 9, -100), logits_to_keep=2).logits.shape[1] == 2
        answer = model.generate(ids, do_sample=False, max_new_tokens=3)
        model.config.return_dict = False
        assert torch.equal(model(ids)[0], whole)
        assert torch.equal(model.generate(ids, do_sample=False, max_new_tokens=3), answer)
        *_, streamed = model.stream_generate(ids, do_sample=False, max_new_tokens=3)
        assert torch.equal(streamed, answer[:, :-1])
        model.config.return_dict = True
        assert model(ids, use_cache=False).past_key_values is None
        model.config.use_cache = False
        assert model(ids).past_key_values is None
        assert model.transformer(ids).last_hidden_state.shape == (1, 5, model.config.hidden_size)


def test_bad_ids(golden_model):
    model = golden_model("base")
    with pytest.raises(ValueError, match=r"empty"):
        model(torch.zeros(1, 0, dtype=torch.long))
    with pytest.raises(ValueError, match=r"from 1 to 512, .* 0 to 511"):
        model(torch.tensor([[1, 512]]))
    with pytest.raises(ValueError, match=r"from 600 to 600"):
        model(torch.tensor([[600]]))
    with pytest.raises(ValueError, match=r"from -1 to 2"):
        model(torch.tensor([[-1, 2]]))


def test_rotary_turns_pairs_by_their_angle():
    positions = torch.tensor([[[3, 5], [0, 2]]])  # [B, R, S]
    cos, sin = rotary_embedding(positions, head_dim=8, dtype=torch.float32)
    x = torch.randn(1, 2, 1, 8, generator=torch.Generator().manual_seed(0))
    turned = apply_rotary(x, cos, sin)
    for s in range(2):
        for r in range(2):
            for j in range(2):
                angle = positions[0, r, s] * torch.tensor(10000.0 ** (-2 * j / 4)).half().float()
                a, b = x[0, s, 0, 4 * r + j], x[0, s, 0, 4 * r + j + 2]
                got = turned[0, s, 0, 4 * r + j], turned[0, s, 0, 4 * r + j + 2]
                assert torch.allclose(got[0], a * angle.cos() - b * angle.sin(), atol=1e-6)
                assert torch.allclose(got[1], a * angle.sin() + b * angle.cos(), atol=1e-6)


def test_large_scores_do_not_overflow_in_half():
    # Scores of 60 · 60 · 32 are beyond fp16 before they are scaled, and far below its limit after.
    config = ChatGLMConfig(
        vocab_size=16,
        hidden_size=64,
        num_layers=2,
        num_attention_heads=2,
        quantization_bit=0,
        bos_token_id=10,
        eos_token_id=11,
        mask_token_id=12,
        gmask_token_id=13,
    )
    for attention in ("eager", "sdpa"):
        torch.manual_seed(0)
        model = ChatGLMForConditionalGeneration(config).half().eval()
        model.set_attn_implementation(attention)
        for bias in (60.0, 120.0):  # of 120 only half the scores are below the limit, as in layer 1
            model.transformer.layers[0].attention.query_key_value.bias.data.fill_(60.0)
            model.transformer.layers[1].attention.query_key_value.bias.data.fill_(bias)
            logits = model(torch.tensor([[1, 2, 13, 10, 3]])).logits  # without gradients, a CPU has float32
            assert logits.isfinite().all()


@torch.no_grad()
def test_a_4d_mask_leaves_the_prefix_to_be_seen(golden_model):
    model, ids = golden_model("prefix"), torch.tensor([[7, 8, 501, 504, 9]])
    expected = model(ids).logits
    assert error(model(ids, attention_mask=model.get_masks(ids)).logits, expected) < FP32_TOLERANCE


def test_gradients_through_a_cache(golden_model):
    ids, found = torch.tensor([[7, 8, 9, 501, 504, 10, 11]]), []
    for ends in ((7,), (5, 6, 7)):
        model, parts, start = golden_model("base"), [], 0
        cache = DynamicCache(config=model.config)
        for end in ends:
            parts.append(model(ids[:, start:end], past_key_values=cache).logits)
            start = end
        torch.cat(parts, dim=1).square().sum().backward()
        found.append(model.transformer.layers[0].attention.query_key_value.weight.grad)
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)


def test_a_new_model_has_sane_weights():
    torch.manual_seed(0)
    for bits in (0, 4, 8):
        config = ChatGLMConfig(
            vocab_size=64,
            hidden_size=64,
            num_layers=2,
            num_attention_heads=2,
            quantization_bit=bits,
            **{"bos_token_id": 60, "eos_token_id": 61, "mask_token_id": 62, "gmask_token_id": 63},
        )
        model = ChatGLMForConditionalGeneration(config)
        assert model.lm_head.weight is model.transformer.word_embeddings.weight
        weight = model.transformer.layers[1].mlp.dense_h_to_4h
        weight = weight.dequantize() if bits else weight.weight
        assert weight.std().item() == pytest.approx(0.02, rel=0.1)
        assert model(torch.tensor([[1, 2, 63, 60, 3]])).logits.isfinite().all()


@torch.no_grad()
def test_a_step_with_tensors_that_the_kernels_do_not_take(golden_model):
    """Per-head masks, positions of one sequence for all, and autocast's mixture of dtypes."""
    model = golden_model("int8")
    ids = torch.tensor([[7, 8, 9, 501, 504], [7, 8, 10, 501, 504]])
    first = model(ids, use_cache=True)
    step, positions = torch.tensor([[9], [9]]), model.get_position_ids(torch.cat((ids, ids[:, :1]), dim=1))[:1, :, -1:]
    expected = model(step, position_ids=positions.expand(2, -1, -1), past_key_values=first.past_key_values).logits
    first.past_key_values.crop(-1)
    mask = torch.zeros(2, model.config.num_attention_heads, 1, 6)
    got = model(step, position_ids=positions, past_key_values=first.past_key_values, attention_mask=mask).logits
    assert torch.allclose(got, expected, rtol=1e-4, atol=1e-4)
    for dtype in (torch.float32, torch.bfloat16):
        mixed = golden_model("int8", dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert mixed.generate(ids[:1], do_sample=False, max_new_tokens=4).shape == (1, 9)


def test_what_is_kept_for_the_next_answer_goes_when_the_model_moves_or_learns(golden_model):
    model = golden_model("int8")
    for change, stays in ((model.eval, True), (model.train, False), (model.half, False), (model.cpu, False)):
        cuda_graphs._idle[model] = "a graph and its memory"
        change()
        assert (model in cuda_graphs._idle) == stays


def test_a_prefix_is_not_for_steps_recorded_without(golden_model, tmp_path):
    state = golden_model("prefix").state_dict()
    torch.save({name: tensor for name, tensor in state.items() if "prefix_encoder" in name}, tmp_path / "prefix.bin")
    model = golden_model("base")
    cuda_graphs._idle[model] = "a graph and its memory"
    model.load_prefix(tmp_path / "prefix.bin")
    assert model not in cuda_graphs._idle


@torch.no_grad()
def test_the_cache_of_recorded_steps_is_a_cache(golden_model):
    """It can be copied, and only one id is a step; without a GPU, no step is recorded here."""
    model = golden_model("int8")
    ids = torch.tensor([[7, 8, 9, 501, 504, 10, 11, 12]])
    positions = model.get_position_ids(ids)
    expected = model(ids).logits
    cache = cuda_graphs.StepCache(model, torch.zeros(1, dtype=torch.int32))
    model(ids[:, :5], position_ids=positions[..., :5], past_key_values=cache)
    copied = copy.deepcopy(cache)
    for each in (cache, copied):
        each.set_positions(positions[..., 5], positions[..., 5] - positions[..., 4])
        given = {"position_ids": positions[..., 5:], "past_key_values": each, "output_hidden_states": True}
        with pytest.raises(ValueError, match="needs position_ids"):
            model(ids[:, 5:], past_key_values=each)
        output = model(ids[:, 5:], **given)
        assert error(output.logits, expected[:, 5:]) < FP32_TOLERANCE
        assert len(output.hidden_states) == model.config.num_layers + 1
    half = torch.zeros(1, 1, dtype=torch.float16)
    with torch.no_grad():  # no kernel takes two dtypes
        assert cache.store_prompt(0, half.bfloat16(), half, half) is None


# Caches


@pytest.mark.parametrize("kept", ["fork of layers", "keys before a crop", "deep copy", "kept keys"])
@torch.no_grad()
def test_a_fork_of_a_cache_is_not_written_to(kept, golden_model):
    """As with transformers' DynamicCache, whose steps make new tensors."""
    model = golden_model("base")
    ids = torch.tensor([[7, 8, 501, 504, 9]])
    cache = model(ids, use_cache=True).past_key_values
    model(ids[:, :1] + 3, past_key_values=cache)
    if kept == "fork of layers":
        fork = copy.copy(cache)
        fork.layers = [copy.copy(layer) for layer in cache.layers]
    elif kept == "deep copy":
        fork = copy.deepcopy(cache)
    else:
        fork = cache
    keys, values = fork.layers[1].keys, fork.layers[1].values
    expected = keys.clone(), values.clone()
    if kept == "keys before a crop":
        cache.crop(-2)
    for token in (20, 21):
        model(torch.tensor([[token]]), past_key_values=cache)
    assert torch.equal(keys, expected[0])
    assert torch.equal(values, expected[1])
    if fork is not cache:
        both = [model(torch.tensor([[22]]), past_key_values=each).logits for each in (fork, cache)]
        whole = torch.cat((ids, ids[:, :1] + 3, torch.tensor([[22]])), dim=1)
        assert error(both[0], model(whole).logits[:, -1:]) < FP32_TOLERANCE
        assert fork.get_seq_length() == 7
        assert cache.get_seq_length() == 9


@torch.no_grad()
def test_steps_write_in_place(golden_model):
    model = golden_model("base")
    cache = model(torch.tensor([[7, 8, 501, 504, 9]]), use_cache=True).past_key_values
    places = set()
    for token in range(20, 30):
        model(torch.tensor([[token]]), past_key_values=cache)
        places.add(cache.layers[0].keys.data_ptr())
    assert len(places) == 1


# Positions of other shapes


@pytest.mark.parametrize("name", ["base", "pos1d", "int8"])
@torch.no_grad()
def test_positions_of_another_shape_are_refused(name, golden_model):
    model = golden_model(name)
    ids = torch.tensor([[7, 8, 501, 504, 9], [7, 9, 501, 504, 8], [7, 9, 501, 504, 7]])
    positions, expected = model.get_position_ids(ids), model(ids).logits
    rows = "[3, 5]" if name == "pos1d" else "[3, 2, 5]"
    wrong = [positions[:, None, ..., :], positions[0], positions[:2], positions[..., :4]]
    if name == "pos1d":
        wrong.append(positions[:, None].expand(-1, 2, -1))
    else:
        wrong += [positions[:, :1], positions[:, [0, 1, 1]]]
    for given in wrong:
        with pytest.raises(ValueError, match=rf"position_ids (of|have) shape {re.escape(str(list(given.shape)))}"):
            model(ids, position_ids=given)
        with pytest.raises(ValueError, match=re.escape(rows)):
            model.transformer(ids, position_ids=given)
    assert torch.equal(model(ids, position_ids=positions).logits, expected)
    assert error(model(ids, position_ids=positions[:1]).logits[:1], expected[:1]) < FP32_TOLERANCE


@torch.no_grad()
def test_positions_that_count_the_columns_say_nothing_new(golden_model):
    """Libraries pass them to any model: counted with padding or without, and in steps."""
    model = golden_model("base")
    ids = torch.tensor([[7, 8, 9, 10, 501, 504, 9], [3, 3, 3, 8, 501, 504, 9]])
    mask = (ids != 3).long()
    real = mask.bool()
    expected = model(ids, attention_mask=mask).logits
    columns = torch.arange(7).expand(2, -1)
    counted = mask.cumsum(1) - 1
    for given in (columns, columns[:1], counted.clamp(min=0), counted.masked_fill(~real, 1)):
        assert torch.equal(model(ids, attention_mask=mask, position_ids=given).logits[real], expected[real])
    first = model(ids[:, :6], attention_mask=mask[:, :6], position_ids=columns[:, :6], use_cache=True)
    for given in (columns[:, 6:], counted[:, 6:]):
        step = model(ids[:, 6:], attention_mask=mask, position_ids=given, past_key_values=first.past_key_values).logits
        assert error(step, expected[:, 6:]) < FP32_TOLERANCE
        first.past_key_values.crop(-1)
    for given in (columns + 1, columns.flip(1), torch.tensor([[0, 1, 2, 3, 0, 1, 2]] * 2)):
        with pytest.raises(ValueError, match=r"do not count the columns.*get_position_ids.*Packed"):
            model(ids, attention_mask=mask, position_ids=given)


@pytest.mark.parametrize("name", ["base", "pos1d"])
@pytest.mark.parametrize("flash", [False, True])
def test_packed_rows_are_refused(name, flash, golden_model):
    from transformers import DataCollatorWithFlattening

    model = golden_model(name)
    rows = [[7, 8, 501, 504, 9, 505], [9, 501, 504, 10, 505]]
    labels = [[-100, -100, -100, 504, 9, 505], [-100, -100, 504, 10, 505]]
    features = [{"input_ids": ids, "labels": wanted} for ids, wanted in zip(rows, labels, strict=True)]
    batch = DataCollatorWithFlattening(return_position_ids=not flash, return_flash_attn_kwargs=flash)(features)
    with pytest.raises(ValueError, match=r"[Pp]acked sequences.*pad the batch"):
        model(**batch)


# Masks in other forms


@pytest.mark.parametrize("name", ["base", "prefix", "int8"])
@pytest.mark.parametrize("side", ["left", "right", "none"])
@torch.no_grad()
def test_masks_as_transformers_writes_them(name, side, golden_model):
    """Bool with True = seen, and floats to add: of the same scores as the public form, and of steps."""
    model = golden_model(name)
    row, pad = [7, 8, 501, 504, 9, 10], 3
    rows = {"left": [[pad, pad, *row[2:]], row], "right": [row, [*row[:4], pad, pad]], "none": [row, row[::-1]]}
    ids = torch.tensor(rows[side])
    real = ids != pad
    given = {"position_ids": model.get_position_ids(ids, attention_mask=real)}
    hidden = model.get_masks(ids, attention_mask=real)
    expected = model(ids, attention_mask=real.long()).logits
    lowest = torch.zeros(hidden.shape).masked_fill(hidden, torch.finfo(torch.float32).min)
    infinite = torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf)
    padded_rows = ~hidden & real[:, None, :, None]  # transformers hides all from padding
    for mask in (hidden, ~hidden, padded_rows, hidden.long(), (~hidden).long(), lowest, infinite, lowest.double()):
        got = model(ids, attention_mask=mask, **given).logits
        assert error(got[real], expected[real]) < FP32_TOLERANCE
        cache = StaticCache(config=model.config, max_cache_len=16)
        got = model(ids, attention_mask=mask, past_key_values=cache, **given).logits
        assert error(got[real], expected[real]) < FP32_TOLERANCE
        if side == "right":
            continue
        first = {name: value[..., :5] for name, value in given.items()}
        cache = model(ids[:, :5], attention_mask=mask[..., :5, :5], use_cache=True, **first).past_key_values
        step = model(
            ids[:, 5:],
            attention_mask=mask[..., 5:, :],
            position_ids=given["position_ids"][..., 5:],
            past_key_values=cache,
        ).logits
        assert error(step, expected[:, 5:]) < FP32_TOLERANCE


@torch.no_grad()
def test_masks_by_transformers_own_functions(golden_model):
    from transformers.masking_utils import create_causal_mask

    for attention in ("eager", "sdpa"):
        model = golden_model("base", attention=attention)
        ids = torch.tensor([[504, 8, 9, 10, 11, 12]])  # an answer alone: causal
        embeddings = model.get_input_embeddings()(ids)
        padding = torch.tensor([[0, 0, 1, 1, 1, 1]])
        mask = create_causal_mask(model.config, embeddings, padding, past_key_values=None)
        assert mask.shape == (1, 1, 6, 6)
        positions = model.get_position_ids(ids, attention_mask=padding)
        expected = model(ids, attention_mask=padding, position_ids=positions).logits[:, 2:]
        got = model(ids, attention_mask=mask, position_ids=positions).logits[:, 2:]
        assert error(got, expected) < FP32_TOLERANCE


@torch.no_grad()
def test_masks_of_another_shape_are_refused(golden_model):
    model = golden_model("base")
    ids = torch.tensor([[7, 8, 501, 504, 9]] * 2)
    for shape in ((2, 4), (2, 6), (3, 5), (5,), (2, 5, 5), (2, 1, 4, 5), (2, 1, 5, 4), (3, 1, 5, 5)):
        with pytest.raises(
            ValueError, match=re.escape(f"attention_mask has shape {list(shape)}, and [2, 5] or [2, 1,")
        ):
            model(ids, attention_mask=torch.ones(shape))
    cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"shape \[2, 1\], and \[2, 6\]"):
        model(ids[:, :1], attention_mask=torch.ones(2, 1), past_key_values=cache)


# A prompt is one piece


@pytest.mark.parametrize("name", ["base", "pos1d"])
@torch.no_grad()
def test_a_prompt_in_pieces_is_refused(name, golden_model):
    model = golden_model(name)
    ids = torch.tensor([[7, 8, 9, 10, 501, 504, 11, 12]])
    cache = DynamicCache(config=model.config)
    model(ids[:, :2], past_key_values=cache)
    with pytest.raises(ValueError, match="read in one forward on an empty cache"):
        model(ids[:, 2:], past_key_values=cache)
    cache = DynamicCache(config=model.config)
    model(ids[:, :7], past_key_values=cache)
    second = torch.tensor([[13, 504, 14]])  # one of an answer
    expected = model(torch.cat((ids[:, :7], second), dim=1)).logits[:, -3:]
    assert error(model(second, past_key_values=cache).logits, expected) < FP32_TOLERANCE


@pytest.mark.parametrize("method", ["PrefixTuningConfig", "PromptTuningConfig", "PromptEncoderConfig"])
def test_prompts_of_peft_point_to_the_models_own(method, golden_model):
    peft = pytest.importorskip("peft", reason="needs peft")
    config = golden_model("base").config
    shape = {"num_layers": config.num_layers, "num_attention_heads": config.num_attention_heads}
    given = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4, "token_dim": config.hidden_size, **shape}
    tuned = peft.get_peft_model(golden_model("base"), getattr(peft, method)(**given))
    ids = torch.tensor([[7, 8, 501, 504, 9, 10]])
    for call in (
        lambda: tuned(input_ids=ids, attention_mask=torch.ones_like(ids)),
        lambda: tuned(input_ids=ids, labels=ids.where(ids < 0, -100)),
        lambda: tuned.generate(input_ids=ids[:, :4], max_new_tokens=2),
    ):
        with pytest.raises(ValueError, match=r"config\.pre_seq_len, model\.load_prefix"):
            call()
