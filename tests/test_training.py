"""Losses and gradients: fine-tuning, P-Tuning v2, LoRA over INT8, gradient checkpointing."""

import pytest
import torch

TOLERANCE = 1e-4


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


def test_lora_over_int8_learns_and_leaves_the_weights_alone(golden_model):
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
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-2)
    ids = torch.tensor([[7, 8, 501, 504, 9, 10, 11, 505]])
    labels = torch.tensor([[-100, -100, -100, -100, 9, 10, 11, 505]])
    losses = []
    for _ in range(20):
        loss = tuned(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    after = tuned.unload().state_dict()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name


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
