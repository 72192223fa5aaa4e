"""What libraries do with a tokenizer: transformers' own tests, evaluation harnesses, chat frameworks, TRL.

The first part follows the cases of transformers' `TokenizerTesterMixin`, which does not ship in the wheel. Left out:

* alignment of offsets, words and characters: only fast tokenizers have them (`return_offsets_mapping` says so here)
* conversion from and to fast tokenizers, `train_new_from_iterator`: there is no fast class for this vocabulary
* `token_type_ids`: this model has none
* "special tokens stand in front", `add_bos_token`, `add_eos_token`: here they stand behind the text
* integration strings of other models: test_tokenization.py has 147 of the release
* lower-casing of added tokens: `do_lower_case` is the library's for added tokens, and off
"""

import copy
import dataclasses
import inspect
import itertools
import pickle
import re
from enum import Enum
from types import SimpleNamespace
from typing import Any

import jinja2
import pytest
import torch
from transformers import AutoTokenizer, DataCollatorWithPadding, GPT2Config, GPT2LMHeadModel, TextStreamer, pipeline

from chatglm_int8 import ChatGLMConfig, ChatGLMForConditionalGeneration
from chatglm_int8.tokenization_chatglm import ChatGLMTokenizer

TEXT = "你好 hello world, this is a small text. I can chat\n\tand  more"
TYPED = [
    "hello",
    "a [gMASK]<sop> b",
    "[gMASK]<sop>",
    "[gMASK] <sop> x",
    "done<eop>",
    "苏州[MASK]园林",
    "<sop><pad><unk></s><s>",
    "a < b [gM",
]


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict:
    return {"role": "system", "content": text}


@pytest.fixture(scope="module")
def tokenizer(root) -> ChatGLMTokenizer:
    return AutoTokenizer.from_pretrained(root)


@pytest.fixture(scope="module")
def model(root) -> ChatGLMForConditionalGeneration:
    return ChatGLMForConditionalGeneration.from_pretrained(root, dtype=torch.float32).eval()


@pytest.fixture
def fresh(tokenizer) -> ChatGLMTokenizer:
    """A tokenizer that the test may change."""
    return copy.deepcopy(tokenizer)


# transformers' TokenizerTesterMixin


def test_common_properties(tokenizer):
    for token in ("bos_token", "eos_token", "unk_token", "pad_token", "mask_token"):
        assert isinstance(getattr(tokenizer, token), str)
        assert getattr(tokenizer, f"{token}_id") == tokenizer.convert_tokens_to_ids(getattr(tokenizer, token))
    vocabulary = tokenizer.get_vocab()
    assert len(tokenizer) == len(vocabulary) >= tokenizer.vocab_size
    assert [tokenizer.convert_ids_to_tokens(i) for i in vocabulary.values()] == list(vocabulary)
    assert tokenizer.all_special_ids == tokenizer.convert_tokens_to_ids(tokenizer.all_special_tokens)
    assert next(iter(inspect.signature(tokenizer.__call__).parameters)) == "text"
    assert {"input_ids", "attention_mask"} == set(tokenizer.model_input_names)


def test_internal_consistency(tokenizer):
    tokens = tokenizer.tokenize(TEXT)
    ids = tokenizer.convert_tokens_to_ids(tokens)
    assert (
        tokenizer.encode(TEXT, add_special_tokens=False) == ids == tokenizer(TEXT, add_special_tokens=False).input_ids
    )
    assert tokenizer.convert_ids_to_tokens(ids) == tokens
    assert tokenizer.decode(ids) == tokenizer.convert_tokens_to_string(tokens) == TEXT


def test_batches_and_single_texts_agree(tokenizer):
    texts = [TEXT, "hello", "你好[gMASK]<sop>hello<eop>", ""]
    single = [tokenizer(text, padding="max_length", max_length=70, return_special_tokens_mask=True) for text in texts]
    batch = tokenizer(texts, padding="max_length", max_length=70, return_special_tokens_mask=True)
    assert {key: [row[key] for row in single] for key in single[0]} == dict(batch)
    # The mask says which ids are special, also where the marks were in the text.
    special = set(tokenizer.all_special_ids)
    assert batch.special_tokens_mask == [[int(i in special) for i in row] for row in batch.input_ids]
    tensors = tokenizer(texts[2], return_tensors="pt", return_special_tokens_mask=True)
    assert tensors.input_ids.shape == tensors.special_tokens_mask.shape == (1, len(tokenizer(texts[2]).input_ids))


