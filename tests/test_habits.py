"""Fine-tuning scripts that are about for this model: each test follows the pattern of one kind of them."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

import chatglm_int8  # noqa: F401 registers the Auto classes
from chatglm_int8 import ChatGLMForConditionalGeneration

PAIRS = [("What is the tallest mountain?", "Mount Everest."), ("你好", "你好！有什么可以帮你？"), ("Hi", "Hello.")]


class CastOutputToFloat(nn.Sequential):
    """What scripts put around the LM head."""

    def forward(self, x):
        return super().forward(x).to(torch.float32)


@pytest.fixture(scope="module")
def tokenizer(root):
    return AutoTokenizer.from_pretrained(root)


@pytest.fixture
def model(root) -> ChatGLMForConditionalGeneration:
    """The embedded INT8 checkpoint in fp32."""
    return ChatGLMForConditionalGeneration.from_pretrained(root, dtype=torch.float32)


@pytest.fixture
def peft():
    return pytest.importorskip("peft", reason="needs peft, of the extra `train`")


def lora(peft, model, **fields):
    """LoRA with PEFT's own choice of layers, which it makes by `model_type`."""
    torch.manual_seed(0)
    return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=8, **fields))


def arguments(folder, **fields) -> TrainingArguments:
    fixed = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    return TrainingArguments(**{"output_dir": str(folder), "max_steps": 3, "logging_steps": 1, **fixed, **fields})


def encode(tokenizer, prompt: str, answer: str) -> list[int]:
    """`context [gMASK] <sop> answer <eop>`, put together as scripts do."""
    asked = tokenizer.encode(prompt, add_special_tokens=False)
    answered = tokenizer.encode(answer, add_special_tokens=False)
    return tokenizer.build_inputs_with_special_tokens(asked, answered)


def right_padded(tokenizer, pairs, length: int | None = None) -> dict[str, torch.Tensor]:
    """A batch with padding on the right, -100 in the labels of context and padding, and no mask."""
    rows = [encode(tokenizer, *pair) for pair in pairs]
    length = length or max(map(len, rows))
    ids = torch.full((len(rows), length), tokenizer.pad_token_id)
    labels = torch.full((len(rows), length), -100)
    for row, encoded in enumerate(rows):
        start = encoded.index(tokenizer.bos_token_id)
        ids[row, : len(encoded)] = torch.tensor(encoded)
        labels[row, start : len(encoded)] = torch.tensor(encoded[start:])
    return {"input_ids": ids, "labels": labels}


def masks_by_hand(ids: list[int], bos: int) -> torch.Tensor:
    start = ids.index(bos)
    mask = torch.ones(1, len(ids), len(ids)).tril()
    mask[..., :start] = 1
    return (mask < 0.5).bool()


def positions_by_hand(ids: list[int], bos: int, gmask: int) -> torch.Tensor:
    start = ids.index(bos)
    places = torch.arange(len(ids))
    places[start:] = ids.index(gmask)
    blocks = torch.cat((torch.zeros(start, dtype=torch.long), torch.arange(len(ids) - start) + 1))
    return torch.stack((places, blocks))


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


# Batches


def test_padding_on_the_right_changes_nothing(model, tokenizer):
    alone = [model(**right_padded(tokenizer, [pair])) for pair in PAIRS]
    padded = right_padded(tokenizer, PAIRS)
    counts = [(padded["labels"][row] != -100).sum() for row in range(len(PAIRS))]
    expected = sum(out.loss * count for out, count in zip(alone, counts, strict=True)) / sum(counts)
    real = (padded["input_ids"] != tokenizer.pad_token_id).long()
    for given in ({}, {"attention_mask": real}):
        torch.testing.assert_close(model(**padded, **given).loss, expected, rtol=1e-4, atol=1e-5)


def test_padding_on_the_left_by_seq2seq_collator(model, tokenizer):
    right = right_padded(tokenizer, PAIRS)
    features = []
    for ids, labels in zip(right["input_ids"], right["labels"], strict=True):
        real = ids != tokenizer.pad_token_id
        features.append({"input_ids": ids[real].tolist(), "labels": labels[real].tolist()})
    collate = DataCollatorForSeq2Seq(tokenizer, model=None, label_pad_token_id=-100, padding=True)
    batch = collate(features)
    assert batch["input_ids"][2, 0] == tokenizer.pad_token_id
    torch.testing.assert_close(model(**batch).loss, model(**right).loss, rtol=1e-4, atol=1e-5)


