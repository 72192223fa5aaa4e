"""What the test suites of transformers and accelerate ask of any model, on small models in float and in INT8.

The suites themselves are not in the library's wheel, so their cases stand here in this model's terms: prompts end in
`[gMASK] <sop>`, and positions have two rows. Left out, and why:

* `inputs_embeds` in generation: positions and masks come from ids.
* padding-free and packed rows, chunked prefill, continuous batching: a prompt sees itself both ways, so it is one piece
  with a mask of its own. They are refused, see `test_modeling`.
* flash attention and flex attention: no kernel there has a bidirectional context before a causal answer.
* attention backends by name of a hub kernel, tensor parallel plans: need GPUs or the hub.
* rotary scaling, sliding windows, head pruning, sequence classification: not of this model.
* gradients of the INT8 weights: integers have none.
"""

import copy
import inspect

import pytest
import torch
from transformers import (
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DynamicCache,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    StaticCache,
    set_seed,
)

from chatglm_int8 import ChatGLMForConditionalGeneration
from chatglm_int8.modeling_chatglm import ChatGLMModel

SOP = 504
PROMPTS = torch.tensor([[7, 8, 9, 10, 501, SOP], [3, 3, 11, 12, 501, SOP]])
PADDING = (PROMPTS != 3).long()
ROWS = torch.tensor([[7, 8, 501, SOP, 9, 10, 505], [11, 12, 501, SOP, 13, 505, 3]])
GREEDY = {"do_sample": False, "max_new_tokens": 6}

kinds = pytest.mark.parametrize("name", ["base", "int8"])


def labels_of(ids: torch.Tensor) -> torch.Tensor:
    return ids.where(((ids == SOP).cumsum(dim=1) > 0) & (ids != 3), -100)


def close(got: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.allclose(got, expected, rtol=1e-4, atol=2e-4)


# ModelTesterMixin


@kinds
def test_save_load(name, golden_model, tmp_path):
    model = golden_model(name)
    expected = model(ROWS).logits
    model.save_pretrained(tmp_path)
    again, info = ChatGLMForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert close(again(ROWS).logits, expected)  # by another implementation of attention
    assert not again.training


@kinds
def test_from_pretrained_without_init(name, golden_model, tmp_path):
    """Every weight comes from the file, none from an initialisation that was skipped."""
    model = golden_model(name)
    model.save_pretrained(tmp_path)
    first, second = (ChatGLMForConditionalGeneration.from_pretrained(tmp_path) for _ in range(2))
    for key, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[key]), key


@kinds
def test_determinism(name, golden_model):
    model = golden_model(name)
    assert torch.equal(model(ROWS).logits, model(ROWS).logits)


def test_forward_signature():
    for kind in (ChatGLMModel, ChatGLMForConditionalGeneration):
        assert next(iter(list(inspect.signature(kind.forward).parameters)[1:])) == "input_ids"


@kinds
@torch.no_grad()
def test_hidden_states_and_attentions_output(name, golden_model):
    model = golden_model(name)
    config, (batch, length) = model.config, ROWS.shape
    for given in ({"output_hidden_states": True, "output_attentions": True}, {}):
        if not given:
            model.config.output_hidden_states = model.config.output_attentions = True
        output = model(ROWS, **given)
        assert len(output.hidden_states) == config.num_layers + 1
        assert {tuple(each.shape) for each in output.hidden_states} == {(batch, length, config.hidden_size)}
        heads = config.num_attention_heads
        assert {tuple(each.shape) for each in output.attentions} == {(batch, heads, length, length)}
        sums = torch.stack(output.attentions).sum(dim=-1)
        torch.testing.assert_close(sums, torch.ones_like(sums))


@kinds
def test_retain_grad_hidden_states_attentions(name, golden_model):
    model = golden_model(name)
    model.enable_input_require_grads()
    output = model(ROWS, output_hidden_states=True, output_attentions=True)
    hidden, attention = output.hidden_states[1], output.attentions[0]
    hidden.retain_grad()
    attention.retain_grad()
    output.logits.flatten()[0].backward()
    assert hidden.grad.abs().sum() > 0
    assert attention.grad.abs().sum() > 0


