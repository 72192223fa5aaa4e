"""Weight files that are damaged, incomplete or another model's: each is one clear error, and nothing is executed."""

import json
import os
import pickle
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from chatglm_int8 import ChatGLMConfig, ChatGLMForConditionalGeneration, ChatGLMModel
from chatglm_int8.checkpoint import check_checkpoint, read_prefix
from chatglm_int8.modeling_chatglm import ChatGLMPreTrainedModel

DATA = Path(__file__).resolve().parent / "data"
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1752165\n"
QKV = "transformer.layers.1.attention.query_key_value.weight"
IDS = torch.tensor([[7, 8, 9, 501, 504]])
# One file or two, pickled or safetensors.
FORMATS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def golden(name="int8"):
    return load_file(DATA / f"{name}.safetensors")


def save_shard(tensors, path):
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path)


def write(folder, tensors, form="model.safetensors", config="int8", **fields):
    """A checkpoint folder in one of FORMATS; returns the folder and its shards."""
    folder.mkdir(exist_ok=True)
    config = {**json.loads((DATA / f"{config}.config.json").read_text()), **fields}
    (folder / "config.json").write_text(json.dumps(config))
    if not form.endswith(".json"):
        save_shard(tensors, folder / form)
        return folder, [folder / form]
    stem, suffix = form.removesuffix(".index.json").rsplit(".", 1)
    names = sorted(tensors)
    shards = [folder / f"{stem}-0000{i}-of-00002.{suffix}" for i in (1, 2)]
    weight_map = {}
    for shard, part in zip(shards, (names[::2], names[1::2]), strict=True):
        save_shard({name: tensors[name] for name in part}, shard)
        weight_map.update(dict.fromkeys(part, shard.name))
    (folder / form).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return folder, shards


def load(folder, target=ChatGLMForConditionalGeneration, **kwargs):
    return target.from_pretrained(folder, **kwargs)


def refused(folder, error, *words, **kwargs):
    """Loading raises this very error, with a message of one paragraph that has all the words."""
    with pytest.raises(error) as caught:
        load(folder, **kwargs)
    message = str(caught.value)
    assert type(caught.value) in (error, FileNotFoundError)
    assert all(str(word) in message for word in words), message
    assert "\n" not in message.strip(), message
    return message


