"""Models whose weights accelerate keeps on the CPU or on the disk, and brings to the device of each call.

Without a GPU the calls run on the CPU; what is offloaded is on the meta device between them all the same.
"""

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model, init_empty_weights, load_checkpoint_and_dispatch

from chatglm_int8 import ChatGLMForConditionalGeneration, ChatGLMTokenizer

MODELS = ["base", "int8", "prefix"]
IDS = torch.tensor([[3, 7, 8, 501, 504], [7, 8, 9, 501, 504]])
MASK = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])


def device_map(model, **places: str) -> dict[str, str]:
    """All of the model's parts on the CPU, but those that are named (with __ for a dot)."""
    names = [f"transformer.{name}" for name, _ in model.transformer.named_children() if name != "layers"]
    names += [f"transformer.layers.{i}" for i in range(len(model.transformer.layers))]
    places = {name.replace("__", "."): place for name, place in places.items()}
    assert places.keys() <= {*names, "lm_head"}
    return {**dict.fromkeys([*names, "lm_head"], "cpu"), **places}


def answers(model) -> list[torch.Tensor]:
    """What the ways of using a model give."""
    given = {"input_ids": IDS, "attention_mask": MASK, "do_sample": False, "max_new_tokens": 4}
    with torch.no_grad():
        answered = torch.cat((IDS, IDS[:, 1:2]), dim=1)
        labels = answered.masked_fill(torch.arange(6) < 5, -100)
        outputs = [model(IDS, attention_mask=MASK).logits, model(answered, labels=labels).loss]
    outputs += [model.generate(**given), model.generate(**given, num_beams=2), [*model.stream_generate(**given)][-1]]
    return [*outputs, model.generate(**given, cache_implementation="static")]


def check(model, expected: list[torch.Tensor], offloaded: bool = True) -> None:
    assert any(parameter.is_meta for parameter in model.parameters()) == offloaded
    assert model.device == torch.device("cpu")
    for got, wanted in zip(answers(model), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_all_weights_offloaded(name, golden_model, tmp_path):
    model = golden_model(name)
    expected = answers(model)
    check(cpu_offload(golden_model(name), execution_device=torch.device("cpu")), expected)
    disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    check(model, expected)


PLACES = [
    {"transformer__word_embeddings": "disk"},
    {"lm_head": "disk"},
    {"transformer__word_embeddings": "disk", "lm_head": "disk"},
    {"transformer__layers__0": "disk", "transformer__final_layernorm": "disk"},
]


@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize("name", MODELS)
def test_parts_on_the_disk(name, places, golden_model, tmp_path):
    """Embedding and LM head are one tensor: the library can't load it to two places, so it goes to the embedding's."""
    model = golden_model(name)
    expected = answers(model)
    model.save_pretrained(tmp_path / "model")
    places = device_map(model, **places)
    loaded = ChatGLMForConditionalGeneration.from_pretrained(
        tmp_path / "model",
        device_map=places,
        offload_folder=tmp_path / "loaded",
        offload_state_dict=True,
        dtype=torch.float32,
    )
    assert loaded.lm_head.weight.is_meta == loaded.get_input_embeddings().weight.is_meta
    check(loaded, expected, offloaded=places["lm_head"] == "cpu" or places["transformer.word_embeddings"] == "disk")
    dispatched = dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path / "dispatched")
    check(dispatched, expected, offloaded=places["lm_head"] == places["transformer.word_embeddings"])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("places", [{"": "disk"}, {"transformer": "disk", "lm_head": "cpu"}, "auto"])
def test_the_whole_on_the_disk(name, places, golden_model, tmp_path):
    model = golden_model(name)
    expected = answers(model)
    model.save_pretrained(tmp_path / "model")
    given = {"max_memory": {"cpu": 1000}} if places == "auto" else {}
    folders = {"offload_folder": tmp_path / "loaded", **given}
    loaded = ChatGLMForConditionalGeneration.from_pretrained(
        tmp_path / "model", device_map=places, dtype=torch.float32, **folders
    )
    assert loaded.get_input_embeddings().weight.is_meta
    check(loaded, expected)
    loaded.save_pretrained(tmp_path / "again")  # reads the weights from where they are
    again = ChatGLMForConditionalGeneration.from_pretrained(tmp_path / "again", dtype=torch.float32)
    torch.testing.assert_close(answers(again)[0], expected[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_an_empty_model_is_filled_and_dispatched(name, golden_model, tmp_path):
    model = golden_model(name)
    expected = answers(model)
    model.save_pretrained(tmp_path / "model")
    with init_empty_weights():
        empty = ChatGLMForConditionalGeneration(model.config)
    empty.tie_weights()
    places = device_map(model, transformer__layers__1="disk", transformer__final_layernorm="disk")
    filled = load_checkpoint_and_dispatch(
        empty, tmp_path / "model", device_map=places, offload_folder=tmp_path / "offloaded"
    )
    check(filled.eval(), expected)


def test_chat_and_a_prefix_of_an_offloaded_model(root, tmp_path, golden_model):
    model = ChatGLMForConditionalGeneration.from_pretrained(
        root, device_map={"": "disk"}, offload_folder=tmp_path, dtype=torch.float32
    )
    tokenizer = ChatGLMTokenizer.from_pretrained(root)
    response, _ = model.chat(tokenizer, "你好", do_sample=False, max_new_tokens=3)
    assert response == "你好！我"
    *_, (streamed, _) = model.stream_chat(tokenizer, "你好", do_sample=False, max_new_tokens=3)
    assert streamed == "你好！"

    tuned = golden_model("prefix")
    expected = answers(tuned)
    tuned.save_pretrained(tmp_path / "tuned")
    plain = golden_model("base")
    plain.transformer.load_state_dict(tuned.transformer.state_dict(), strict=False)
    plain.lm_head.load_state_dict(tuned.lm_head.state_dict())
    check(cpu_offload(plain, execution_device=torch.device("cpu")).load_prefix(tmp_path / "tuned"), expected)


def test_offloaded_weights_are_not_quantised(golden_model):
    model = cpu_offload(golden_model("base"), execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match="offloaded: quantise it first"):
        model.quantize(8)
