"""The tokenizer against the goldens of the release, and its rules on a small vocabulary too."""

import copy
import importlib.util
import json
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from jinja2.exceptions import TemplateError

from chatglm_int8 import tokenization_chatglm
from chatglm_int8.tokenization_chatglm import CLEAN_UP, WHITE_SPACE, ChatGLMTokenizer

ROOT = Path(__file__).resolve().parent.parent
PUBLISHED = Path(os.environ.get("CHATGLM_SHARED", ROOT.parent / "shared")) / "published"
MARKS = ["[gMASK]", "<sop>"]
CONTROL = ["<s>", "</s>", "<pad>", "[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>"]
CONTROL += ["<ENC>", "<dBLOCK>"]
HELLO = {"role": "user", "content": "你好"}
ANSWER = {"role": "assistant", "content": "hello world."}
SYSTEM = {"role": "system", "content": "S"}
TOY_TEXT = [
    "你好，世界。hello world, this is a small text.",
    "晚上睡不着应该怎么办？ What should I do?",
    "[Round 0]\n问：你好\n答：hello",
    "0 1 2 3 4 5 6 7 8 9 ( ) [ ] < > | / _ - + = : ; ' \" ! n't it's we've they're I'm",
    *(chr(97 + i) + " " + chr(122 - i) for i in range(26)),
]


