"""Losses and gradients: fine-tuning, P-Tuning v2, LoRA over INT8, gradient checkpointing, autocast."""

import copy

import pytest
import torch
from torch import nn
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.utils import logging

from chatglm_int8 import ChatGLMForConditionalGeneration, training_loss
from chatglm_int8.quantization import QuantizedLinear
from chatglm_int8.training_loss import causal_loss

TOLERANCE = 1e-4


def on_answers(ids: torch.Tensor, sop: int = 504) -> torch.Tensor:
    """The ids as labels, -100 on the prompts."""
    return ids.where((ids == sop).cumsum(dim=1) > 0, -100)


def of_case(cases: dict, case: str) -> dict:
    return {key.removeprefix(f"{case}."): value for key, value in cases.items() if key.startswith(f"{case}.")}


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    assert got.shape == expected.shape
    return ((got.detach().float() - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("name", ["prefix", "prefix_proj"])
def test_prefix_gradients_equal_golden(name, checkpointing, cases, golden_model):
    golden = of_case(cases, f"{name}_train")
    model = golden_model(name)
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.train()
        model.transformer.dropout.eval()  # the goldens were made without dropout
    output = model(golden["input_ids"], labels=golden["labels"])
    output.loss.backward()
    assert error(output.loss.view(1), golden["loss"]) < TOLERANCE
    gradients = {key.removeprefix("grad."): value for key, value in golden.items() if key.startswith("grad.")}
    assert gradients
    for parameter_name, parameter in model.named_parameters():
        if parameter_name in gradients:
            assert error(parameter.grad, gradients[parameter_name]) < TOLERANCE
        else:
            assert parameter.grad is None
            assert not parameter.requires_grad, parameter_name


def test_prefix_dropout_in_training_only(golden_model):
    ids = torch.tensor([[7, 8, 501, 504, 9]])
    model = golden_model("prefix")
    assert torch.equal(model(ids).logits, model(ids).logits)
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)


def test_prefix_in_fp32_over_a_half_model(golden_model):
    model = golden_model("prefix", torch.float16)
    model.transformer.prefix_encoder.float()  # a habit of fine-tuning scripts
    loss = model(torch.tensor([[7, 8, 501, 504, 9]]), labels=torch.tensor([[-100, -100, -100, -100, 9]])).loss
    loss.backward()
    gradient = model.transformer.prefix_encoder.embedding.weight.grad
    assert gradient.dtype == torch.float32
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(reentrant, golden_model):
    ids = torch.tensor([[7, 8, 501, 504, 9, 10, 505]])
    labels = ids.where(ids.cumsum(1) > ids[:, :4].sum(), -100)
    plain, saving = golden_model("base"), golden_model("base")
    plain.train()
    saving.train()
    saving.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    saving.enable_input_require_grads()
    plain(ids, labels=labels).loss.backward()
    saving(ids, labels=labels, use_cache=False).loss.backward()
    compared = 0
    for (name, expected), got in zip(plain.named_parameters(), saving.parameters(), strict=True):
        assert torch.allclose(got.grad, expected.grad, rtol=1e-4, atol=1e-6), name
        compared += 1
    assert compared > 30


def test_checkpointing_leaves_out_the_last_product(golden_model):
    """Nothing that gradients need comes after a block's GELU, so its last linear is not computed a second time."""
    model = golden_model("prefix").quantize(8).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    calls = {"dense_h_to_4h": 0, "dense_4h_to_h": 0}

    def count(name):
        def hook(*_):
            calls[name] += 1

        return hook

    for name in calls:
        getattr(model.transformer.layers[1].mlp, name).register_forward_pre_hook(count(name))
    ids = torch.tensor([[7, 8, 501, 504, 9, 10, 505]])
    model(ids, labels=on_answers(ids), use_cache=False).loss.backward()
    assert calls == {"dense_h_to_4h": 2, "dense_4h_to_h": 1}
    assert model.transformer.prefix_encoder.embedding.weight.grad.abs().sum() > 0


def test_loss_is_shifted_and_skips_minus_100(golden_model):
    model = golden_model("base")
    ids = torch.tensor([[7, 8, 501, 504, 9, 10]])
    labels = torch.tensor([[-100, -100, -100, -100, 9, 10]])
    output = model(ids, labels=labels)
    expected = torch.nn.functional.cross_entropy(output.logits[0, 3:5], torch.tensor([9, 10]))
    assert torch.allclose(output.loss, expected)
    half = golden_model("base", torch.float16)(ids, labels=labels).loss
    assert half.dtype == torch.float32
    # As transformers' Trainer calls it when it accumulates gradients.
    assert torch.allclose(model(ids, labels=labels, num_items_in_batch=4).loss, expected / 2)


def test_lora_over_int8_learns_and_leaves_the_weights_alone(golden_model, learn):
    peft = pytest.importorskip("peft", reason="needs peft")
    torch.manual_seed(0)
    model = golden_model("int8")
    model.train()
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tuned = peft.get_peft_model(
        model, peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=16, target_modules=["query_key_value"])
    )
    trainable = [name for name, parameter in tuned.named_parameters() if parameter.requires_grad]
    assert trainable
    assert all("lora_" in name for name in trainable)
    ids = torch.tensor([[7, 8, 501, 504, 9, 10, 11, 505]])
    labels = torch.tensor([[-100, -100, -100, -100, 9, 10, 11, 505]])
    losses = learn(tuned, ids, labels, 1e-2, 20, use_cache=False)
    assert losses[-1] < 0.7 * losses[0]
    after = tuned.unload().state_dict()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name


