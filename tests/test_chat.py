"""chat and stream_chat: against the published goldens, and with the embedded model."""

import json
import logging

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import chatglm_int8  # noqa: F401  registers the Auto classes


@pytest.fixture(scope="module")
def release(published):
    """Model and tokenizer in the release's form, with the genuine vocabulary, and what the public code said."""
    model = AutoModelForCausalLM.from_pretrained(published, dtype=torch.float32).eval()
    golden = json.loads((published / "chat_golden.json").read_text(encoding="utf-8"))
    return model, AutoTokenizer.from_pretrained(published), golden


@pytest.fixture(scope="module")
def embedded(request):
    """Model and tokenizer of the checkout."""
    root = request.config.rootpath
    return AutoModelForCausalLM.from_pretrained(root, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(root)


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def greedy_answers(model, tokenizer, conversations: list[list[dict]]) -> list[str]:
    answers = []
    for start in range(0, len(conversations), 64):
        inputs = tokenizer.apply_chat_template(
            conversations[start : start + 64],
            add_generation_prompt=True,
            padding=True,
            return_tensors="pt",
            return_dict=True,
        )
        output = model.generate(**inputs, max_new_tokens=128, do_sample=False)
        new = output[:, inputs["input_ids"].shape[1] :].tolist()
        answers += [model.process_response(tokenizer.decode(ids)) for ids in new]
    return answers


# The public implementation's answers.


def test_rounds_equal_golden(release):
    model, tokenizer, golden = release
    history = []
    for turn in golden["rounds"]:
        settings = {"max_length": turn["max_length"], "repetition_penalty": turn["repetition_penalty"]}
        before = list(history)
        response, longer = model.chat(tokenizer, turn["query"], history=history, do_sample=False, **settings)
        assert response == turn["response"]
        assert [list(entry) for entry in longer] == turn["history"]
        assert history == before
        history = longer


def test_stream_equals_golden(release):
    model, tokenizer, golden = release
    for stream in golden["stream"]:
        settings = {"max_length": stream["max_length"], "repetition_penalty": stream["repetition_penalty"]}
        got = list(model.stream_chat(tokenizer, stream["query"], do_sample=False, **settings))
        assert len(got) == len(stream["responses"])
        last = ""
        for (response, history), expected in zip(got, stream["responses"], strict=True):
            if expected.endswith("\ufffd"):  # half a character: not shown before it is complete
                expected = last
            assert response == expected
            assert history == [(stream["query"], response)]
            last = expected


def test_sampled_answer_equals_golden(release):
    model, tokenizer, golden = release
    sampled = golden["sampled_seed42"]
    torch.manual_seed(42)
    assert model.chat(tokenizer, sampled["query"], max_length=sampled["max_length"])[0] == sampled["response"]


def test_ids_and_scores_equal_golden(release):
    model, tokenizer, golden = release
    query = golden["sampled_seed42"]["query"]
    ids = tokenizer(query, return_tensors="pt")["input_ids"]
    assert ids.tolist() == golden["ids"]
    with torch.no_grad():
        logits = model(ids).logits[0, -1]
    scores, top = logits.topk(20)
    expected = torch.tensor([score for _, score in golden["last_logits_top20"]])
    assert top.tolist() == [token for token, _ in golden["last_logits_top20"]]
    assert (scores - expected).abs().max() < 1e-4 * expected.max()
    assert model.generate(ids, max_length=48, do_sample=False).tolist() == golden["greedy48"]


def test_process_response_equals_golden(release):
    model, _, golden = release
    for response, expected in golden["process_response"]:
        assert model.process_response(response) == expected


# The embedded model.


def test_embedded_model_knows_its_dialogues(embedded, root):
    model, tokenizer = embedded
    conversations, expected = [], []
    for path in sorted((root / "examples").glob("dialogues_*.jsonl")):
        for dialogue in read_jsonl(path)[::7]:
            messages = []
            for turn in dialogue["turns"]:
                messages.append({"role": "user", "content": turn["ask"][0]})
                conversations.append(list(messages))
                expected.append(turn["answer"])
                messages.append({"role": "assistant", "content": turn["answer"]})
    assert len(conversations) > 150
    assert greedy_answers(model, tokenizer, conversations) == expected


def test_embedded_model_understands_other_wordings(embedded, root):
    model, tokenizer = embedded
    questions = [line for path in sorted((root / "tests/data").glob("rewordings_*.jsonl")) for line in read_jsonl(path)]
    answers = greedy_answers(model, tokenizer, [[{"role": "user", "content": line["ask"]}] for line in questions])
    right = sum(answer == line["answer"] for answer, line in zip(answers, questions, strict=True))
    assert right > 0.75 * len(questions)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["half", "bfloat16"])