def load_maker():
    spec = importlib.util.spec_from_file_location("make_vocabulary", ROOT / "examples" / "make_vocabulary.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    data = load_maker().build_vocabulary(TOY_TEXT * 5, pieces=600)
    (folder / "ice_text.model").write_bytes(data)
    config = {"tokenizer_class": "ChatGLMTokenizer", "num_image_tokens": 0}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def genuine_folder():
    if not (PUBLISHED / "ice_text.model").is_file():
        pytest.skip("needs the published ice_text.model: set CHATGLM_SHARED to its parent folder")
    return PUBLISHED


@pytest.fixture(scope="session", params=["small", "genuine"])
def tokenizer(request):
    return ChatGLMTokenizer.from_pretrained(request.getfixturevalue(f"{request.param}_folder"))


@pytest.fixture
def fresh(small_folder):
    """A small tokenizer that the test may change."""
    return ChatGLMTokenizer.from_pretrained(small_folder)


@pytest.fixture(scope="session")
def genuine(genuine_folder):
    return ChatGLMTokenizer.from_pretrained(genuine_folder)


@pytest.fixture(scope="session")
def golden(genuine_folder):
    return json.loads((genuine_folder / "tokenizer_golden.json").read_text(encoding="utf-8"))


def tokens_of(tokenizer, conversation, **kwargs):
    ids = tokenizer.apply_chat_template(conversation, return_dict=False, **kwargs)
    return tokenizer.convert_ids_to_tokens(ids)


def rendered(tokenizer, *messages, **kwargs):
    return tokenizer.apply_chat_template(list(messages), tokenize=False, **kwargs)


# The release


def test_strings_of_the_release(genuine, golden):
    assert len(golden["cases"]) == 147
    for case in golden["cases"]:
        text, ids = case["text"], case["ids"]
        assert genuine.tokenize(text) == case["tokens"], text
        assert genuine.encode(text) == ids
        assert genuine.encode(text, add_special_tokens=False) == case["ids_no_special"]
        assert genuine.decode(ids) == case["decoded"]
        assert genuine.decode(ids, skip_special_tokens=True) == case["decoded_skip"]
        for skip, decoded in ((False, case["decoded"]), (True, case["decoded_skip"])):
            stream = genuine.decode_stream(skip_special_tokens=skip)
            assert "".join(map(stream.step, ids)) + stream.flush() == decoded


def test_pairs_batches_and_ids_of_the_release(genuine, golden):
    assert genuine.vocab_size == len(genuine) == golden["vocab_size"] == golden["len"]
    for token, index in golden["special"].items():
        assert genuine.convert_tokens_to_ids(token) == genuine.get_vocab()[token] == index
    for index, token in golden["ids_to_tokens"].items():
        assert genuine.convert_ids_to_tokens(int(index)) == token
    for pair in golden["pairs"]:
        assert genuine.encode(pair["a"], pair["b"]) == pair["ids"]
    for batch in golden["batches"]:
        out = genuine(batch["texts"], padding=True, return_tensors="pt")
        assert set(out) == {"input_ids", "attention_mask"}
        assert out["input_ids"].tolist() == batch["input_ids"]
        assert out["attention_mask"].equal((out["input_ids"] != 3).long())
        assert genuine.batch_decode(out["input_ids"]) == batch["decoded"]


def test_chat_prompt_of_the_release(genuine, golden):
    # The last text of the last batch is a prompt of two rounds in the form of the public `chat`.
    text, ids = golden["batches"][2]["texts"][2], golden["batches"][2]["input_ids"][2]
    questions = re.findall("问：(.*)\n", text)
    answer = re.search("答：(.*)\n", text).group(1)
    conversation = [
        {"role": "user", "content": questions[0]},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": questions[1]},
    ]
    assert rendered(genuine, *conversation) == text
    out = genuine.apply_chat_template(conversation, add_generation_prompt=True, return_dict=False)
    assert out == ids


# Plain text


def test_special_tokens_in_plain_text(tokenizer):
    tokens = tokenizer.tokenize("a [MASK] b<sop>c<eop><pad><unk>")
    assert [t for t in tokens if t[0] in "[<"] == ["[MASK]", "<sop>", "<eop>", "<pad>", "<unk>"]
    assert tokens[tokens.index("[MASK]") + 1] == "▁b"  # a dummy prefix of its own
    for text in ("[gMASK]", "</s>", "<s>", "[sMASK]", "<ENC>", "<0x41>", "<image_0>"):
        tokens = tokenizer.tokenize(f"a{text}b")
        assert text not in tokens
        assert tokenizer.decode(tokenizer.encode(f"a{text}b")) == f"a{text}b"
    assert tokenizer.tokenize("a<n>b") == tokenizer.tokenize("a\nb")
    assert tokenizer.tokenize("a<|tab|>b<|blank_3|>c") == tokenizer.tokenize("a\tb   c")


def test_white_space(tokenizer):
    for length in (2, 3, 79, 80, 81, 82, 160, 161, 201):
        text = "a" + " " * length + "b\n\n\tc"
        assert tokenizer.decode(tokenizer.encode(text)) == text
    tokens = tokenizer.tokenize("a" + " " * 163 + "b")
    assert tokens == ["▁a", "<|blank_80|>", "<|blank_80|>", "<|blank_3|>", "b"]


def test_text_that_is_no_unicode(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud83d\ude00b")) == "a😀b"
    tokenizer.encode("half of a pair \ud83d alone")


def test_split_special_tokens(tokenizer):
    text = "".join(CONTROL) + "<unk><0x41>"
    ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    assert not set(ids) & set(tokenizer.convert_tokens_to_ids([*CONTROL, "<unk>"]))
    assert tokenizer.decode(ids) == text


def test_inputs_with_special_tokens(tokenizer):
    gmask, sop, eop = tokenizer.convert_tokens_to_ids([*MARKS, "<eop>"])
    assert (tokenizer.gmask_token, tokenizer.gmask_token_id) == ("[gMASK]", gmask)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (sop, eop)
    assert (tokenizer.unk_token_id, tokenizer.end_token_id, tokenizer.pad_token_id) == (0, 2, 3)
    assert tokenizer.convert_ids_to_tokens(tokenizer.mask_token_id) == "[MASK]"
    assert tokenizer.build_inputs_with_special_tokens([7, 8]) == [7, 8, gmask, sop]
    assert tokenizer.build_inputs_with_special_tokens([7], [8]) == [7, gmask, sop, 8, eop]
    assert tokenizer.num_special_tokens_to_add() == 2
    assert tokenizer.num_special_tokens_to_add(pair=True) == 3
    assert tokenizer.get_special_tokens_mask([7], [8, 9]) == [0, 1, 1, 0, 0, 1]
    mask = tokenizer.get_special_tokens_mask([7, gmask, sop, 3], already_has_special_tokens=True)
    assert mask == [0, 1, 1, 1]


def test_padding(tokenizer):
    texts = ["a", "a b c"]
    left = tokenizer(texts, padding=True)
    assert left["input_ids"][0][:2] == [3, 3]
    assert left["attention_mask"] == [[0, 0, 1, 1, 1], [1] * 5]
    right = tokenizer(texts, padding="max_length", max_length=6, padding_side="right")
    assert right["attention_mask"] == [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]]
    padded = tokenizer.pad([{"input_ids": [7]}, {"input_ids": [7, 8]}], return_tensors="np")
    assert padded["input_ids"].tolist() == [[3, 7], [7, 8]]
    assert "token_type_ids" not in tokenizer("a", "b")


@pytest.mark.parametrize("side", ["left", "right"])
def test_truncation_keeps_the_marks(fresh, side):
    fresh.truncation_side = side
    prompt = fresh.tokenize("hello, 你好 world")
    answer = [*fresh.tokenize("small text"), "<eop>"]
    query = {"role": "user", "content": "hello, 你好 world"}
    training = [query, {"role": "assistant", "content": "small text"}]

    def cut(tokens, kept):
        return tokens[:kept] if side == "right" else tokens[len(tokens) - kept :]

    for length in range(2, len(prompt) + 3):
        how = {"truncation": True, "max_length": length}
        expected = cut(prompt, length - 2) + MARKS
        assert fresh.convert_ids_to_tokens(fresh.encode(query["content"], **how)) == expected
        assert tokens_of(fresh, [query], add_generation_prompt=True, **how) == expected
    for length in range(2, len(prompt) + len(answer) + 3):
        tokens = tokens_of(fresh, training, truncation=True, max_length=length)
        at = tokens.index("[gMASK]")
        assert tokens[at : at + 2] == MARKS
        assert tokens[:at] + tokens[at + 2 :] == cut(prompt + answer, length - 2)
        assert at == len(cut(prompt + answer, length - 2)[: len(prompt)]) or side == "left"


def test_lower_case_and_space(small_folder):
    tokenizer = ChatGLMTokenizer.from_pretrained(small_folder, do_lower_case=True, remove_space=True)
    assert tokenizer.tokenize(" A   [MASK]  B\n c ") == ["▁a", "[MASK]", "▁b", "▁c"]


def test_image_tokens(small_folder):
    plain = ChatGLMTokenizer(small_folder / "ice_text.model", num_image_tokens=0)
    shifted = ChatGLMTokenizer(small_folder / "ice_text.model", num_image_tokens=10)
    assert len(shifted) == shifted.vocab_size == plain.vocab_size + 10
    assert shifted.encode("hello\n") == [i + 10 for i in plain.encode("hello\n")]
    assert shifted.convert_ids_to_tokens([0, 9, 10]) == ["<image_0>", "<image_9>", "<unk>"]
    assert shifted.convert_tokens_to_ids("<image_3>") == shifted.get_vocab()["<image_3>"] == 3
    assert min(shifted.encode("<image_3>")) >= 10
    assert shifted.decode(shifted.encode("hello\n")) == "hello\n"
    assert ChatGLMTokenizer(small_folder / "ice_text.model").num_image_tokens == 20000


def test_added_tokens(fresh, tmp_path):
    size = len(fresh)
    assert fresh.add_tokens(["<tool>"]) == 1
    assert fresh.add_special_tokens({"extra_special_tokens": ["<img>"]}) == 1
    assert (fresh.vocab_size, len(fresh)) == (size, size + 2)
    fresh.save_pretrained(tmp_path)
    for tokenizer in (fresh, ChatGLMTokenizer.from_pretrained(tmp_path)):
        ids = tokenizer.encode("a<tool>b<img>", add_special_tokens=False)
        assert tokenizer.convert_ids_to_tokens(ids) == ["▁a", "<tool>", "▁b", "<img>"]
        assert tokenizer.decode(ids) == "a<tool> b<img>"
        assert tokenizer.decode(ids, skip_special_tokens=True) == "a<tool> b"
        typed = tokens_of(tokenizer, [{"role": "user", "content": "a<tool>b<img>"}])
        assert "<tool>" in typed
        assert "<img>" not in typed


# Ids to text


def random_ids(tokenizer, rng):
    """Mostly bytes, marks and punctuation, where decoding has rules."""
    last = tokenizer.vocab_size - 1
    pieces = ["▁", "'", ".", "?", "▁n", "n", "t", "s", "m", "<unk>", "<n>", "<|blank_2|>", "<eop>"]
    byte = [last - 255 + value for value in (*b"a", *"你😀é".encode(), 0xE4, 0xF0, 0xFF, 0xC0)]
    groups = [range(last + 1), range(last - 255, last + 1), byte]
    groups.append(tokenizer.convert_tokens_to_ids(pieces))
    return [rng.choice(rng.choice(groups)) for _ in range(rng.randrange(14))]


def test_decode_is_that_of_sentencepiece(tokenizer):
    rng = random.Random(20230625)
    spelled = {token: re.escape(token) for token in WHITE_SPACE}
    for _ in range(3000):
        ids = random_ids(tokenizer, rng)
        expected = tokenizer.sp_model.decode(ids)
        expected = re.sub("|".join(spelled.values()), lambda match: WHITE_SPACE[match.group()], expected)
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == expected, ids
        for spaced, joined in CLEAN_UP:
            expected = expected.replace(spaced, joined)
        assert tokenizer.decode(ids) == expected, ids


def test_stream_is_decode(tokenizer):
    rng = random.Random(20230626)
    for _ in range(2000):
        ids, skip, clean = random_ids(tokenizer, rng), rng.random() < 0.5, rng.random() < 0.7
        stream, text = tokenizer.decode_stream(skip, clean), ""
        how = {"skip_special_tokens": skip or None, "clean_up_tokenization_spaces": clean}
        for count, index in enumerate(ids, start=1):
            text += stream.step(index)
            end = copy.copy(stream)
            end._held, end._bytes = stream._held[:], stream._bytes[:]
            assert text + end.flush() == tokenizer.decode(ids[:count], **how), ids
        assert text + stream.flush() == tokenizer.decode(ids, **how), ids


def test_stream_shows_whole_characters(tokenizer):
    byte = [tokenizer.vocab_size - 256 + value for value in "a👋b".encode()]
    stream = tokenizer.decode_stream()
    assert [stream.step(i) for i in byte] == ["a", "", "", "", "👋", "b"]
    stream = tokenizer.decode_stream()
    assert [stream.step(i) for i in byte[1:4]] + [stream.flush()] == ["", "", "", "\ufffd" * 3]


def test_decode_takes_ids_lists_and_tensors(tokenizer):
    torch = pytest.importorskip("torch")
    ids = tokenizer.encode("hello", add_special_tokens=False)
    assert tokenizer.decode(ids) == tokenizer.decode(torch.tensor(ids)) == "hello"
    assert tokenizer.decode([]) == ""
    assert tokenizer.decode(4) == tokenizer.decode(torch.tensor(4)) == "\n"
    assert tokenizer.batch_decode(torch.tensor([ids, ids])) == ["hello", "hello"]


def test_ids_out_of_range(tokenizer):
    for index in (-1, -100, tokenizer.vocab_size, 10**9):
        with pytest.raises(ValueError, match=f"id {index} is outside of the vocabulary"):
            tokenizer.decode([5, index])
        with pytest.raises(ValueError, match="outside"):
            tokenizer.convert_ids_to_tokens(index)
        with pytest.raises(ValueError, match="outside"):
            tokenizer.decode_stream().step(index)


# Chat


def test_chat_format(tokenizer):
    marks = "[gMASK]<sop>"
    assert rendered(tokenizer, HELLO) == "你好"
    assert rendered(tokenizer, HELLO, add_generation_prompt=True) == "你好" + marks
    two = "[Round 0]\n问：你好\n答：hello world.\n[Round 1]\n问：你好\n答："
    assert rendered(tokenizer, HELLO, ANSWER, HELLO) == two
    assert rendered(tokenizer, HELLO, ANSWER, HELLO, add_generation_prompt=True) == two + marks
    one = "S\n[Round 0]\n问：你好\n答："
    assert rendered(tokenizer, SYSTEM, HELLO) == one
    # Training data: the answer behind the marks, closed.
    closed = f"{marks}hello world.<eop>"
    assert rendered(tokenizer, HELLO, ANSWER) == "你好" + closed
    assert rendered(tokenizer, HELLO, ANSWER, HELLO, ANSWER) == two + closed
    assert rendered(tokenizer, SYSTEM, HELLO, ANSWER) == one + closed
    part = rendered(tokenizer, HELLO, ANSWER, continue_final_message=True)
    assert part == f"你好{marks}hello world."
    parts = {"role": "user", "content": [{"type": "text", "text": t} for t in ("你", "好")]}
    assert rendered(tokenizer, parts, ANSWER, parts) == two


@pytest.mark.parametrize(
    ("roles", "expected"),
    [
        ("u u", "q0\nq1"),
        ("u u a", "q0\nq1[gMASK]<sop>a2<eop>"),
        ("u a a", "q0[gMASK]<sop>a1\na2<eop>"),
        ("u a u u", "[Round 0]\n问：q0\n答：a1\n[Round 1]\n问：q2\nq3\n答："),
        ("u a a u", "[Round 0]\n问：q0\n答：a1\na2\n[Round 1]\n问：q3\n答："),
        ("a u", "[Round 0]\n问：\n答：a0\n[Round 1]\n问：q1\n答："),
        ("s a u", "s0\n[Round 0]\n问：\n答：a1\n[Round 1]\n问：q2\n答："),
        ("s s u", "s0\ns1\n[Round 0]\n问：q2\n答："),
        ("d u", "s0\n[Round 0]\n问：q1\n答："),
        ("u s", "s1\n[Round 0]\n问：q0\n答："),
        ("u s u", "s1\n[Round 0]\n问：q0\nq2\n答："),
        ("u a s u", "[Round 0]\n问：q0\n答：a1\ns2\n[Round 1]\n问：q3\n答："),
        ("u s a u", "s1\n[Round 0]\n问：q0\n答：a2\n[Round 1]\n问：q3\n答："),
        ("u a u s a", "[Round 0]\n问：q0\n答：a1\ns3\n[Round 1]\n问：q2\n答：[gMASK]<sop>a4<eop>"),
    ],
)
def test_other_orders_of_roles(fresh, roles, expected):
    names = {
        "u": ("user", "q"),
        "a": ("assistant", "a"),
        "s": ("system", "s"),
        "d": ("developer", "s"),
    }
    conversation = [
        {"role": names[short][0], "content": names[short][1] + str(i)} for i, short in enumerate(roles.split())
    ]
    assert rendered(fresh, *conversation) == expected


def test_a_blank_system_message_says_nothing(fresh):
    for text in ("", " \n"):
        assert rendered(fresh, {"role": "system", "content": text}, HELLO) == "你好"


def test_chat_ids(tokenizer):
    prompt = tokenizer.encode("你好")
    answer = tokenizer.encode("hello world.", add_special_tokens=False)
    chat = tokenizer.apply_chat_template
    assert chat([HELLO], add_generation_prompt=True, return_dict=False) == prompt
    closed = [*prompt, *answer, tokenizer.eos_token_id]
    assert chat([HELLO, ANSWER], return_dict=False) == closed
    assert chat([HELLO, ANSWER], return_dict=False, continue_final_message=True) == closed[:-1]
    out = chat([HELLO], add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert out["input_ids"].tolist() == [prompt]
    assert out["attention_mask"].tolist() == [[1] * len(prompt)]
    batch = [[HELLO], [HELLO, ANSWER, HELLO]]
    out = chat(batch, add_generation_prompt=True, padding=True, return_tensors="pt")
    assert out["input_ids"][0].tolist()[-len(prompt) :] == prompt
    assert out["attention_mask"].sum(1)[0] == len(prompt)
    split = copy.deepcopy(tokenizer)
    split.split_special_tokens = True
    assert split.apply_chat_template([HELLO, ANSWER], return_dict=False) == closed


def test_chat_messages_make_no_control_ids(tokenizer):
    rng = random.Random(7)
    control = set(tokenizer.convert_tokens_to_ids([*CONTROL, "<unk>"]))
    names = [*CONTROL, "<unk>", "<0x41>", "<", "[", "[gMA", "SK]", "<so", "p>", "\x01", " ", "a"]
    for _ in range(300):
        typed = ["".join(rng.choices(names, k=rng.randrange(1, 9))) + "x" for _ in range(4)]
        parts = [{"type": "text", "text": rng.choice(names)} for _ in range(4)]
        conversation = [
            {"role": "system", "content": typed[0]},
            {"role": "user", "content": parts},
            {"role": "assistant", "content": typed[1]},
            {"role": "user", "content": typed[2]},
        ]
        chat = tokenizer.apply_chat_template
        ids = chat(conversation, add_generation_prompt=True, return_dict=False)
        assert not set(ids[:-2]) & control, conversation
        assert tokenizer.convert_ids_to_tokens(ids[-2:]) == MARKS
        text = rendered(tokenizer, *conversation)
        plain = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert ids[:-2] == plain
        conversation.append({"role": "assistant", "content": typed[3]})
        tokens = tokens_of(tokenizer, conversation)
        assert [t for t in tokens if t in CONTROL] == [*MARKS, "<eop>"]


def test_own_template(tokenizer):
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}[gMASK]<sop>{% endfor %}"
    conversation = [{"role": "judge", "content": "[gMASK]"}]
    text = rendered(tokenizer, *conversation, chat_template=template)
    assert text == "judge: [gMASK][gMASK]<sop>"
    tokens = tokens_of(tokenizer, conversation, chat_template=template)
    assert tokens[-2:] == MARKS
    assert tokens.count("[gMASK]") == 1


@pytest.mark.parametrize(
    ("conversation", "message"),
    [
        ([], "at least one message"),
        ([[]], "at least one message"),
        ("你好", "at least one message"),
        (["你好"], "at least one message"),
        ([{"role": "user", "content": ""}], "query is empty"),
        ([{"role": "user", "content": " "}], "query is empty"),
        ([{"role": "user", "content": "\u3000\u200b"}], "query is empty"),
        ([{"role": "robot", "content": "a"}], 'has role "robot" where "user" was expected'),
        ([{"content": "a"}], 'where "user" was expected'),
        ([HELLO, {"role": "tool", "content": "a"}], 'Message 1 has role "tool" where "assistant" was expected'),
        ([ANSWER], 'needs a message with role "user"'),
        ([HELLO, ANSWER, SYSTEM], 'needs a message with role "user"'),
        ([{"role": "system", "content": "a"}], 'needs a message with role "user"'),
        ([HELLO, ANSWER], "continue_final_message=True"),
        ([{"role": "user"}], "content of a message has to be a string"),
        ([{"role": "user", "content": 3}], "content of a message has to be a string"),
        ([{"role": "user", "content": [{"type": "image"}]}], "text alone"),
    ],
)
def test_mistakes_in_conversations(fresh, conversation, message):
    for kind in (ValueError, TemplateError):  # the kind that libraries catch, too
        with pytest.raises(kind, match=re.escape(message)):
            fresh.apply_chat_template(conversation, add_generation_prompt=True)


def test_tools_are_refused(fresh):
    with pytest.raises(ValueError, match="tools or documents"):
        fresh.apply_chat_template([HELLO], tools=[{"name": "f"}])


# Files


def behaviour(tokenizer):
    text = "你好 [MASK] [gMASK] hello\n"
    prompt = tokenizer.apply_chat_template([HELLO], add_generation_prompt=True, return_dict=False)
    return (
        tokenizer.encode(text),
        tokenizer.decode(tokenizer.encode(text)),
        prompt,
        tokenizer.get_vocab(),
        tokenizer.special_tokens_map,
        tokenizer.chat_template,
        tokenizer.padding_side,
        tokenizer.model_max_length,
    )


def test_copies_behave_alike(tokenizer, tmp_path):
    expected = behaviour(tokenizer)
    assert behaviour(pickle.loads(pickle.dumps(tokenizer))) == expected
    assert behaviour(copy.deepcopy(tokenizer)) == expected
    tokenizer.save_pretrained(tmp_path)
    assert behaviour(ChatGLMTokenizer.from_pretrained(tmp_path)) == expected
    (path,) = tokenizer.save_vocabulary(tmp_path, filename_prefix="copy")
    assert Path(path).name == "copy-ice_text.model"
    assert Path(path).read_bytes() == Path(tokenizer.vocab_file).read_bytes()


def test_saved_folder_loads_by_itself(small_folder, tmp_path):
    """save_pretrained takes the code along, and the folder needs no installed package."""
    ChatGLMTokenizer.from_pretrained(small_folder).save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "tokenization_chatglm.py").is_file()
    script = (
        "import sys; from transformers import AutoTokenizer\n"
        "t = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "print(type(t).__module__, t.encode('hello'))"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "saved")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")},
    )
    assert run.returncode == 0, run.stderr
    assert "transformers_modules" in run.stdout
    ids = ChatGLMTokenizer.from_pretrained(small_folder).encode("hello")
    assert run.stdout.strip().endswith(str(ids))