@kinds
@torch.no_grad()
def test_model_outputs_equivalence(name, golden_model):
    model = golden_model(name)
    for given in ({}, {"labels": labels_of(ROWS)}, {"output_hidden_states": True, "output_attentions": True}):
        named, placed = model(ROWS, use_cache=False, **given), model(ROWS, use_cache=False, return_dict=False, **given)

        def compare(one, other):
            if isinstance(one, tuple):
                assert len(one) == len(other)
                for pair in zip(one, other, strict=True):
                    compare(*pair)
            else:
                assert torch.equal(one, other)

        compare(named.to_tuple(), placed)


@kinds
@torch.no_grad()
def test_inputs_embeds_matches_input_ids(name, golden_model):
    model = golden_model(name)
    embeddings = model.get_input_embeddings()(ROWS)
    given = {"position_ids": model.get_position_ids(ROWS)}
    assert close(model(inputs_embeds=embeddings, **given).logits, model(ROWS, **given).logits)


@kinds
@torch.no_grad()
def test_batching_equivalence(name, golden_model):
    model = golden_model(name)
    batched = model(PROMPTS, attention_mask=PADDING).logits
    for row in range(2):
        real = PADDING[row].bool()
        assert close(model(PROMPTS[row][real][None]).logits[0], batched[row, real])


@kinds
@pytest.mark.parametrize("grad", [True, False])
def test_eager_matches_sdpa(name, grad, golden_model):
    eager, sdpa = (golden_model(name, attention=attention) for attention in ("eager", "sdpa"))
    with torch.set_grad_enabled(grad):
        one, other = (each(PROMPTS, attention_mask=PADDING).logits for each in (eager, sdpa))
    assert close(one[PADDING.bool()], other[PADDING.bool()])


def test_resize_tokens_embeddings(golden_model):
    model = golden_model("base")
    expected = model(ROWS).logits
    model.resize_token_embeddings(520)
    assert model.config.vocab_size == 520
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert torch.equal(model(ROWS).logits[..., :512], expected)
    model.resize_token_embeddings(512)
    assert torch.equal(model(ROWS).logits, expected)


@kinds
def test_training(name, golden_model):
    model = golden_model(name).train()
    model(ROWS, labels=labels_of(ROWS)).loss.backward()
    floats = [p for p in model.parameters() if p.requires_grad]
    assert floats
    assert all(p.grad is not None and p.grad.isfinite().all() for p in floats)


@kinds
@pytest.mark.parametrize("reentrant", [True, False])
def test_training_gradient_checkpointing(name, reentrant, golden_model):
    found = []
    for checkpointing in (False, True):
        model = golden_model(name).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(ROWS, labels=labels_of(ROWS)).loss.backward()
        found.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for key, gradient in found[0].items():
        torch.testing.assert_close(found[1][key], gradient, rtol=1e-3, atol=1e-5, msg=key)


def test_training_overfit(golden_model, learn):
    losses = learn(golden_model("base").train(), ROWS, labels_of(ROWS), 3e-3, 25)
    assert losses[-1] < 0.1 * losses[0]


@kinds
def test_copies_are_independent(name, golden_model):
    model = golden_model(name)
    expected = model(ROWS).logits
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert torch.equal(model(ROWS).logits, expected)


# GenerationTesterMixin