def test_masks_and_positions_by_hand(model, tokenizer):
    batch = right_padded(tokenizer, PAIRS)
    rows = batch["input_ids"].tolist()
    bos, gmask = tokenizer.bos_token_id, tokenizer.convert_tokens_to_ids("[gMASK]")
    by_hand = {
        "attention_mask": torch.stack([masks_by_hand(row, bos) for row in rows]),
        "position_ids": torch.stack([positions_by_hand(row, bos, gmask) for row in rows]),
    }
    assert by_hand["attention_mask"].shape == (3, 1, len(rows[0]), len(rows[0]))
    derived, given = model(**batch), model(**batch, **by_hand)
    torch.testing.assert_close(given.loss, derived.loss, rtol=1e-5, atol=1e-6)
    # They are listened to: another mask gives another loss.
    by_hand["attention_mask"] = torch.ones(1, 1, len(rows[0]), len(rows[0])).triu(1).bool().expand(3, -1, -1, -1)
    assert abs(model(**batch, **by_hand).loss - derived.loss) > 1e-3


def test_ids_put_together_by_hand(tokenizer):
    asked, answered = (tokenizer.encode(text, add_special_tokens=False) for text in PAIRS[0])
    marks = tokenizer.convert_tokens_to_ids(["[gMASK]", "<sop>", "<eop>"])
    assert not set(marks) & {*asked, *answered}
    assert tokenizer.build_inputs_with_special_tokens(asked, answered) == [*asked, *marks[:2], *answered, marks[2]]
    assert tokenizer(PAIRS[0][0])["input_ids"] == [*asked, *marks[:2]]
    assert tokenizer.decode(answered) == PAIRS[0][1]


# P-Tuning v2


class PrefixTrainer(Trainer):
    """Saves what is trained alone, as pytorch_model.bin."""

    def _save(self, output_dir=None, state_dict=None):
        trained = {name: p.detach().cpu() for name, p in self.model.named_parameters() if p.requires_grad}
        torch.save(trained, f"{output_dir}/pytorch_model.bin")


@pytest.mark.parametrize("reentrant", [None, True, False], ids=["plain", "reentrant", "not reentrant"])
def test_ptuning(root, tmp_path, tokenizer, reentrant):
    def load() -> ChatGLMForConditionalGeneration:
        config = AutoConfig.from_pretrained(root)
        config.pre_seq_len = 4
        config.prefix_projection = False
        return ChatGLMForConditionalGeneration.from_pretrained(root, config=config)

    torch.manual_seed(0)
    model = load().half()
    model.transformer.prefix_encoder.float()
    if reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.enable_input_require_grads()
        model.config.use_cache = False
    batch = right_padded(tokenizer, PAIRS[:1], 40)
    dataset = [{name: tensor[0] for name, tensor in batch.items()}] * 4
    settings = arguments(tmp_path, max_steps=10, learning_rate=2e-1, per_device_train_batch_size=2)
    trainer = PrefixTrainer(model, settings, train_dataset=dataset)
    trainer.train()
    assert losses(trainer)[-1] < 0.9 * losses(trainer)[0]
    trainer.save_model(str(tmp_path))

    state = torch.load(tmp_path / "pytorch_model.bin")
    assert list(state) == ["transformer.prefix_encoder.embedding.weight"]
    assert state["transformer.prefix_encoder.embedding.weight"].dtype == torch.float32
    begin = "transformer.prefix_encoder."
    again = load()
    stripped = {name[len(begin) :]: tensor for name, tensor in state.items() if name.startswith(begin)}
    again.transformer.prefix_encoder.load_state_dict(stripped)
    again = again.half().eval()
    again.transformer.prefix_encoder.float()
    model.eval()
    with torch.no_grad():
        assert torch.equal(again(batch["input_ids"]).logits, model(batch["input_ids"]).logits)
    assert again.chat(tokenizer, "Hi", do_sample=False)[0] == model.chat(tokenizer, "Hi", do_sample=False)[0]


# LoRA