# Good folders


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", ["int8", "int4", "base"])
def test_good_folders_load(tmp_path, golden_model, form, name):
    folder, _ = write(tmp_path, golden(name), form, name)
    model = load(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = golden_model(name)(IDS).logits
        assert (model(IDS).logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert model.lm_head.weight is model.transformer.word_embeddings.weight


@pytest.mark.parametrize("form", FORMATS)
def test_the_published_folder_passes(published, form):
    config = ChatGLMConfig.from_pretrained(published)
    with torch.device("meta"):
        expected = ChatGLMForConditionalGeneration(config).state_dict()
    assert check_checkpoint(published, expected, 8) is None


def test_the_base_class_loads_too(tmp_path):
    folder, _ = write(tmp_path, golden())
    model = ChatGLMModel.from_pretrained(folder)
    assert torch.equal(model.layers[1].attention.query_key_value.weight, golden()[QKV])


class Around(ChatGLMPreTrainedModel):
    """A model of the user's own around the base model, under another name than ours."""

    base_model_prefix = "network"

    def __init__(self, config):
        super().__init__(config)
        self.network = ChatGLMModel(config)
        self.rating = torch.nn.Linear(config.hidden_size, 2)
        self.post_init()


@pytest.mark.parametrize("target", [ChatGLMModel, ChatGLMForConditionalGeneration, Around])
@pytest.mark.parametrize("source", ["base", "head", "around"])
@pytest.mark.parametrize("tied", [True, False])
def test_files_of_the_base_model_and_of_models_around_it(tmp_path, golden_model, tied, source, target):
    model = golden_model("int8")
    model.config.tie_word_embeddings = tied
    if not tied:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight * 2)
    if source == "around":
        saved = Around(model.config)
        saved.network.load_state_dict(model.transformer.state_dict())
    else:
        saved = model.transformer if source == "base" else model
    saved.save_pretrained(tmp_path)
    if (source == "around") != (target is Around) and source != "base":
        refused(tmp_path, ValueError, "tensors are missing", target=target)  # transformers finds no name for them
        return
    loaded = target.from_pretrained(tmp_path, dtype=torch.float32)
    expected = model.transformer.state_dict()
    for name, tensor in loaded.base_model.state_dict().items():
        assert torch.equal(tensor.float(), expected[name].float()), name
    if target is ChatGLMForConditionalGeneration:
        assert (loaded.lm_head.weight is loaded.transformer.word_embeddings.weight) == tied
        if source == "head":
            assert torch.equal(loaded.lm_head.weight.float(), model.lm_head.weight)


def test_the_head_alone_is_no_embedding(tmp_path):
    """The base model has no head to be tied to."""
    tensors = golden()
    del tensors["transformer.word_embeddings.weight"]
    refused(write(tmp_path, tensors)[0], ValueError, "1 tensors are missing", "word_embeddings", target=ChatGLMModel)


def test_legacy_pickles_load(tmp_path):
    """Files of torch.save before version 1.6 are no zip archives."""
    folder, (file,) = write(tmp_path, golden(), "pytorch_model.bin")
    torch.save(golden(), file, _use_new_zipfile_serialization=False)
    assert file.read_bytes()[:2] != b"PK"
    assert torch.equal(load(folder).state_dict()[QKV], golden()[QKV])


@pytest.mark.parametrize("form", FORMATS)
def test_unknown_tensors_are_no_error(tmp_path, form):
    extra = {"transformer.layers.7.mlp.dense_h_to_4h.weight": torch.zeros(2), "optimizer.step": torch.zeros(())}
    folder, _ = write(tmp_path, {**golden(), **extra}, form)
    assert torch.equal(load(folder).state_dict()[QKV], golden()[QKV])


@pytest.mark.parametrize("form", ["model.safetensors", "pytorch_model.bin.index.json"])
@pytest.mark.parametrize("absent", ["lm_head.weight", "transformer.word_embeddings.weight"])
def test_one_of_the_two_tied_tensors_is_enough(tmp_path, form, absent):
    tensors = golden()
    expected = tensors["lm_head.weight"]
    del tensors[absent]
    model = load(write(tmp_path, tensors, form)[0])
    assert model.lm_head.weight is model.transformer.word_embeddings.weight
    assert torch.equal(model.lm_head.weight, expected)


def test_neither_of_the_two_tied_tensors_is_an_error(tmp_path):
    tensors = golden()
    del tensors["lm_head.weight"], tensors["transformer.word_embeddings.weight"]
    refused(write(tmp_path, tensors)[0], ValueError, "2 tensors are missing", "Download or copy")


def test_untied_models_need_both(tmp_path):
    tensors = golden()
    del tensors["lm_head.weight"]
    folder, _ = write(tmp_path, tensors, tie_word_embeddings=False)
    refused(folder, ValueError, "1 tensors are missing", "lm_head.weight")


# Damaged files


@pytest.mark.parametrize("form", FORMATS)
def test_a_git_lfs_pointer(tmp_path, form):
    folder, shards = write(tmp_path, golden(), form)
    shards[-1].write_bytes(LFS_POINTER)
    refused(folder, OSError, shards[-1], "Git LFS pointer", "git lfs pull", f"{len(LFS_POINTER)} bytes")


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("kept", [0, 1, 7, 100, 0.3, 0.9, -1])
def test_a_file_that_is_cut_short(tmp_path, form, kept):
    folder, shards = write(tmp_path, golden(), form)
    content = shards[0].read_bytes()
    kept = int(len(content) * kept) if isinstance(kept, float) else kept
    shards[0].write_bytes(content[:kept])
    refused(folder, OSError, shards[0], "again")


@pytest.mark.parametrize("form", FORMATS)
def test_garbage(tmp_path, form):
    folder, shards = write(tmp_path, golden(), form)
    garbage = random.Random(0)
    for size in (3, 50, 1000, 20000):
        for start in (b"", b"PK\x03\x04", b"\x80\x02", b"<html>", b"\0" * 8):
            shards[0].write_bytes(start + garbage.randbytes(size))
            refused(folder, OSError, shards[0], "again")


@pytest.mark.parametrize("form", ["model.safetensors", "pytorch_model.bin"])
def test_flipped_bytes_in_the_headers(tmp_path, form):
    """Either the file loads, or there is one of the two errors."""
    folder, (file,) = write(tmp_path, golden(), form)
    content = file.read_bytes()
    flip = random.Random(0)
    with torch.device("meta"):
        expected = ChatGLMForConditionalGeneration(ChatGLMConfig.from_pretrained(folder)).state_dict()
    refusals = 0
    for _ in range(150):
        damaged = bytearray(content)
        for _ in range(3):
            damaged[flip.randrange(3000)] = flip.randrange(256)
        file.write_bytes(damaged)
        try:
            check_checkpoint(folder, expected, 8)
        except (OSError, ValueError) as error:
            refusals += 1
            assert file.name in str(error) or str(folder) in str(error)
    assert refusals > 20


@pytest.mark.parametrize("start", [0, 1, 2, 30, 200, 3000])
def test_a_legacy_pickle_that_is_cut_short(tmp_path, start):
    folder, (file,) = write(tmp_path, golden(), "pytorch_model.bin")
    torch.save(golden(), file, _use_new_zipfile_serialization=False)
    file.write_bytes(file.read_bytes()[:start])
    refused(folder, OSError, file, "again")


@pytest.mark.parametrize("form", [form for form in FORMATS if form.endswith(".json")])
def test_a_missing_shard(tmp_path, form):
    folder, shards = write(tmp_path, golden(), form)
    shards[1].unlink()
    refused(folder, OSError, shards[1], "missing", "download it")


@pytest.mark.parametrize("form", [form for form in FORMATS if form.endswith(".json")])
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"3",
        b"null",
        b"{}",
        b'{"weight_map": []}',
        b'{"weight_map": {}}',
        b'{"weight_map": {"a": 3}}',
        b"\xff\xfe\x00",
    ],
)
def test_a_broken_index(tmp_path, form, content):
    folder, _ = write(tmp_path, golden(), form)
    (folder / form).write_bytes(content)
    refused(folder, OSError, folder / form, "not an index", "again")