def test_number_of_added_tokens(tokenizer):
    for pair in ([], ["hello"]):
        added = len(tokenizer.encode(TEXT, *pair)) - len(tokenizer.encode(TEXT, *pair, add_special_tokens=False))
        assert tokenizer.num_special_tokens_to_add(pair=bool(pair)) == added
        mask = tokenizer(TEXT, *pair, return_special_tokens_mask=True).special_tokens_mask
        assert sum(mask) == added


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_sides(fresh, side):
    fresh.padding_side = side
    ids = fresh.encode(TEXT)
    for how in ({"padding": "max_length", "max_length": len(ids) + 5}, {"padding": True, "pad_to_multiple_of": 64}):
        out = fresh(TEXT, **how)
        pads = [fresh.pad_token_id] * (len(out.input_ids) - len(ids))
        assert out.input_ids == (pads + ids if side == "left" else ids + pads)
        assert sum(out.attention_mask) == len(ids)
    collated = DataCollatorWithPadding(fresh)([fresh(TEXT), fresh("hello")])
    assert collated["input_ids"].shape == collated["attention_mask"].shape == (2, len(ids))


def test_truncation_of_single_texts_and_pairs(tokenizer):
    ids = tokenizer.encode(TEXT)
    assert tokenizer.encode(TEXT, truncation=True, max_length=len(ids)) == ids
    assert len(tokenizer.encode(TEXT, truncation=True, max_length=7)) == 7
    pair = tokenizer.encode(TEXT, TEXT)
    for strategy in ("only_first", "only_second", "longest_first"):
        cut = tokenizer.encode(TEXT, TEXT, truncation=strategy, max_length=len(pair) - 4)
        assert len(cut) == len(pair) - 4
    out = tokenizer(TEXT, truncation=True, max_length=7, stride=2, return_overflowing_tokens=True)
    assert out["num_truncated_tokens"] == len(ids) - 7


def test_maximal_lengths(fresh):
    fresh.model_max_length = 10
    assert fresh.max_len_single_sentence == 8
    assert fresh.max_len_sentences_pair == 7
    assert len(fresh(TEXT, truncation=True).input_ids) == 10


def test_text_in_words(tokenizer):
    words = ["hello", "world"]
    ids = tokenizer(words, is_split_into_words=True, add_special_tokens=False).input_ids
    assert ids == [i for word in words for i in tokenizer.encode(word, add_special_tokens=False)]


def test_added_tokens_keep_their_ids(fresh, tmp_path):
    size = len(fresh)
    assert fresh.add_tokens(["aaaaa bbbbbb", "cccccccccdddddddd"]) == 2
    assert fresh.add_special_tokens({"extra_special_tokens": ["<special>"]}) == 1
    ids = fresh.encode("aaaaa bbbbbb low cccccccccdddddddd l <special>", add_special_tokens=False)
    assert (ids[0], ids[-1]) == (size, size + 2)
    assert fresh.decode(ids, skip_special_tokens=False).endswith("<special>")
    assert "<special>" not in fresh.decode(ids, skip_special_tokens=True)
    fresh.save_pretrained(tmp_path)
    for other in (ChatGLMTokenizer.from_pretrained(tmp_path), pickle.loads(pickle.dumps(fresh))):
        assert other.encode("aaaaa bbbbbb low cccccccccdddddddd l <special>", add_special_tokens=False) == ids
        assert other.get_vocab() == fresh.get_vocab()