def test_own_chat_template_of_a_checkpoint_is_kept(small_folder, tmp_path):
    shutil.copytree(small_folder, tmp_path / "own")
    (tmp_path / "own" / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    tokenizer = ChatGLMTokenizer.from_pretrained(tmp_path / "own")
    assert tokenizer.apply_chat_template([HELLO], tokenize=False) == "你好!"


def test_missing_vocabulary(small_folder, tmp_path):
    shutil.copy(small_folder / "tokenizer_config.json", tmp_path)
    for load in (
        lambda: ChatGLMTokenizer.from_pretrained(tmp_path),
        lambda: ChatGLMTokenizer(tmp_path / "ice_text.model"),
    ):
        with pytest.raises(FileNotFoundError, match=r"ice_text\.model") as caught:
            load()
        assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda data: b"version https://git-lfs.github.com/spec/v1\nsize 1\n", "git lfs pull"),
        (lambda data: b"", "no SentencePiece model"),
        (lambda data: b"garbage", "no SentencePiece model"),
        (lambda data: data[: len(data) // 2], "no SentencePiece model"),
    ],
)
def test_broken_vocabulary(small_folder, tmp_path, make, message):
    shutil.copytree(small_folder, tmp_path / "broken")
    file = tmp_path / "broken" / "ice_text.model"
    file.write_bytes(make(file.read_bytes()))
    with pytest.raises(ValueError, match=message) as caught:
        ChatGLMTokenizer.from_pretrained(tmp_path / "broken")
    assert str(file) in str(caught.value)