def test_quantising_under_adapters_is_refused(golden_model):
    peft = pytest.importorskip("peft", reason="needs peft")
    model = golden_model("base")
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["query_key_value"]))
    with pytest.raises(ValueError, match="call quantize before get_peft_model, or after merge_and_unload"):
        model.quantize(8)
    assert isinstance(tuned.merge_and_unload().quantize(8).transformer.layers[0].mlp.dense_h_to_4h, QuantizedLinear)


@pytest.mark.parametrize("saved", [None, "lm_head", "word_embeddings"])
def test_embeddings_that_stay_half_are_trained_in_float(saved, root, learn):
    """An optimizer's small steps would be lost in half, and Adam's epsilon is zero there."""
    model = ChatGLMForConditionalGeneration.from_pretrained(root, dtype=torch.float32)
    assert model.lm_head.weight.dtype == torch.float16
    if saved:
        peft = pytest.importorskip("peft", reason="needs peft")
        given = {"target_modules": ["query_key_value"], "modules_to_save": [saved]}
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, **given))
    model.train()
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}
    config = model.config
    ids = torch.tensor([[7, 8, config.gmask_token_id, config.bos_token_id, 9, 10, 11, config.eos_token_id]])
    losses = learn(model, ids, on_answers(ids, config.bos_token_id), 1e-4, 3)
    assert losses[2] < losses[1] < losses[0]


def test_generation_with_lora(golden_model):
    peft = pytest.importorskip("peft", reason="needs peft")
    ids = torch.tensor([[7, 8, 501, 504]])
    model = golden_model("int8")
    expected = model.generate(ids, do_sample=False, max_new_tokens=8)
    tuned = peft.get_peft_model(
        model, peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["query_key_value"])
    ).eval()
    assert torch.equal(tuned.generate(input_ids=ids, do_sample=False, max_new_tokens=8), expected)  # B starts at 0


