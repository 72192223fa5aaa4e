"""ChatGLMConfig: its defaults, old and new files, and what it refuses."""

import json
import re

import pytest

from chatglm_int8 import ChatGLMConfig

MODEL_CLASS = "modeling_chatglm.ChatGLMForConditionalGeneration"
RELEASE = {
    "vocab_size": 130528,
    "hidden_size": 4096,
    "inner_hidden_size": 16384,
    "num_layers": 28,
    "num_attention_heads": 32,
    "max_sequence_length": 2048,
    "layernorm_epsilon": 1e-5,
    "position_encoding_2d": True,
    "bos_token_id": 130004,
    "eos_token_id": 130005,
    "mask_token_id": 130000,
    "gmask_token_id": 130001,
    "pad_token_id": 3,
    "quantization_bit": 8,
    "quantization_embeddings": False,
    "pre_seq_len": None,
    "prefix_projection": False,
    "use_cache": True,
    "tie_word_embeddings": True,
}
SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "inner_hidden_size": 48,
    "num_layers": 2,
    "num_attention_heads": 2,
    "bos_token_id": 4,
    "eos_token_id": 5,
    "mask_token_id": 0,
    "gmask_token_id": 1,
    "pad_token_id": 3,
}
# The file of the release, as it was published (with a small hidden size).
PUBLISHED = {
    "_name_or_path": "THUDM/chatglm-6b-int8",
    "architectures": ["ChatGLMModel"],
    "auto_map": {
        "AutoConfig": "configuration_chatglm.ChatGLMConfig",
        "AutoModel": MODEL_CLASS,
        "AutoModelForSeq2SeqLM": MODEL_CLASS,
    },
    **{key: value for key, value in RELEASE.items() if key not in ("pre_seq_len", "prefix_projection")},
    "hidden_size": 64,
    "inner_hidden_size": 256,
    "num_layers": 3,
    "num_attention_heads": 4,
    "model_type": "chatglm",
    "torch_dtype": "float16",
    "transformers_version": "4.27.1",
}
del PUBLISHED["tie_word_embeddings"]


def write(folder, fields):
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def test_the_default_is_the_int8_release():
    config = ChatGLMConfig()
    assert {name: getattr(config, name) for name in RELEASE} == RELEASE
    assert config.model_type == "chatglm"
    assert config.auto_map == {
        "AutoConfig": "configuration_chatglm.ChatGLMConfig",
        "AutoModel": MODEL_CLASS,
        "AutoModelForCausalLM": MODEL_CLASS,
        "AutoModelForSeq2SeqLM": MODEL_CLASS,
    }


def test_transformers_names_are_aliases():
    config = ChatGLMConfig(**SMALL)
    assert (config.num_hidden_layers, config.max_position_embeddings) == (2, 2048)
    config.num_hidden_layers = 1
    assert config.num_layers == 1
    assert ChatGLMConfig(inner_hidden_size=None, hidden_size=128).inner_hidden_size == 512


def test_survives_saving_and_loading(tmp_path):
    fields = {
        **SMALL,
        "quantization_bit": 4,
        "pre_seq_len": 7,
        "prefix_projection": True,
        "position_encoding_2d": False,
        "max_sequence_length": 99,
        "layernorm_epsilon": 1e-3,
        "use_cache": False,
        "tie_word_embeddings": False,
        "initializer_range": 0.5,
    }
    config = ChatGLMConfig(**fields)
    config.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    loaded = ChatGLMConfig.from_pretrained(tmp_path)
    assert {name: stored[name] for name in fields} == fields
    assert {name: getattr(loaded, name) for name in fields} == fields
    assert loaded.to_dict() == config.to_dict()


def test_defaults_are_written_out(tmp_path):
    """A file says everything, so that other defaults (those of the public code are) don't change its meaning."""
    ChatGLMConfig().save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert {name: stored[name] for name in RELEASE if RELEASE[name] is not None} == {
        name: value for name, value in RELEASE.items() if value is not None
    }
    assert stored.get("pre_seq_len") is None


def test_reads_the_published_file(tmp_path):
    config = ChatGLMConfig.from_pretrained(write(tmp_path, PUBLISHED))
    for name, value in PUBLISHED.items():
        if name in RELEASE:
            assert getattr(config, name) == value, name
    assert str(config.dtype) == "torch.float16"  # torch_dtype in old files
    assert config.tie_word_embeddings is True  # what no published file says
    assert config.pre_seq_len is None
    assert config.auto_map["AutoModelForCausalLM"] == MODEL_CLASS
    assert config.architectures == ["ChatGLMModel"]


def test_files_without_quantisation_are_of_float_models(tmp_path):
    """The published FP16 release does not mention it; what is saved here always does."""
    fields = {name: value for name, value in PUBLISHED.items() if not name.startswith("quantization")}
    config = ChatGLMConfig.from_pretrained(write(tmp_path, fields))
    assert config.quantization_bit == 0
    assert ChatGLMConfig.from_dict({**SMALL, "quantization_bit": 4}).quantization_bit == 4
    assert ChatGLMConfig.from_dict(ChatGLMConfig(**SMALL).to_dict()).quantization_bit == 8