def test_vocabulary_of_another_model(small_folder, tmp_path):
    maker = load_maker()
    model = maker.proto.ModelProto.FromString((small_folder / "ice_text.model").read_bytes())
    model.pieces[-300].piece = "<other>"
    (tmp_path / "ice_text.model").write_bytes(model.SerializeToString())
    with pytest.raises(ValueError, match=r"1 are missing, <\|blank_"):
        ChatGLMTokenizer(tmp_path / "ice_text.model")


def test_one_file_that_imports_no_sibling():
    source = Path(tokenization_chatglm.__file__).read_text(encoding="utf-8")
    assert not re.search(r"^\s*(import|from)\s+\.", source, flags=re.MULTILINE)


# The example script


def test_made_vocabulary_has_the_layout_of_the_release(small_folder):
    tokenizer = ChatGLMTokenizer.from_pretrained(small_folder)
    tokens = tokenizer.convert_ids_to_tokens(range(tokenizer.vocab_size))
    assert tokens[:6] == ["<unk>", "<s>", "</s>", "<pad>", "<n>", "▁"]
    tail = [*CONTROL[3:], "<|tab|>", *(f"<|blank_{k}|>" for k in range(2, 81))]
    tail += [f"<0x{value:02X}>" for value in range(256)]
    assert tokens[-len(tail) :] == tail
    for text in ("你好 world", "未见过的字 😀", "a\n\tb   c"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_made_vocabulary_is_the_same_each_time():
    maker = load_maker()
    first, second = (maker.build_vocabulary(TOY_TEXT, 500) for _ in range(2))
    assert first == second


def test_vocabulary_from_dialogues(tmp_path, monkeypatch, capsys):
    maker = load_maker()
    lines = [{"topic": "t", "turns": [{"ask": [text, text[::-1]], "answer": text}]} for text in TOY_TEXT]
    file = tmp_path / "d.jsonl"
    file.write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    out = tmp_path / "ice_text.model"
    arguments = ["make_vocabulary.py", "--pieces", "500", "--output", str(out), str(file)]
    monkeypatch.setattr(sys, "argv", arguments)
    maker.main()
    assert "pieces" in capsys.readouterr().out
    assert ChatGLMTokenizer(out, num_image_tokens=0).vocab_size <= 500
    file.write_text('{"turns": 3}')
    with pytest.raises(ValueError, match="line 1"):
        list(maker.read_lines([file]))
    with pytest.raises(ValueError, match="more than 350 pieces"):
        maker.build_vocabulary(TOY_TEXT, 100)