class OldTrainer(Trainer):
    """Calls the model by itself, and says nothing of how many items there are."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        return model(input_ids=inputs["input_ids"], labels=inputs["labels"]).loss


def test_lora_by_an_old_script(root, tmp_path, tokenizer, peft):
    model = ChatGLMForConditionalGeneration.from_pretrained(root).half()
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    model.is_parallelizable = True
    model.model_parallel = True
    model.lm_head = CastOutputToFloat(model.lm_head)
    model.config.use_cache = False
    tuned = lora(peft, model, lora_alpha=32, lora_dropout=0.1, inference_mode=False)
    found = {name for name, p in tuned.named_parameters() if p.requires_grad}
    assert found
    assert all("query_key_value.lora_" in name for name in found)
    batch = right_padded(tokenizer, PAIRS)
    dataset = [{name: tensor[row] for name, tensor in batch.items()} for row in range(3)]
    settings = arguments(
        tmp_path, max_steps=8, learning_rate=1e-2, per_device_train_batch_size=3, remove_unused_columns=False
    )
    trainer = OldTrainer(tuned, settings, train_dataset=dataset)
    trainer.train()
    assert losses(trainer)[-1] < 0.9 * losses(trainer)[0]

    with torch.no_grad():
        expected = tuned.eval()(**batch).logits
    assert expected.dtype == torch.float32
    trained = {name: p for name, p in tuned.named_parameters() if p.requires_grad}
    torch.save(trained, tmp_path / "lora.pt")  # and adapters as PEFT has them
    tuned.save_pretrained(tmp_path / "adapter")
    base = ChatGLMForConditionalGeneration.from_pretrained(root).half()
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(again(**batch).logits.float(), expected)
    other = lora(peft, ChatGLMForConditionalGeneration.from_pretrained(root).half()).eval()
    other.load_state_dict(torch.load(tmp_path / "lora.pt"), strict=False)
    assert all(torch.equal(p, trained[name]) for name, p in other.named_parameters() if name in trained)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_an_lm_head_that_casts(root, tokenizer, dtype):
    model = ChatGLMForConditionalGeneration.from_pretrained(root).to(dtype)
    batch = right_padded(tokenizer, PAIRS)
    plain = model(**batch)
    ids = tokenizer("Hi", return_tensors="pt")["input_ids"]
    answer = model.generate(ids, do_sample=False, max_new_tokens=4)
    model.lm_head = CastOutputToFloat(model.lm_head)
    wrapped = model(**batch)
    assert wrapped.logits.dtype == torch.float32
    assert wrapped.loss.item() == plain.loss.item()
    assert torch.equal(wrapped.logits, plain.logits.float())
    assert torch.equal(model.generate(ids, do_sample=False, max_new_tokens=4), answer)


def test_prepare_model_for_kbit_training(root, tokenizer, peft):
    model = ChatGLMForConditionalGeneration.from_pretrained(root).half()
    model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=True)
    assert model.transformer.layers[0].mlp.dense_4h_to_h.weight.dtype == torch.int8
    assert {p.dtype for p in model.parameters()} == {torch.int8, torch.float32}
    tuned = lora(peft, model).train()
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-2)
    batch = right_padded(tokenizer, PAIRS)
    found = []
    for _ in range(6):
        loss = tuned(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    assert found[-1] < 0.9 * found[0]


def test_adapters_on_a_dispatched_model(model, tokenizer, peft):
    """`device_map="auto"` puts accelerate's hooks around every block; here all of them are on one device."""
    from accelerate import dispatch_model

    plain = lora(peft, copy.deepcopy(model), init_lora_weights=False).train()
    devices = {f"transformer.layers.{index}": "cpu" for index in range(model.config.num_layers)}
    devices.update({"transformer.word_embeddings": "cpu", "transformer.final_layernorm": "cpu", "lm_head": "cpu"})
    hooked = dispatch_model(model, devices, main_device="cpu", force_hooks=True)
    assert hooked.lm_head._hf_hook is not None
    hooked.gradient_checkpointing_enable()
    hooked.enable_input_require_grads()
    hooked = lora(peft, hooked, init_lora_weights=False).train()
    batch = right_padded(tokenizer, PAIRS)
    for tuned in (plain, hooked):
        tuned(**batch).loss.backward()
    compared = 0
    for (name, expected), got in zip(plain.named_parameters(), hooked.parameters(), strict=True):
        if expected.requires_grad:
            torch.testing.assert_close(got.grad, expected.grad, rtol=1e-3, atol=1e-6, msg=name)
            compared += expected.grad.abs().sum() > 0
    assert compared == 2 * model.config.num_layers


def test_sft_trainer(model, tokenizer, tmp_path, peft):
    trl = pytest.importorskip("trl", reason="needs trl")
    datasets = pytest.importorskip("datasets", reason="needs datasets")

    def says(role: str, text: str) -> list[dict]:
        return [{"role": role, "content": text}]

    rows = [{"prompt": says("user", asked), "completion": says("assistant", said)} for asked, said in PAIRS]
    fixed = {"report_to": "none", "use_cpu": True, "bf16": False, "disable_tqdm": True, "save_strategy": "no"}
    settings = trl.SFTConfig(
        output_dir=str(tmp_path), max_steps=6, logging_steps=1, learning_rate=1e-2, max_length=64, **fixed
    )
    trainer = trl.SFTTrainer(
        model,
        settings,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=peft.LoraConfig(task_type="CAUSAL_LM", r=8),
    )
    assert trainer.train_dataset[0]["input_ids"] == encode(tokenizer, *PAIRS[0])
    trainer.train()
    assert losses(trainer)[-1] < 0.9 * losses(trainer)[0]