def test_trainer_overfits_one_example(tmp_path, golden_model):
    from transformers import Trainer, TrainingArguments

    model = golden_model("base")
    example = {
        "input_ids": torch.tensor([7, 8, 501, 504, 9, 10, 505]),
        "labels": torch.tensor([-100, -100, -100, -100, 9, 10, 505]),
    }
    arguments = TrainingArguments(
        output_dir=tmp_path,
        max_steps=30,
        learning_rate=3e-3,
        per_device_train_batch_size=1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    Trainer(model, arguments, train_dataset=[example]).train()
    model.eval()
    answer = model.generate(torch.tensor([[7, 8, 501, 504]]), do_sample=False, max_new_tokens=5)
    assert answer[0, 4:].tolist()[:3] == [9, 10, 505]


# Labels


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("name", ["base", "pos1d", "prefix", "int8"])
def test_labels_on_a_prompt_are_refused(name, gradients, golden_model):
    """Tokens in front of `<sop>` see each other both ways: a loss on them is a loss on what is in view."""
    model = golden_model(name)
    sound = torch.tensor([[7, 8, 501, 504, 9, 10, 505], [7, 8, 9, 11, 501, 504, 12]])
    with torch.set_grad_enabled(gradients):
        assert model(sound, labels=on_answers(sound)).loss.isfinite()
        before = on_answers(sound)
        before[1, 4] = 501
        with pytest.raises(ValueError, match=r"Row 1 .* column 4, before its first <sop> \(column 5\).*build_inputs"):
            model(sound, labels=before)
        first = on_answers(sound)
        first[:, 0] = 7  # no column predicts it
        assert torch.equal(model(sound, labels=first).loss, model(sound, labels=on_answers(sound)).loss)
        at_the_end = torch.tensor([[7, 8, 9, 10, 505, 501, 504]])  # plain text, as trainers of other models encode it
        with pytest.raises(ValueError, match=r"Row 0 .* column 1, before its first <sop>"):
            model(at_the_end, labels=at_the_end)
        assert model(at_the_end, labels=on_answers(at_the_end)).loss.isfinite()  # <sop> itself follows its context
        without = torch.tensor([[7, 8, 501, 504, 9], [7, 8, 9, 10, 505]])
        with pytest.raises(ValueError, match=r"Row 1 .* has no <sop>"):
            model(without, labels=without.where(torch.tensor([[False], [True]]), -100))
        assert model(without, labels=without.where(torch.tensor([[False] * 4 + [True], [False] * 5]), -100)).loss > 0


def test_labels_in_other_forms(golden_model):
    model = golden_model("base")
    ids = torch.tensor([[7, 8, 501, 504, 9, 10, 505]])
    labels = on_answers(ids)
    expected = model(ids, labels=labels).loss
    shifted = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    assert torch.equal(model(ids, labels=labels, shift_labels=shifted).loss, expected)
    assert torch.equal(model(ids, labels=ids, shift_labels=shifted).loss, expected)  # the others aren't looked at
    shifted[0, 1] = 501
    with pytest.raises(ValueError, match=r"Row 0 .* column 2, before"):
        model(ids, labels=labels, shift_labels=shifted)
    ignored = labels.where(labels != -100, 0)
    assert torch.equal(model(ids, labels=ignored, ignore_index=0).loss, expected)
    with pytest.raises(ValueError, match=r"Row 0 .* column 1, before"):
        model(ids, labels=ignored)
    embeddings = model.get_input_embeddings()(ids).detach()
    given = {"inputs_embeds": embeddings, "position_ids": model.get_position_ids(ids)}
    torch.testing.assert_close(model(**given, labels=labels).loss, expected)
    with pytest.raises(ValueError, match=r"Row 0 .* column 1, before"):
        model(**given, labels=ids)


def test_labels_behind_padding(golden_model):
    model = golden_model("base")
    rows, pad = [[7, 8, 501, 504, 9, 10], [7, 501, 504, 11]], 3
    for side in ("left", "right"):
        padding = [[pad] * (6 - len(row)) for row in rows]
        ids = [more + row if side == "left" else row + more for row, more in zip(rows, padding, strict=True)]
        ids = torch.tensor(ids)
        for mask in (None, (ids != pad).long()):
            assert model(ids, labels=on_answers(ids).where(ids != pad, -100), attention_mask=mask).loss.isfinite()
            with pytest.raises(ValueError, match="before its first <sop>"):
                model(ids, labels=ids.where(ids != pad, -100), attention_mask=mask)


def test_labels_beside_masks_of_ones_own(golden_model):
    """What a mask hides may have labels; what it shows may not."""
    model = golden_model("base")
    ids = torch.tensor([[7, 8, 9, 501, 504, 10, 11]])
    causal = torch.ones(1, 1, 7, 7).triu(1).bool()
    additive = torch.zeros(1, 1, 7, 7).masked_fill(causal, torch.finfo(torch.float32).min)
    for mask in (causal, ~causal, additive):
        assert model(ids, labels=ids, attention_mask=mask).loss.isfinite()
    both_ways = model.get_masks(ids)
    additive = torch.zeros(1, 1, 7, 7).masked_fill(both_ways, -torch.inf)
    for mask in (both_ways, ~both_ways, additive):
        assert model(ids, labels=on_answers(ids), attention_mask=mask).loss.isfinite()
        with pytest.raises(ValueError, match=r"Row 0 has a label on column 1, before its first <sop>"):
            model(ids, labels=ids, attention_mask=mask)
    with pytest.raises(ValueError, match=r"Row 0 has a label on column 5, which its attention_mask lets column 4"):
        model(ids, labels=ids.where(torch.arange(7) > 4, -100), attention_mask=torch.zeros(1, 1, 7, 7))


def test_labels_on_a_continued_answer(golden_model):
    model = golden_model("base")
    ids = torch.tensor([[7, 8, 501, 504, 9, 10, 505]])
    first = model(ids[:, :4], use_cache=True)
    rest = model(ids[:, 4:], labels=ids[:, 4:], past_key_values=first.past_key_values).loss
    labels = ids.where(torch.arange(7) > 4, -100)
    torch.testing.assert_close(rest, model(ids, labels=labels).loss, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("length", [3, 5, 6, 8, 40])
@pytest.mark.parametrize("gradients", [True, False])
def test_labels_of_another_length_are_refused(length, gradients, golden_model):
    model = golden_model("base")
    ids = torch.tensor([[7, 8, 501, 504, 9, 10, 505]] * 2)
    labels = torch.full((2, length), -100)
    labels[:, -1] = 9
    with (
        torch.set_grad_enabled(gradients),
        pytest.raises(ValueError, match=rf"labels have shape \[2, {length}\], the sequences \[2, 7\]"),
    ):
        model(ids, labels=labels)
    with pytest.raises(ValueError, match=r"labels have shape \[1, 7\]"):
        model(ids, labels=ids[:1])


# Scores


def test_scores_of_tokens_in_view_are_told_once(golden_model, caplog):
    model = golden_model("base")
    with_sop, without = torch.tensor([[7, 8, 501, 504, 9, 10]]), torch.tensor([[7, 8, 9, 10, 11, 505]])

    def warnings(call) -> int:
        logging.warning_once.cache_clear()
        caplog.clear()
        with torch.no_grad():
            call()
            call()
        return sum("has no <sop>" in record.message for record in caplog.records)

    assert warnings(lambda: model(without)) == 1
    assert warnings(lambda: model(torch.cat((with_sop, without)))) == 1
    assert warnings(lambda: model(without, logits_to_keep=2)) == 1
    assert warnings(lambda: model(without, logits_to_keep=torch.tensor([1]))) == 1
    assert warnings(lambda: model(with_sop)) == 0
    assert warnings(lambda: model(without, logits_to_keep=1)) == 0
    assert warnings(lambda: model(without, logits_to_keep=torch.tensor([5]))) == 0
    assert warnings(lambda: model(without[:, :1])) == 0
    assert warnings(lambda: model.transformer(without)) == 0
    causal = torch.ones(1, 1, 6, 6).triu(1).bool()
    assert warnings(lambda: model(without, attention_mask=causal)) == 0
    assert warnings(lambda: model.generate(with_sop, do_sample=False, max_new_tokens=2)) == 0


# The loss in chunks


@pytest.mark.parametrize("rows", [1, 3, 100], ids=["one row at a time", "three", "all"])
@pytest.mark.parametrize(
    "given",
    [{}, {"num_items_in_batch": 7}, {"num_items_in_batch": torch.tensor(7)}, {"shifted": 1}, {"ignore_index": 0}],
)
def test_loss_in_chunks_is_that_of_transformers(rows, given, monkeypatch):
    vocab_size, width = 50, 8
    monkeypatch.setattr(training_loss, "_CHUNK_NUMEL", rows * vocab_size)
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(width, vocab_size)
    hidden = torch.randn(2, 9, width, generator=generator)
    labels = torch.randint(0, vocab_size, (2, 9), generator=generator)
    ignored = given.get("ignore_index", -100)
    labels[0, :4] = labels[1, 6:] = ignored
    given = dict(given)
    if given.pop("shifted", None):
        given["shift_labels"] = labels
    seen = []

    def score(rows: torch.Tensor) -> torch.Tensor:
        seen.append(len(rows))
        return head(rows)

    def gradients(loss, *tensors):
        return [loss, *torch.autograd.grad(loss, tensors)]

    x, y = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    expected = gradients(ForCausalLMLoss(head(x), labels, vocab_size, **given), x, head.weight)
    got = gradients(causal_loss(score, y, labels, vocab_size, **given), y, head.weight)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)
    assert max(seen) <= rows
    labelled = (given.get("shift_labels", labels[:, 1:]) != ignored).sum()
    assert sum(seen) == 2 * labelled  # once more for the gradients, and rows without a label not at all


def test_loss_without_any_label(golden_model):
    model = golden_model("base")
    ids = torch.tensor([[7, 8, 501, 504, 9]])
    labels = torch.full_like(ids, -100)
    loss = model(ids, labels=labels, num_items_in_batch=3).loss
    loss.backward()  # as a process must that got none of the labels of a batch
    assert loss == 0
    assert (model.transformer.layers[0].mlp.dense_h_to_4h.weight.grad == 0).all()
    assert model(ids, labels=labels).loss.isnan()


def test_sum_of_half_losses_does_not_overflow():
    scores = torch.zeros(1, 2000, 50, dtype=torch.float16)
    scores[..., 1] = 60000.0
    labels = torch.zeros(1, 2000, dtype=torch.long)
    loss = causal_loss(lambda rows: rows, scores.requires_grad_(), labels, 50)
    loss.backward()
    assert loss.item() == 60000.0
    assert scores.grad.isfinite().all()


def test_logits_are_computed_when_they_are_read(golden_model, monkeypatch):
    model = golden_model("base")
    ids = torch.tensor([[7, 8, 501, 504, 9, 10]])
    labels = torch.tensor([[-100, -100, -100, -100, 9, 10]])
    expected = model(ids).logits
    computed = []
    score = ChatGLMForConditionalGeneration.score

    def counted(self, states):
        computed.append(states.shape[:-1].numel())
        return score(self, states)

    monkeypatch.setattr(ChatGLMForConditionalGeneration, "score", counted)
    model(ids, labels=labels, use_cache=False).loss.backward()
    assert set(computed) == {2}
    for read in (
        lambda output: output.logits,
        lambda output: output["logits"],
        lambda output: output.get("logits"),
        lambda output: output[1],
        lambda output: output.to_tuple()[1],
    ):
        output = model(ids, labels=labels, use_cache=False)
        computed.clear()
        assert torch.equal(read(output), expected)
        assert output.logits is output["logits"]
        assert computed == [6]
    assert torch.equal(model(ids, labels=labels, return_dict=False)[1], expected)
    torch.testing.assert_close(model(ids, labels=labels, logits_to_keep=2).logits, expected[:, -2:])
    (from_logits,) = torch.autograd.grad(output.logits.sum(), model.lm_head.weight)
    assert from_logits.abs().sum() > 0
    with torch.no_grad():  # as in evaluation, where Trainer collects items
        logits = dict(model(ids, labels=labels).items())["logits"]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("update", ["optimizer", "head only", "blocks only"])
def test_logits_are_not_read_from_later_weights(update, golden_model):
    model = golden_model("base")
    ids = torch.tensor([[7, 8, 501, 504, 9, 10]])
    with torch.no_grad():
        expected = model(ids).logits
    changed = {"head only": [model.lm_head.weight], "blocks only": list(model.transformer.layers.parameters())}
    optimizer = torch.optim.AdamW(changed.get(update, list(model.parameters())), lr=0.1)
    early, late = (model(ids, labels=on_answers(ids), use_cache=False) for _ in range(2))
    torch.testing.assert_close(early.logits, expected, rtol=1e-4, atol=1e-4)
    late.loss.backward()
    optimizer.step()
    assert early.logits is early["logits"]
    if update == "blocks only":
        torch.testing.assert_close(late.logits, expected, rtol=1e-4, atol=1e-4)
        return
    for read in (lambda: late.logits, lambda: late["logits"], lambda: late[1], late.to_tuple):
        with pytest.raises(RuntimeError, match=r"read output\.logits before optimizer\.step"):
            read()


def test_outputs_pass_through_accelerate(golden_model):
    from accelerate.utils import convert_outputs_to_fp32

    model = golden_model("base", torch.bfloat16)
    ids = torch.tensor([[7, 8, 501, 504, 9, 10]])
    output = convert_outputs_to_fp32(model.forward)(ids, labels=on_answers(ids), output_hidden_states=True)
    assert output.hidden_states[0].dtype == torch.float32
    assert torch.equal(output.logits, model(ids).logits)


def test_replicas_of_data_parallel_give_tensors(golden_model):
    model = golden_model("base")
    ids = torch.tensor([[7, 8, 501, 504, 9, 10]])
    labels = on_answers(ids)
    expected = model(ids, labels=labels)
    model._is_replica = True  # as nn.DataParallel marks its copies, whose outputs it gathers by items
    output = model(ids, labels=labels, use_cache=False)
    assert all(isinstance(value, torch.Tensor) for value in output.values())
    torch.testing.assert_close(output.loss, expected.loss)
    assert torch.equal(output.logits, expected.logits)


def test_a_loss_of_ones_own(golden_model):
    model = golden_model("base")
    ids = torch.tensor([[7, 8, 501, 504, 9, 10]])
    model.loss_function = lambda logits, labels, vocab_size, **kwargs: logits.float().square().mean() + vocab_size
    output = model(ids, labels=ids)
    torch.testing.assert_close(output.loss, output.logits.square().mean() + model.config.vocab_size)


# Autocast


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", ["int8", "prefix"])
def test_autocast(name, stored, dtype, attention, cases, golden_model):
    ids, labels = cases["base_labels.input_ids"], cases["base_labels.labels"]
    model = golden_model(name, attention=attention)
    if name == "prefix":
        model.quantize(8)
    expected = model(ids, labels=labels).loss
    found = []
    model = model.to(stored)
    for linear in model.modules():
        if isinstance(linear, QuantizedLinear):
            linear.register_forward_hook(lambda module, given, output: found.append(output.dtype))
    trained = model.transformer.prefix_encoder.embedding if name == "prefix" else model.get_input_embeddings()
    with torch.autocast("cpu", dtype):
        output = model(ids, labels=labels)
    output.loss.backward()
    assert set(found) == {dtype}
    assert output.loss.dtype == torch.float32
    assert abs(output.loss - expected) < 8 * torch.finfo(dtype).eps * expected
    assert output.logits.dtype == dtype  # read outside of autocast
    assert trained.weight.grad.isfinite().all()
    assert trained.weight.grad.abs().sum() > 0


# Gradients against float64


def widened(model: nn.Module) -> nn.Module:
    """The float64 model of the same weights."""
    model = copy.deepcopy(model)
    for name, layer in [named for named in model.named_modules() if isinstance(named[1], QuantizedLinear)]:
        wide = nn.Linear(layer.in_features, layer.out_features, device="meta")
        wide.weight = nn.Parameter(layer.dequantize(torch.float64), requires_grad=False)
        wide.bias = nn.Parameter(layer.bias.double(), requires_grad=False)
        model.set_submodule(name, wide)
    return model.double()


def with_lora(model: nn.Module) -> nn.Module:
    """LoRA whose B is not zero, and the same whatever the dtype."""
    peft = pytest.importorskip("peft", reason="needs peft")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=32, target_modules=["query_key_value"])
    model = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return model