@pytest.mark.parametrize("form", [form for form in FORMATS if form.endswith(".json")])
def test_an_index_that_is_a_git_lfs_pointer(tmp_path, form):
    folder, _ = write(tmp_path, golden(), form)
    (folder / form).write_bytes(LFS_POINTER)
    refused(folder, OSError, folder / form, "Git LFS pointer", "git lfs pull")


@pytest.mark.parametrize("form", [form for form in FORMATS if form.endswith(".json")])
def test_a_missing_index(tmp_path, form):
    folder, _ = write(tmp_path, golden(), form)
    (folder / form).unlink()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        load(folder)


def test_a_folder_without_weights(tmp_path):
    folder, (file,) = write(tmp_path, golden())
    file.unlink()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        load(folder)


@pytest.mark.parametrize("content", [[torch.zeros(2)], torch.zeros(2), 5, {"transformer": {"a": torch.zeros(2)}}])
def test_a_pickle_of_something_else(tmp_path, content):
    folder, (file,) = write(tmp_path, golden(), "pytorch_model.bin")
    torch.save(content, file)
    with pytest.raises((OSError, ValueError)) as caught:
        load(folder)
    assert str(folder) in str(caught.value)


# Pickles that run code


class Marker:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("form", ["pytorch_model.bin", "pytorch_model.bin.index.json"])
@pytest.mark.parametrize("how", ["zip", "legacy", "plain"])
def test_a_pickle_is_never_executed(tmp_path, form, how):
    folder, shards = write(tmp_path / "model", golden(), form)
    evil = {**torch.load(shards[0], weights_only=True), "evil": Marker(tmp_path / "executed")}
    if how == "plain":
        shards[0].write_bytes(pickle.dumps(evil["evil"]))
    else:
        torch.save(evil, shards[0], _use_new_zipfile_serialization=how == "zip")
    refused(folder, OSError, shards[0], "would run code")
    with pytest.raises(OSError, match="would run code"):
        read_prefix(shards[0])
    assert not (tmp_path / "executed").exists()
    if how != "legacy":  # the trap is a real one
        pickle.loads(pickle.dumps(evil["evil"]))
        assert (tmp_path / "executed").exists()