@kinds
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"do_sample": True, "top_k": 20, "top_p": 0.9},
        {"num_beams": 2},
        {"num_beams": 2, "do_sample": True},
        {"num_beams": 2, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 2},
    ],
    ids=str,
)
def test_generate_dict_outputs(name, settings, golden_model):
    model = golden_model(name)
    asked = ("output_scores", "output_logits", "output_hidden_states", "output_attentions", "return_dict_in_generate")
    settings = {**GREEDY, "pad_token_id": 3, "min_new_tokens": 6, **settings}
    set_seed(0)
    plain = model.generate(PROMPTS, attention_mask=PADDING, **settings)
    set_seed(0)
    output = model.generate(PROMPTS, attention_mask=PADDING, **settings, **dict.fromkeys(asked, True))
    rows = 2 * settings.get("num_return_sequences", 1)
    assert torch.equal(output.sequences, plain)
    assert plain.shape == (rows, PROMPTS.shape[1] + 6)
    assert len(output.scores) == len(output.logits) == len(output.hidden_states) == len(output.attentions) == 6
    assert output.hidden_states[0][0].shape[1] == PROMPTS.shape[1]
    assert {states[0].shape[1] for states in output.hidden_states[1:]} == {1}


@kinds
def test_generate_with_and_without_a_cache(name, golden_model):
    model = golden_model(name)
    expected = model.generate(PROMPTS, attention_mask=PADDING, use_cache=False, **GREEDY)
    for given in (
        {},
        {"past_key_values": DynamicCache(config=model.config)},
        {"cache_implementation": "static"},
        {"past_key_values": StaticCache(config=model.config, max_cache_len=32)},
    ):
        assert torch.equal(model.generate(PROMPTS, attention_mask=PADDING, **given, **GREEDY), expected)


@kinds
def test_left_padding_compatibility(name, golden_model):
    model = golden_model(name)
    alone = model.generate(PROMPTS[1:, 2:], attention_mask=PADDING[1:, 2:], **GREEDY)
    assert torch.equal(model.generate(PROMPTS[1:], attention_mask=PADDING[1:], **GREEDY)[:, 2:], alone)


@kinds
def test_generate_with_masks_of_four_dimensions(name, golden_model):
    model = golden_model(name)
    expected = model.generate(PROMPTS, attention_mask=PADDING, **GREEDY)
    hidden = model.get_masks(PROMPTS, attention_mask=PADDING)
    added = torch.zeros(hidden.shape).masked_fill(hidden, torch.finfo(torch.float32).min)
    for mask in (hidden, ~hidden, ~hidden & PADDING.bool()[:, None, :, None], added):
        assert torch.equal(model.generate(PROMPTS, attention_mask=mask, **GREEDY), expected)


@kinds
def test_generate_continue_from_past_key_values(name, golden_model):
    model = golden_model(name)
    model.generation_config.eos_token_id = -1
    whole = model.generate(PROMPTS[:1], **GREEDY)
    first = model.generate(PROMPTS[:1], return_dict_in_generate=True, **{**GREEDY, "max_new_tokens": 3})
    rest = model.generate(first.sequences, past_key_values=first.past_key_values, **{**GREEDY, "max_new_tokens": 3})
    assert torch.equal(rest, whole)


@kinds
def test_assisted_decoding_matches_greedy_search(name, golden_model):
    model = golden_model(name)
    expected = model.generate(PROMPTS[:1], **GREEDY)
    assert torch.equal(model.generate(PROMPTS[:1], assistant_model=golden_model("base"), **GREEDY), expected)
    assert torch.equal(model.generate(PROMPTS[:1], prompt_lookup_num_tokens=2, **GREEDY), expected)