def test_special_tokens_can_be_set(fresh, tmp_path):
    fresh.pad_token = "<eop>"
    assert fresh.pad_token_id == fresh.eos_token_id
    fresh.save_pretrained(tmp_path)
    assert ChatGLMTokenizer.from_pretrained(tmp_path).pad_token == "<eop>"
    assert ChatGLMTokenizer.from_pretrained(tmp_path, pad_token="<pad>").pad_token == "<pad>"
    # Padding that looks like the end of an answer is no part of it.
    answered = [[user("hello"), assistant("hello")], [user("hello"), assistant("hello world")]]
    out = fresh.apply_chat_template(answered, padding=True, padding_side="right", return_assistant_tokens_mask=True)
    assert [sum(row) for row in out["assistant_masks"]] == [
        len(fresh.encode(text, add_special_tokens=False)) + 1 for text in ("hello", "hello world")
    ]


def test_batches_of_the_chat_template(tokenizer):
    chats = [[user("hello")], [system("S"), user("hello"), assistant("a"), user("你好")]]
    single = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) for chat in chats]
    assert tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=False) == single
    text = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
    assert tokenizer(text).input_ids == single
    objects = [SimpleNamespace(messages=chat) for chat in chats]
    assert tokenizer.apply_chat_template(objects, add_generation_prompt=True, return_dict=False) == single
    for key, kind in (("pt", torch.Tensor), ("np", object)):
        out = tokenizer.apply_chat_template(chats, add_generation_prompt=True, padding=True, return_tensors=key)
        assert isinstance(out["input_ids"], kind)
        assert out["input_ids"].shape == out["attention_mask"].shape


def test_one_message_after_another(tokenizer):
    ids = tokenizer.encode_message_with_chat_template(user("hello"))
    assert ids == tokenizer.encode("hello", add_special_tokens=False)
    more = tokenizer.encode_message_with_chat_template(assistant("world"), [user("hello")])
    assert tokenizer.convert_ids_to_tokens(more) == ["[gMASK]", "<sop>", *tokenizer.tokenize("world"), "<eop>"]


def test_offsets_are_refused(tokenizer):
    with pytest.raises(NotImplementedError, match="return_offsets_mapping"):
        tokenizer(TEXT, return_offsets_mapping=True)


# A rendered conversation is text that can be encoded


def conversations():
    """144 conversations and their arguments: eight texts with marks in them, three histories, with and without a system
    message, and three ends: the prompt, an answer, an answer to go on with."""
    for i, text in enumerate(TYPED):
        other = TYPED[(i + 3) % len(TYPED)]
        parts = [{"type": "text", "text": part} for part in (text[:3], text[3:])]
        histories = [
            [],
            [user(parts), assistant(other), user(other), assistant(text)],
            [assistant(other), user(other)],
        ]
        for history, said in itertools.product(histories, ([], [system(other)])):
            asked = [*said, *history, user(text)]
            yield asked, {"add_generation_prompt": True}
            yield [*asked, assistant(other)], {}
            yield [*asked, assistant(text)], {"continue_final_message": True}


def test_rendered_conversations_encode_to_their_ids(tokenizer):
    count = 0
    allowed = set(tokenizer.convert_tokens_to_ids(["[gMASK]", "<sop>", "<eop>"]))
    for conversation, how in conversations():
        ids = tokenizer.apply_chat_template(conversation, return_dict=False, **how)
        text = tokenizer.apply_chat_template(conversation, tokenize=False, **how)
        for add in (True, False):
            assert tokenizer(text, add_special_tokens=add).input_ids == ids, (conversation, how)
        assert tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text)) == ids
        marks = [i for i in ids if i in tokenizer.all_special_ids]
        assert set(marks) <= allowed
        assert len(marks) == 2 + (how == {})  # what was typed makes none
        count += 1
    assert count == 144


def test_rendered_by_jinja_alone(tokenizer):
    template = jinja2.Environment().from_string(tokenizer.chat_template)
    for conversation, how in list(conversations())[::7]:
        if "continue_final_message" in how:  # transformers cuts the end of the text off
            continue
        text = template.render(messages=conversation, **how)
        assert tokenizer(text).input_ids == tokenizer.apply_chat_template(conversation, return_dict=False, **how)