# Weights of another kind or model


@pytest.mark.parametrize("form", FORMATS)
def test_int8_weights_without_scales(tmp_path, form):
    tensors = {name: tensor for name, tensor in golden().items() if not name.endswith("weight_scale")}
    folder, _ = write(tmp_path, tensors, form)
    refused(folder, ValueError, folder, "12 tensors are missing", "weight_scale", "scales of quantised weights")


@pytest.mark.parametrize("bits", [8, 4])
def test_float_weights_in_a_quantised_folder(tmp_path, bits):
    folder, _ = write(tmp_path, golden("base"), quantization_bit=bits)
    refused(folder, ValueError, folder, "weight_scale", "quantization_bit", "should be 0")


def test_float_weights_with_scales(tmp_path):
    tensors = golden()
    tensors[QKV] = tensors[QKV].half()
    folder, (file,) = write(tmp_path, tensors)
    refused(folder, ValueError, file, QKV.removeprefix("transformer."), "torch.float16", "torch.int8 is expected")


@pytest.mark.parametrize("form", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_weights_in_a_float_folder(tmp_path, form, bits):
    folder, (file,) = write(tmp_path, golden(f"int{bits}"), form, quantization_bit=0)
    refused(folder, ValueError, file, "torch.int8", "quantization_bit = 0", f"set quantization_bit to {bits}")


@pytest.mark.parametrize(("stored", "configured"), [(4, 8), (8, 4)])
def test_int4_and_int8_taken_for_each_other(tmp_path, stored, configured):
    folder, (file,) = write(tmp_path, golden(f"int{stored}"), quantization_bit=configured)
    refused(folder, ValueError, file, f"quantization_bit = {configured}", f"set quantization_bit to {stored}")


@pytest.mark.parametrize(
    "fields",
    [
        {"hidden_size": 32, "inner_hidden_size": 128},
        {"inner_hidden_size": 128},
        {"vocab_size": 600},
    ],
)
@pytest.mark.parametrize("form", ["model.safetensors", "pytorch_model.bin.index.json"])
def test_shapes_that_disagree_with_the_configuration(tmp_path, form, fields):
    folder, _ = write(tmp_path, golden(), form, **fields)
    refused(folder, ValueError, folder, "has shape [", "should be [", "different models")


@pytest.mark.parametrize("form", FORMATS)
def test_missing_tensors(tmp_path, form):
    tensors = golden()
    del tensors["transformer.final_layernorm.bias"], tensors["transformer.layers.0.mlp.dense_4h_to_h.weight"]
    folder, _ = write(tmp_path, tensors, form)
    refused(folder, ValueError, folder, "2 tensors are missing", "Download or copy")


def test_more_blocks_than_are_stored(tmp_path):
    folder, _ = write(tmp_path, golden(), num_layers=4)
    refused(folder, ValueError, "tensors are missing", "layers.3.")


@pytest.mark.parametrize("bits", [3, 16])
def test_a_configuration_that_is_refused(tmp_path, bits):
    folder, _ = write(tmp_path, golden(), quantization_bit=bits)
    refused(folder, ValueError, f"quantization_bit is {bits}, expected 0", "config.json")


def test_an_unknown_device_map(tmp_path):
    folder, _ = write(tmp_path, golden())
    refused(folder, ValueError, "device_map", "nonsense", device_map="nonsense")


def test_the_folder_is_untouched_by_a_refusal(tmp_path):
    folder, shards = write(tmp_path, golden(), "pytorch_model.bin.index.json")
    shards[1].write_bytes(LFS_POINTER)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    refused(folder, OSError, "LFS")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_subfolders_are_looked_over(tmp_path):
    folder, (file,) = write(tmp_path / "inner", golden())
    model = load(tmp_path, subfolder="inner")
    assert torch.equal(model.state_dict()[QKV], golden()[QKV])
    file.write_bytes(LFS_POINTER)
    refused(tmp_path, OSError, file, "Git LFS pointer", subfolder="inner")
    shutil.rmtree(folder)


def test_the_check_reads_only_headers(tmp_path, monkeypatch):
    """On the meta device: no tensor's numbers come into memory."""
    seen = []
    monkeypatch.setattr(
        "chatglm_int8.checkpoint._check_tensor", lambda where, stored, *rest: seen.append(stored.device.type)
    )
    for form in ("model.safetensors", "pytorch_model.bin"):
        folder, _ = write(tmp_path / form, golden(), form)
        with torch.device("meta"):
            expected = ChatGLMForConditionalGeneration(ChatGLMConfig.from_pretrained(folder)).state_dict()
        check_checkpoint(folder, expected, 8)
    assert len(seen) > 100
    assert set(seen) == {"meta"}


# Prefixes of P-Tuning v2


def prefix_tensors(name):
    return {key: tensor for key, tensor in golden(name).items() if "prefix_encoder." in key}


@pytest.mark.parametrize("where", ["file", "folder", *FORMATS])
@pytest.mark.parametrize("name", ["prefix", "prefix_proj"])
def test_a_prefix_is_loaded_from_any_form(tmp_path, golden_model, cases, name, where):
    if where in FORMATS:  # a full checkpoint that has the prefix inside
        path, _ = write(tmp_path, golden(name), where, name)
    else:
        path = tmp_path / "prefix.pt" if where == "file" else tmp_path / "pytorch_model.bin"
        torch.save(prefix_tensors(name), path)
        path = path if where == "file" else tmp_path
    projected = name == "prefix_proj"
    assert set(read_prefix(path)) == {key.split("prefix_encoder.")[1] for key in prefix_tensors(name)}

    # The base model is the prefix model without its prefix.
    base = ChatGLMForConditionalGeneration(ChatGLMConfig(**golden_fields(name)))
    base.load_state_dict(golden(name), strict=False)
    base.eval()
    ids = cases[f"{name}_single.input_ids"]
    assert base.load_prefix(path) is base
    assert (base.config.pre_seq_len, base.config.prefix_projection) == (8, projected)
    with torch.no_grad():
        logits = base(ids).logits
    expected = cases[f"{name}_single.logits"]
    assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()
    trainable = {key for key, p in base.named_parameters() if p.requires_grad}
    assert trainable == set(prefix_tensors(name))


def golden_fields(name):
    fields = json.loads((DATA / f"{name}.config.json").read_text())
    del fields["model_type"]
    return {**fields, "pre_seq_len": None, "prefix_projection": False}


def test_a_prefix_in_safetensors_and_under_other_names(tmp_path, golden_model):
    """Training scripts store the encoder alone, with or without `transformer.`, or behind `module.`."""
    tensors = prefix_tensors("prefix_proj")
    for beginning in ("", "module.transformer."):
        renamed = {key.replace("transformer.", beginning): tensor for key, tensor in tensors.items()}
        save_file(renamed, tmp_path / "prefix.safetensors")
        model = golden_model("base").load_prefix(tmp_path / "prefix.safetensors")
        assert torch.equal(
            model.transformer.prefix_encoder.trans[2].weight.half(),
            tensors["transformer.prefix_encoder.trans.2.weight"],
        )


def test_a_second_prefix_replaces_the_first(tmp_path, golden_model):
    for name in ("prefix", "prefix_proj"):
        torch.save(prefix_tensors(name), tmp_path / f"{name}.bin")
    model = golden_model("base")
    model.load_prefix(tmp_path / "prefix_proj.bin").load_prefix(tmp_path / "prefix.bin")
    assert model.config.prefix_projection is False
    other = golden_model("base").load_prefix(tmp_path / "prefix.bin")
    assert torch.equal(model(IDS).logits, other(IDS).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_prefix_takes_the_dtype_of_the_model(tmp_path, golden_model, dtype):
    torch.save(prefix_tensors("prefix"), tmp_path / "prefix.bin")
    model = golden_model("int8", dtype).load_prefix(tmp_path / "prefix.bin")
    assert model.transformer.prefix_encoder.embedding.weight.dtype == dtype
    assert model(IDS).logits.isfinite().all()


@pytest.mark.parametrize(
    "change",
    [
        lambda t: {**t, "transformer.prefix_encoder.embedding.weight": torch.zeros(8, 100)},
        lambda t: {**t, "transformer.prefix_encoder.trans.0.weight": torch.zeros(3, 3)},
        lambda t: {key: v for key, v in t.items() if not key.endswith("trans.2.bias")},
        lambda t: {**t, "transformer.prefix_encoder.other": torch.zeros(3)},
    ],
)
def test_a_prefix_of_another_shape_is_refused_and_changes_nothing(tmp_path, golden_model, change):
    torch.save(change(prefix_tensors("prefix_proj")), tmp_path / "prefix.bin")
    model = golden_model("base")
    trainable = [p.requires_grad for p in model.parameters()]
    before = model(IDS).logits
    with pytest.raises(ValueError, match=r"prefix\.bin"):
        model.load_prefix(tmp_path / "prefix.bin")
    assert (model.config.pre_seq_len, model.config.prefix_projection) == (None, False)
    assert torch.equal(model(IDS).logits, before)
    assert [p.requires_grad for p in model.parameters()] == trainable


def test_files_that_hold_no_prefix(tmp_path):
    folder, (file,) = write(tmp_path, golden("base"), "pytorch_model.bin", "base")
    for path in (folder, file):
        with pytest.raises(ValueError, match=r"not a P-Tuning v2 checkpoint"):
            read_prefix(path)
    torch.save([1, 2], file)
    with pytest.raises((OSError, ValueError), match=r"pytorch_model\.bin"):
        read_prefix(file)


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_damaged_prefix_files(tmp_path, suffix):
    path = tmp_path / f"prefix.{suffix}"
    with pytest.raises(FileNotFoundError, match=rf"prefix\.{suffix}") as caught:
        read_prefix(path)
    assert "index" not in str(caught.value)
    save_shard(prefix_tensors("prefix"), path)
    content = path.read_bytes()
    for damaged in (content[:-1], content[:100], b"", b"garbage"):
        path.write_bytes(damaged)
        with pytest.raises(OSError, match=rf"prefix\.{suffix}.*again"):
            read_prefix(path)
    path.write_bytes(LFS_POINTER)
    with pytest.raises(OSError, match="Git LFS pointer"):
        read_prefix(path)
    with pytest.raises(FileNotFoundError, match="holds none of"):
        read_prefix(tmp_path)


@pytest.mark.parametrize("form", ["model.safetensors", "pytorch_model.bin"])
def test_a_folder_with_a_prefix_alone_is_no_model(tmp_path, form):
    """What P-Tuning saves; the public code wants it loaded by hand, here there is a call for it."""
    folder, _ = write(tmp_path, prefix_tensors("prefix"), form, "prefix")
    refused(folder, ValueError, folder, "prefix", "load_prefix")


def test_a_stored_prefix_of_another_length(tmp_path):
    folder, _ = write(tmp_path, golden("prefix"), config="prefix", pre_seq_len=9)
    refused(folder, ValueError, "prefix_encoder.embedding.weight", "[8, 384]", "[9, 384]")


def test_a_stored_prefix_without_its_projection(tmp_path):
    folder, _ = write(tmp_path, golden("prefix"), config="prefix", prefix_projection=True)
    refused(folder, ValueError, "prefix_encoder")