@pytest.mark.parametrize("name", ["base", pytest.param("int8", marks=pytest.mark.slow)])
def test_generate_compile_model_forward_fullgraph(name, golden_model):
    """A compiled step fits all tokens: one compilation, without breaks and without dynamic shapes."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    model = golden_model(name)
    expected = model.generate(PROMPTS, attention_mask=PADDING, **GREEDY)
    counter, forward = CompileCounter(), model.forward
    compiled = torch.compile(forward, backend=counter, fullgraph=True, dynamic=False)
    model.forward = lambda input_ids, **given: (compiled if input_ids.shape[1] == 1 else forward)(input_ids, **given)
    given = {"cache_implementation": "static", "disable_compile": True}
    assert torch.equal(model.generate(PROMPTS, attention_mask=PADDING, **given, **GREEDY), expected)
    assert counter.frame_count == 1
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "filled"), [("base", 4), ("prefix", 4), ("int8", 4), ("base", 0)])
def test_torch_export_with_a_static_cache(name, filled, golden_model):
    """New tokens of any number, on a cache in use: those of an answer, or a prompt after the cache was reset."""
    exporters = pytest.importorskip("transformers.exporters", reason="needs transformers 5.24")
    model = golden_model(name, attention="sdpa")
    ids = ROWS[:1]
    positions = model.get_position_ids(ids)

    def inputs(length: int) -> dict:
        cache = StaticCache(config=model.config, max_cache_len=16)
        with torch.no_grad():
            model(ids[:, : filled or 4], position_ids=positions[..., : filled or 4], past_key_values=cache)
        if not filled:
            cache.reset()
        new = slice(filled, filled + length)
        new_ids, new_positions = (given[..., new].contiguous() for given in (ids, positions))
        return {"input_ids": new_ids, "position_ids": new_positions, "cache": cache}

    exported = exporters.DynamoExporter().export(model, inputs(3), config=exporters.DynamoConfig(dynamic=True))
    for length in (2, 3) if filled else (4, 7):
        with torch.no_grad():
            expected = model(**inputs(length)).logits
            assert close(exported(**inputs(length)).logits, expected)


# Pipelines and trainers


@pytest.mark.parametrize("same_length", [True, False])
def test_seq2seq_trainer_that_generates(same_length, root, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(root)
    model = ChatGLMForConditionalGeneration.from_pretrained(root, dtype=torch.float32)
    asked, said = (tokenizer.encode(text, add_special_tokens=False) for text in ("Hi", "Hello, how are you today?"))
    prompt = tokenizer.build_inputs_with_special_tokens(asked)
    whole = tokenizer.build_inputs_with_special_tokens(asked, said)
    row = {"input_ids": prompt, "labels": said}
    if same_length:
        row = {"input_ids": whole, "labels": [-100] * len(prompt) + whole[len(prompt) :]}
    fixed = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "per_device_eval_batch_size": 2}
    settings = Seq2SeqTrainingArguments(
        output_dir=str(tmp_path), predict_with_generate=True, generation_max_length=len(whole) + 2, **fixed
    )
    trainer = Seq2SeqTrainer(
        model,
        settings,
        eval_dataset=[row, row],
        data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
        processing_class=tokenizer,
    )
    if same_length:
        assert trainer.evaluate()["eval_loss"] > 0
    else:
        with pytest.raises(ValueError, match="labels have shape"):
            trainer.evaluate()


SAID = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]


@pytest.mark.parametrize(
    "row",
    [{"text": "Hi Hello."}, {"prompt": "Hi", "completion": " Hello."}, {"messages": SAID}],
    ids=["text", "prompt and completion", "messages"],
)
@pytest.mark.parametrize("adapted", [False, True])
def test_sft_on_prompts_is_refused(row, adapted, root, tmp_path):
    """Plain text has no `<sop>` between question and answer, and whole conversations have labels on the question. TRL
    computes the loss itself, in a forward that it puts in the place of the model's."""
    trl = pytest.importorskip("trl", reason="needs trl")
    datasets = pytest.importorskip("datasets", reason="needs datasets")
    peft = pytest.importorskip("peft", reason="needs peft")
    fixed = {"report_to": "none", "use_cpu": True, "bf16": False, "disable_tqdm": True, "save_strategy": "no"}
    trainer = trl.SFTTrainer(
        ChatGLMForConditionalGeneration.from_pretrained(root, dtype=torch.float32),
        trl.SFTConfig(output_dir=str(tmp_path), max_steps=1, max_length=32, **fixed),
        train_dataset=datasets.Dataset.from_list([row] * 2),
        processing_class=AutoTokenizer.from_pretrained(root),
        peft_config=peft.LoraConfig(task_type="CAUSAL_LM", r=4) if adapted else None,
    )
    with pytest.raises(ValueError, match=r"label on column 1, .*label the answer alone"):
        trainer.train()