def test_reads_the_real_published_file(published):
    config = ChatGLMConfig.from_pretrained(published)
    assert (config.hidden_size, config.num_layers, config.quantization_bit) == (32, 28, 8)
    assert config.tie_word_embeddings is True
    assert str(config.dtype) == "torch.float16"


def test_completes_the_auto_map_and_keeps_what_is_there():
    remote = "someone/chatglm--modeling_chatglm.ChatGLMForConditionalGeneration"
    config = ChatGLMConfig(**SMALL, auto_map={"AutoModel": remote, "AutoConfig": "other.Config"})
    assert config.auto_map == {
        "AutoConfig": "other.Config",
        "AutoModel": remote,
        "AutoModelForCausalLM": remote,
        "AutoModelForSeq2SeqLM": remote,
    }
    assert ChatGLMConfig(**SMALL, auto_map=None).auto_map["AutoModel"] == MODEL_CLASS


def test_the_given_auto_map_is_not_changed():
    auto_map = {"AutoModel": MODEL_CLASS}
    ChatGLMConfig(**SMALL, auto_map=auto_map)
    assert auto_map == {"AutoModel": MODEL_CLASS}


@pytest.mark.parametrize(
    ("field", "value", "others"),
    [
        ("quantization_bit", 3, {}),
        ("quantization_bit", 16, {}),
        ("quantization_bit", -8, {}),
        ("quantization_bit", None, {}),
        ("quantization_bit", "8", {}),
        ("quantization_embeddings", True, {}),
        ("hidden_size", 34, {}),
        ("hidden_size", 30, {}),
        ("hidden_size", 36, {"num_attention_heads": 6}),  # D = 6 does not split in 2 parts of pairs
        ("inner_hidden_size", 49, {"quantization_bit": 4}),
        ("pre_seq_len", 0, {}),
        ("pre_seq_len", -1, {}),
        ("bos_token_id", 64, {}),
        ("eos_token_id", 130005, {}),
        ("mask_token_id", -1, {}),
        ("gmask_token_id", 64, {}),
        ("pad_token_id", 1000, {}),
        ("num_layers", 0, {}),
        ("num_attention_heads", 0, {}),
        ("vocab_size", 0, {}),
        ("hidden_size", 0, {}),
        ("hidden_size", -32, {}),
        ("inner_hidden_size", 0, {}),
        ("max_sequence_length", 0, {}),
        ("max_sequence_length", None, {}),
        ("hidden_size", "4096", {}),
        ("pre_seq_len", "64", {}),
        ("eos_token_id", [5, 2], {}),
    ],
)
def test_refuses_a_bad_field_by_name(tmp_path, field, value, others):
    fields = {**SMALL, **others, field: value}
    with pytest.raises(ValueError, match=re.escape(f"{field} is {value!r}, expected")) as caught:
        ChatGLMConfig(**fields)
    assert "config.json" in str(caught.value)
    with pytest.raises(ValueError, match=re.escape(f"{field} is {value!r}, expected")):
        ChatGLMConfig.from_pretrained(write(tmp_path, {**fields, "model_type": "chatglm"}))


def test_names_the_numbers_of_a_vocabulary_that_is_too_small():
    with pytest.raises(ValueError, match=r"bos_token_id is 130004, expected an id below vocab_size = 20000"):
        ChatGLMConfig(vocab_size=20000)
    with pytest.raises(ValueError, match="give all of bos_token_id, eos_token_id, mask_token_id, gmask_token_id, pad_"):
        ChatGLMConfig(vocab_size=99)


def test_accepts_every_shape_that_the_goldens_have():
    for fields in (
        {"quantization_bit": 0},
        {"quantization_bit": 4},
        {"quantization_bit": 8},
        {"position_encoding_2d": False, "hidden_size": 36, "num_attention_heads": 6},  # D = 6, one part
        {"pre_seq_len": 1, "prefix_projection": True},
        {"quantization_bit": 8, "inner_hidden_size": 49},
        {"pad_token_id": None},
    ):
        config = ChatGLMConfig(**{**SMALL, **fields})
        assert {name: getattr(config, name) for name in fields} == fields


def test_shapes_that_follow_are_not_stored():
    config = ChatGLMConfig(head_dim=128)
    assert (config.head_dim, config.position_rows) == (128, 2)
    assert ChatGLMConfig(position_encoding_2d=False).position_rows == 1
    assert not {"head_dim", "position_rows"} & config.to_dict().keys()
    assert ChatGLMConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
    with pytest.raises(ValueError, match="head_dim is 64, and hidden_size / num_attention_heads is 128: leave"):
        ChatGLMConfig(head_dim=64)