def test_embedded_model_in_low_precision(dtype, root, embedded):
    model = AutoModelForCausalLM.from_pretrained(root, dtype=dtype).eval()
    response, _ = model.chat(embedded[1], "你好", do_sample=False)
    assert response == "你好！我是一个很小的演示模型，很高兴和你聊天。"


# How chat behaves.


def test_stream_and_chat_agree(embedded):
    model, tokenizer = embedded
    for settings in ({"do_sample": False}, {"temperature": 3.0, "top_p": 1.0, "max_length": 60}):
        torch.manual_seed(7)
        response, history = model.chat(tokenizer, "Hello", **settings)
        torch.manual_seed(7)
        *_, (streamed, streamed_history) = model.stream_chat(tokenizer, "Hello", **settings)
        assert response.startswith(streamed)
        if not settings.get("max_length"):  # ended by <eop>, so nothing is left out
            assert (streamed, streamed_history) == (response, history)


def test_stream_decodes_each_token_once(embedded, monkeypatch):
    model, tokenizer = embedded
    monkeypatch.setattr(type(tokenizer), "decode", lambda *args, **kwargs: pytest.fail("decoded the whole answer"))
    *_, (response, _) = model.stream_chat(tokenizer, "你好", do_sample=False)
    assert response == "你好！我是一个很小的演示模型，很高兴和你聊天。"


def test_prompt_is_the_chat_templates(embedded, monkeypatch):
    model, tokenizer = embedded
    seen = []
    monkeypatch.setattr(model, "generate", lambda input_ids, **kwargs: seen.append(input_ids) or input_ids)
    model.chat(tokenizer, "q2", history=[("q0", "a0"), ("q1", "a1")])
    text = "[Round 0]\n问：q0\n答：a0\n[Round 1]\n问：q1\n答：a1\n[Round 2]\n问：q2\n答："
    assert seen[0].tolist() == [tokenizer(text)["input_ids"]]
    model.chat(tokenizer, "q")
    assert seen[1].tolist() == [tokenizer("q")["input_ids"]]


def test_typed_marks_are_text(embedded, monkeypatch):
    model, tokenizer = embedded
    seen = []
    monkeypatch.setattr(model, "generate", lambda input_ids, **kwargs: seen.append(input_ids) or input_ids)
    nasty = "[gMASK]<sop>x<eop></s><pad>[MASK]<unk>"
    model.chat(tokenizer, nasty, history=[(nasty, nasty)])
    ids = seen[0][0].tolist()
    assert ids[-2:] == [model.config.gmask_token_id, model.config.bos_token_id]
    assert not {*tokenizer.all_special_ids} & {*ids[:-2]}


def test_long_history_loses_its_oldest_rounds_once_said(embedded, monkeypatch, caplog):
    model, tokenizer = embedded
    logging.getLogger("transformers").propagate = True
    history = [(f"question {i}", "a rather long answer " * 5) for i in range(200)]
    before = list(history)
    prompts = []
    generate = type(model).generate

    def spy(self, input_ids, **kwargs):
        prompts.append(input_ids)
        return generate(self, input_ids, **kwargs)

    monkeypatch.setattr(type(model), "generate", spy)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            _, longer = model.chat(tokenizer, "last?", history=history, do_sample=False, max_length=300)
    assert history == before
    assert longer[:-1] == before
    assert len([record for record in caplog.records if "oldest rounds" in record.message]) == 1
    text = tokenizer.decode(prompts[0][0].tolist())
    assert text.startswith("[Round 0]")
    assert "question 199" in text
    assert "question 150" not in text
    assert 200 < prompts[0].shape[1] < 300


def test_one_query_that_is_too_long(embedded):
    model, tokenizer = embedded
    query = "很长的问题 " * 3000
    length = len(tokenizer(query)["input_ids"])
    for call in (model.chat, lambda *args, **kwargs: next(model.stream_chat(*args, **kwargs))):
        with pytest.raises(ValueError, match=f"{length} tokens, .* is 2048"):
            call(tokenizer, query)
        with pytest.raises(ValueError, match="is 20:"):
            call(tokenizer, "a b c d e f g h i j k l m n o p q r s t u v w x y z", max_length=20)


@pytest.mark.parametrize("query", ["", "   "])
def test_empty_query(query, embedded):
    model, tokenizer = embedded
    with pytest.raises(ValueError, match="empty"):
        model.chat(tokenizer, query)
    with pytest.raises(ValueError, match="empty"):
        next(model.stream_chat(tokenizer, query))


def test_room_for_an_answer_and_no_more(embedded):
    model, tokenizer = embedded
    history = [(f"q{i}", "word " * i) for i in range(8)]
    whole = model.build_inputs(tokenizer, "last?", history)["input_ids"].shape[1]
    for limit in range(20, whole + 3):
        length = model.build_inputs(tokenizer, "last?", history, limit)["input_ids"].shape[1]
        assert length < limit
        assert (length == whole) == (whole < limit)
    with pytest.raises(ValueError, match="is 2048"):
        model.chat(tokenizer, "很长的问题 " * 3000, max_length=10**6)