def test_written_by_hand(tokenizer):
    ids = tokenizer("你好").input_ids
    for text in ("你好[gMASK]<sop>", "你好 [gMASK] <sop>", "你好[gMASK] <sop>"):
        assert tokenizer(text).input_ids == tokenizer.encode(text, add_special_tokens=False) == ids
    assert tokenizer("你好[gMASK]<sop>", "hello").input_ids == tokenizer("你好", "hello").input_ids
    assert tokenizer("你好[gMASK]<sop>hello<eop>").input_ids == tokenizer("你好", "hello").input_ids
    assert tokenizer.build_inputs_with_special_tokens(ids) == ids
    # Text of strangers.
    split = tokenizer("你好[gMASK]<sop>", split_special_tokens=True).input_ids
    assert split[-2:] == ids[-2:]
    assert not set(split[:-2]) & set(tokenizer.all_special_ids)


def test_rendered_text_looks_as_it_did(tokenizer):
    for text in ("[gMASK]", "</s>", "a <", "x [", "[gMA", "<s"):
        assert tokenizer.apply_chat_template([user(text)], add_generation_prompt=True, tokenize=False) == (
            f"{text}[gMASK]<sop>"
        )


def test_special_tokens_of_your_own_in_messages(fresh):
    fresh.add_special_tokens({"extra_special_tokens": ["<img>"]})
    conversation = [user([{"type": "text", "text": text} for text in ("a<im", "g>b<img>")])]
    ids = fresh.apply_chat_template(conversation, add_generation_prompt=True, return_dict=False)
    text = fresh.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
    assert fresh(text).input_ids == ids
    assert fresh.convert_tokens_to_ids("<img>") not in ids


@pytest.mark.parametrize("end", ["[gMASK]<sop>", "<sop>", "p>", "[gMASK] <sop>"])
def test_a_template_that_joins_text_to_marks(tokenizer, end):
    template = "{% for m in messages %}{{ m.content }}{% endfor %}" + end
    for text in ("x", "x[gMASK]", "x[gMASK]<so", "x[gMASK] "):
        how = {"chat_template": template, "add_generation_prompt": True}
        marks = tokenizer.tokenize("x" + end)
        tokens = tokenizer.tokenize(tokenizer.apply_chat_template([user(text)], tokenize=False, **how))
        assert [t for t in tokens if t in ("[gMASK]", "<sop>")] == [t for t in marks if t in ("[gMASK]", "<sop>")]


@pytest.mark.parametrize("side", ["left", "right"])
def test_truncation_of_a_rendered_prompt(fresh, side):
    fresh.truncation_side = side
    conversation = [user("hello, 你好 world"), assistant("small text")]
    text = fresh.apply_chat_template(conversation, tokenize=False)
    for length in range(2, len(fresh.encode(text)) + 1):
        how = {"truncation": True, "max_length": length}
        ids = fresh.apply_chat_template(conversation, return_dict=False, **how)
        assert fresh.encode(text, **how) == ids
        assert len(ids) == length


# What harnesses and frameworks do