def gradients(model: nn.Module, samples: list[torch.Tensor]) -> torch.Tensor:
    """All gradients of each sample, float64 [samples, parameters]. The loss is scaled as a scaler for fp16 does."""
    found = []
    for ids in samples:
        labels = ids.clone()
        labels[:, :10] = -100
        model.zero_grad()
        (128 * model(input_ids=ids, labels=labels, use_cache=False).loss).backward()
        of_all = [p.grad.double().flatten() / 128 for p in model.parameters() if p.requires_grad]
        assert of_all
        found.append(torch.cat(of_all))
    return torch.stack(found)


@pytest.mark.parametrize("method", ["lora", "prefix"])
def test_gradients_over_int8_against_float64(method, root):
    """Rounding in fp32; in fp16 what the same weights in FP16 have, but for the chance in a few samples' rounding."""
    torch.manual_seed(0)
    fields = {"pre_seq_len": 8} if method == "prefix" else {}
    model = ChatGLMForConditionalGeneration.from_pretrained(root, dtype=torch.float32, **fields)
    wide, wrap = widened(model), with_lora if method == "lora" else lambda model: model
    config = model.config
    generator = torch.Generator().manual_seed(0)
    samples = torch.randint(10, 2600, (6, 1, 24), generator=generator)
    samples[..., 8], samples[..., 9] = config.gmask_token_id, config.bos_token_id
    exact = gradients(wrap(copy.deepcopy(wide)), list(samples))

    def error(tuned: nn.Module) -> float:
        return ((gradients(tuned, list(samples)) - exact).norm(dim=1) / exact.norm(dim=1)).square().mean().sqrt().item()

    assert error(wrap(copy.deepcopy(model))) < 1e-5
    assert error(wrap(model.half())) < 1.25 * error(wrap(wide.half()))


@pytest.mark.parametrize("adapter", [False, True], ids=["model", "lora"])
def test_trainer_smooths_shifted_labels(adapter, golden_model, tmp_path):
    """Trainer shifts them for the classes that it knows by name."""
    from transformers import Trainer, TrainingArguments

    model = golden_model("base")
    ids = torch.tensor([[7, 8, 501, 504, 9, 11, 505]])
    labels = ids.masked_fill(torch.arange(7) < 4, -100)
    with torch.no_grad():
        logprobs = model(ids).logits[0, 3:6].log_softmax(dim=-1)
    expected = 0.9 * -logprobs.gather(1, ids[0, 4:, None]).mean() + 0.1 * -logprobs.mean()
    if adapter:
        peft = pytest.importorskip("peft", reason="needs peft")
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["query_key_value"], task_type="CAUSAL_LM"))
    arguments = TrainingArguments(
        output_dir=tmp_path, label_smoothing_factor=0.1, report_to=[], use_cpu=True, disable_tqdm=True
    )
    loss = Trainer(model, arguments).compute_loss(model, {"input_ids": ids, "labels": labels.clone()})
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