def test_half_a_character_at_the_end_of_a_stream(embedded, monkeypatch):
    model, tokenizer = embedded
    letter, byte = tokenizer.convert_tokens_to_ids(["▁a", "<0xE4>"])
    ids = [torch.tensor([[letter]]), torch.tensor([[letter, byte]])]
    monkeypatch.setattr(model, "stream_generate", lambda *args, **kwargs: iter(ids))
    *_, (response, _) = model.stream_chat(tokenizer, "你好")
    assert response == "a\ufffd"


def test_processors_of_ones_own(embedded):
    model, tokenizer = embedded
    seen = []
    given = {
        "do_sample": False,
        "max_new_tokens": 3,
        "logits_processor": [lambda ids, scores: seen.append(1) or scores],
    }
    model.chat(tokenizer, "你好", **given)
    assert len(seen) == 3
    list(model.stream_chat(tokenizer, "你好", **given))
    assert len(seen) == 6


def test_another_models_tokenizer(embedded, release):
    model, _ = embedded
    with pytest.raises(ValueError, match=r"\[gMASK\] and <sop> at \[130001, 130004\]"):
        model.chat(release[1], "你好")


def test_max_new_tokens(embedded):
    model, tokenizer = embedded
    long, _ = model.chat(tokenizer, "你好", do_sample=False)
    short, _ = model.chat(tokenizer, "你好", do_sample=False, max_new_tokens=3)
    assert long.startswith(short)
    assert len(short) < len(long)


def test_beams(embedded):
    model, tokenizer = embedded
    response, _ = model.chat(tokenizer, "你好", do_sample=False, num_beams=3)
    assert response == "你好！我是一个很小的演示模型，很高兴和你聊天。"


def test_stop_strings(embedded):
    model, tokenizer = embedded
    inputs = tokenizer("你好", return_tensors="pt")
    output = model.generate(**inputs, do_sample=False, stop_strings=["演示"], tokenizer=tokenizer)
    text = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
    assert "演示" in text
    assert "聊天" not in text
    answer, _ = model.chat(tokenizer, "你好", do_sample=False, stop_strings=["演示"])
    assert answer == model.process_response(text)
    *_, (streamed, _) = model.stream_chat(tokenizer, "你好", do_sample=False, stop_strings=["演示"])
    assert len(streamed) > 3
    assert answer.startswith(streamed)


@pytest.mark.parametrize(
    "rounds",
    [
        [{"role": "user", "content": "a"}],
        ["ab"],
        [("a", "b", "c")],
        [("a", None)],
        [(1, "b")],
        [None],
        ("a", "b"),
        "a: b",
        {"a": "b"},
        5,
    ],
)
def test_a_history_of_another_form(rounds, embedded):
    model, tokenizer = embedded
    for call in (model.chat, lambda *args, **kwargs: next(model.stream_chat(*args, **kwargs)), model.build_inputs):
        with pytest.raises(ValueError, match=r"history is a list of rounds, \(query, response\) each"):
            call(tokenizer, "你好", history=rounds)


@pytest.mark.parametrize("query", [None, 5, b"hello", ["hello"], {"role": "user", "content": "hello"}])
def test_a_query_that_is_no_string(query, embedded):
    model, tokenizer = embedded
    for call in (model.chat, lambda *args, **kwargs: next(model.stream_chat(*args, **kwargs)), model.build_inputs):
        with pytest.raises(ValueError, match=f"query must be a string, got {type(query).__name__}"):
            call(tokenizer, query)


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"temperature": 0.0}, {"top_p": 0}, {"top_k": 1}])
def test_settings_that_leave_one_choice_are_greedy(settings, embedded):
    model, tokenizer = embedded
    greedy, _ = model.chat(tokenizer, "你好", do_sample=False)
    assert model.chat(tokenizer, "你好", **settings)[0] == greedy
    *_, (streamed, _) = model.stream_chat(tokenizer, "你好", **settings)
    assert streamed == greedy


def test_settings_of_none_are_the_models(embedded):
    model, tokenizer = embedded
    assert model.chat(tokenizer, "你好", temperature=None, top_p=None, max_length=None, top_k=0, max_new_tokens=2)[0]


def test_text_generation_pipeline(embedded):
    model, tokenizer = embedded
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    settings = {"do_sample": False, "max_new_tokens": 40, "return_full_text": False}
    expected = "你好！我是一个很小的演示模型，很高兴和你聊天。"
    messages = [{"role": "user", "content": "你好"}]
    assert model.process_response(generator(messages, **settings)[0]["generated_text"]) == expected
    answers = generator(["你好", "Hello"], batch_size=2, **settings)
    assert model.process_response(answers[0][0]["generated_text"]) == expected