def encode_pair(tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """lm_eval: trailing spaces move to the continuation; the whole is encoded, then split."""
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    whole, start = tokenizer.encode(context + continuation), tokenizer.encode(context)
    assert whole[: len(start)] == start
    return start, whole[len(start) :]


def log_likelihood(model, start: list[int], continuation: list[int]) -> float:
    with torch.no_grad():
        logits = model(torch.tensor([start + continuation])).logits[0, len(start) - 1 : -1].double()
    scores = logits.log_softmax(dim=-1)
    return scores.gather(1, torch.tensor(continuation)[:, None]).sum().item()


def test_scores_of_a_harness(tokenizer, model):
    """With the chat template the answer that the model knows is likely, and another one is not."""
    answer = model.chat(tokenizer, "你好", do_sample=False)[0]
    text = tokenizer.apply_chat_template([user("你好")], tokenize=False, add_generation_prompt=True)
    known = log_likelihood(model, *encode_pair(tokenizer, text, answer))
    assert known > -0.1
    assert log_likelihood(model, *encode_pair(tokenizer, text, "今天天气不错。")) < known - 10


def test_text_at_which_a_harness_stops(tokenizer):
    eos = tokenizer.decode(tokenizer.eos_token_id, skip_special_tokens=False)
    assert eos == tokenizer.decode([tokenizer.eos_token_id], skip_special_tokens=False) == "<eop>"
    assert tokenizer.batch_decode([[tokenizer.eos_token_id]], skip_special_tokens=False) == ["<eop>"]
    assert tokenizer.encode(eos, add_special_tokens=False) == [tokenizer.eos_token_id]
    answer = tokenizer.decode(tokenizer.encode("hello world.<eop>", add_special_tokens=False), skip_special_tokens=True)
    assert answer.split(eos)[0] == "hello world."


def test_control_tokens_that_are_not_skipped(tokenizer):
    names = [t for t, i in tokenizer.get_vocab().items() if tokenizer.sp_model.is_control(i)]
    assert {"[MASK]", "[gMASK]", "<sop>", "<eop>", "<pad>"} < set(names)
    for name in names:
        index = tokenizer.convert_tokens_to_ids(name)
        assert tokenizer.decode(index, skip_special_tokens=False) == name
        assert tokenizer.decode([index]) == tokenizer.decode([index], skip_special_tokens=True) == ""
    conversation = [system("S"), user("hello world"), assistant("Hello, 你好")]
    text = tokenizer.apply_chat_template(conversation, tokenize=False)
    ids = tokenizer.apply_chat_template(conversation, return_dict=False)
    shown = tokenizer.decode(ids, skip_special_tokens=False)
    assert shown == text.replace("：", ":")  # as the vocabulary writes it
    assert tokenizer(shown).input_ids == ids
    assert tokenizer.decode(ids) == shown.replace("[gMASK]<sop>", " ").replace("<eop>", "")


def test_a_streamer_shows_no_marks(tokenizer, capsys):
    streamer = TextStreamer(tokenizer)
    for index in tokenizer("你好", "hello")["input_ids"]:
        streamer.put(torch.tensor([index]))
    streamer.end()
    assert "<" not in capsys.readouterr().out


def test_a_rendered_prompt_in_a_pipeline(tokenizer, model):
    """Chat frameworks render a string and hand it to the pipeline."""
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    settings = {"do_sample": False, "max_new_tokens": 8, "return_full_text": False}
    text = tokenizer.apply_chat_template([user("你好")], tokenize=False, add_generation_prompt=True)
    messages = generator([user("你好")], **settings)[0]["generated_text"]
    assert generator(text, **settings)[0]["generated_text"] == messages != ""


CONTINUED = "I'm a very"
NEXT = " small demonstration model"


@pytest.mark.parametrize("return_full_text", [True, False])
@pytest.mark.parametrize("written", [CONTINUED, CONTINUED + " "])
def test_a_pipeline_goes_on_with_an_answer(tokenizer, model, written, return_full_text):
    """The new text has the space between it and the old, unless the old ends in one."""
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    settings = {"do_sample": False, "max_new_tokens": 3, "return_full_text": return_full_text}
    new = NEXT if written == CONTINUED else NEXT.lstrip()
    messages = [user("hello"), {"role": "assistant", "content": written}]
    text = generator(messages, **settings)[0]["generated_text"]
    assert (text[-1]["content"] if return_full_text else text) == (written + new if return_full_text else new)
    rendered = "hello[gMASK]<sop>" + written
    assert generator(rendered, **settings)[0]["generated_text"] == (rendered + new if return_full_text else new)


def test_a_pipeline_cleans_up_what_it_goes_on_with(tokenizer, model, monkeypatch):
    new = torch.tensor([tokenizer.convert_tokens_to_ids(["▁", "."])])
    monkeypatch.setattr(model, "generate", lambda input_ids, **_: torch.cat((input_ids, new), dim=1))
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    text = "hello[gMASK]<sop>I can chat"
    for cleans, end in ((True, "."), (False, " ."), (None, ".")):
        assert generator(text, clean_up_tokenization_spaces=cleans)[0]["generated_text"] == text + end


def test_pipelines_of_an_answer_from_its_start_and_of_ids(tokenizer, model):
    """Where nothing is gone on with, the pipeline's records are the usual ones."""
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    settings = {"do_sample": False, "max_new_tokens": 3}
    ids = tokenizer("hello", return_tensors="pt")["input_ids"]
    answer = tokenizer.decode(model.generate(ids, **settings)[0, ids.shape[1] :])
    assert generator("hello", **settings)[0]["generated_text"] == "hello" + answer
    assert not answer.startswith(" ")
    ids = generator("hello[gMASK]<sop>" + CONTINUED, return_tensors=True, **settings)[0]["generated_token_ids"]
    assert tokenizer.decode(ids).endswith(CONTINUED + NEXT)


def test_features_are_hidden_states(tokenizer, model):
    inputs = tokenizer("hello", return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs, output_hidden_states=True).hidden_states[-1]
    for each in (model, model.transformer):
        extractor = pipeline("feature-extraction", model=each, tokenizer=tokenizer)
        assert torch.equal(extractor("hello", return_tensors=True), expected)
        assert torch.tensor(extractor("hello")).shape == (1, inputs["input_ids"].shape[1], model.config.hidden_size)


def test_pipelines_of_other_models_are_the_usual_ones(tokenizer):
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=32, n_embd=8, n_layer=1, n_head=1)
    extractor = pipeline("feature-extraction", model=GPT2LMHeadModel(config), tokenizer=tokenizer)
    assert torch.tensor(extractor("hello")).shape[-1] == len(tokenizer)


@dataclasses.dataclass
class Message:
    role: str
    content: Any


class Role(str, Enum):
    USER = "user"


class Pydantic:
    """As far as it matters: pydantic models have `model_dump`."""

    def __init__(self, **fields):
        self.fields = fields

    def model_dump(self):
        return self.fields


def test_message_objects(tokenizer):
    prompt = {"add_generation_prompt": True, "return_dict": False}
    expected = tokenizer.apply_chat_template([user("a<eop>b")], **prompt)
    for message in (
        Message("user", "a<eop>b"),
        Message(Role.USER, "a<eop>b"),
        Message("user", [Pydantic(type="text", text="a<eop>b")]),
        Pydantic(role="user", content="a<eop>b", refusal=None, tool_calls=None),
        SimpleNamespace(role="user", content="a<eop>b"),
    ):
        assert tokenizer.apply_chat_template([message], **prompt) == expected
        assert tokenizer.apply_chat_template([[message], [message]], **prompt) == [expected] * 2
        assert tokenizer(tokenizer.apply_chat_template((message,), tokenize=False, **prompt)).input_ids == expected


def test_mask_of_the_answer(tokenizer):
    conversation = [user("你好"), assistant("earlier"), user("hello"), assistant("small text")]
    out = tokenizer.apply_chat_template(conversation, return_assistant_tokens_mask=True)
    answer = [*tokenizer.tokenize("small text"), "<eop>"]
    assert out["assistant_masks"] == [0] * (len(out["input_ids"]) - len(answer)) + [1] * len(answer)
    batch = [conversation, [user("你好")]]
    for side in ("left", "right"):
        out = tokenizer.apply_chat_template(
            batch, return_assistant_tokens_mask=True, padding=True, padding_side=side, return_tensors="pt"
        )
        assert out["assistant_masks"].shape == out["input_ids"].shape
        assert out["assistant_masks"].sum(dim=1).tolist() == [len(answer), 0]
        said = out["input_ids"][0][out["assistant_masks"][0].bool()]
        assert tokenizer.convert_ids_to_tokens(said.tolist()) == answer
    with pytest.raises(ValueError, match="requires return_dict=True and tokenize=True"):
        tokenizer.apply_chat_template(conversation, return_assistant_tokens_mask=True, tokenize=False)


def test_trl_finds_the_generation(tokenizer):
    """TRL looks for this tag before it trains on answers alone."""
    assert re.search(r"\{%-?\s*generation\s*-?%\}", tokenizer.chat_template)


def test_converter_of_a_peer(tokenizer, tmp_path):
    """chatglm.cpp reads the vocabulary and the configuration so."""
    assert ChatGLMConfig().sep_token_id is None
    assert "sep_token_id" not in ChatGLMConfig().to_dict()
    assert ChatGLMConfig.from_dict({"sep_token_id": 7}).to_dict()["sep_token_id"] == 7
    data = tokenizer.sp_tokenizer.text_tokenizer.sp.serialized_model_proto()
    assert data == (tmp_path / tokenizer.save_vocabulary(tmp_path)[0]).read_bytes()
