"""chatglm finetune and chatglm merge."""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from chatglm_int8 import ChatGLMConfig, ChatGLMForConditionalGeneration, ChatGLMTokenizer, checkpoint
from chatglm_int8.apps import cli, lora_adapter
from chatglm_int8.apps.finetuning import tune as tuning
from chatglm_int8.apps.finetuning.examples import Collator, most_rounds, read_examples
from chatglm_int8.apps.finetuning.model import build_model
from chatglm_int8.apps.finetuning.resume import last_complete
from chatglm_int8.apps.finetuning.scores import answer_scores, predict
from chatglm_int8.apps.finetuning.settings import Settings, settings_of
from chatglm_int8.apps.finetuning.trainer import training_arguments
from chatglm_int8.apps.lora_adapter import Lora
from chatglm_int8.apps.rewrite_folder import export_prefix, rewrite_folder

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import make_checkpoint  # noqa: E402

DIALOGUES = ROOT / "examples" / "new_dialogues.jsonl"
PROGRAM = ["-m", "chatglm_int8.apps.finetune"]
needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs peft")


@pytest.fixture(scope="session")
def tokenizer(root) -> ChatGLMTokenizer:
    return ChatGLMTokenizer.from_pretrained(root)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """Two blocks of random INT8 weights, with the embedded vocabulary."""
    return make_tiny(tmp_path_factory.mktemp("tiny"), 8)


@pytest.fixture(scope="session")
def tiny_float(tmp_path_factory) -> Path:
    """The same with float weights."""
    return make_tiny(tmp_path_factory.mktemp("tiny_float"), 0)


def make_tiny(folder: Path, bits: int) -> Path:
    ids = {"bos_token_id": 2660, "eos_token_id": 2661, "mask_token_id": 2656, "gmask_token_id": 2657}
    config = ChatGLMConfig(
        vocab_size=3008, hidden_size=32, num_layers=2, num_attention_heads=2, quantization_bit=bits, **ids
    )
    make_checkpoint.write_checkpoint(folder, config, seed=3, vocabulary=ROOT / "ice_text.model", progress=False)
    return folder


def settings(**fields) -> Settings:
    return Settings(**{"train_file": "", "method": "lora", **fields})


def tune(*arguments) -> None:
    """Run the program in this process."""
    assert cli.main(["finetune", *map(str, arguments), "--use-cpu", "true"]) == 0


def refused(capsys, *arguments) -> str:
    """What the program says before it ends with code 1."""
    assert cli.main(["finetune", *map(str, arguments), "--use-cpu", "true"]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("chatglm finetune: ")]
    return line


def first_dialogues(path: Path, count: int) -> Path:
    lines = DIALOGUES.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(lines[:count]), encoding="utf-8")
    return path


def count_right(model, tokenizer, path: Path) -> int:
    """How many of a file's dialogues `chat` ends as they do, greedily."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    answers = [
        model.chat(tokenizer, row["prompt"], row.get("history"), do_sample=False, max_new_tokens=64)[0] for row in rows
    ]
    return sum(answer == row["response"] for answer, row in zip(answers, rows, strict=True))


# Data


@pytest.mark.parametrize("history", [None, [["问1", "答1"], ["q 2", "a 2"]]], ids=["alone", "history"])
@pytest.mark.parametrize("form", ["adgen", "chat", "list"])
def test_examples_are_what_chat_asks_and_the_answer(form, history, tokenizer, tmp_path):
    row = {"content": "你好\u2028<sop>", "summary": "我很好。"}
    names = {"prompt_column": "content", "response_column": "summary"}
    if form == "chat":
        row, names = {"prompt": row["content"], "response": row["summary"]}, {}
    row["rounds" if form == "list" else "history"] = history
    names |= {"history_column": "rounds"} if form == "list" else {}
    text = json.dumps([row, row] if form == "list" else row, ensure_ascii=False)
    path = tmp_path / "data.json"
    path.write_text("\ufeff" + (text if form == "list" else f"{text}\n\n{text}"), encoding="utf-8")
    examples = read_examples(path, tokenizer, settings(**names), quiet=True)
    model = ChatGLMForConditionalGeneration.from_pretrained(ROOT)
    prompt = model.build_inputs(tokenizer, "你好\u2028<sop>", history)["input_ids"][0].tolist()
    answer = tokenizer.encode("我很好。", add_special_tokens=False)
    assert [example["input_ids"] for example in examples] == [[*prompt, *answer, tokenizer.eos_token_id]] * 2


def test_loss_is_on_the_answer_alone(tokenizer):
    sop, pad = tokenizer.bos_token_id, tokenizer.pad_token_id
    batch = Collator(tokenizer)([{"input_ids": [7, 8, sop, 9, 10]}, {"input_ids": [7, sop, 11]}])
    assert batch["input_ids"].tolist() == [[7, 8, sop, 9, 10], [pad, pad, 7, sop, 11]]
    assert batch["labels"].tolist() == [[-100, -100, -100, 9, 10], [-100] * 4 + [11]]
    assert batch["attention_mask"].tolist() == [[1] * 5, [0, 0, 1, 1, 1]]


GOOD = '{"prompt": "a", "response": "b"}\n'


@pytest.mark.parametrize(
    ("data", "names", "message"),
    [
        (GOOD + "{'prompt'", {}, r"line 2 is not JSON.*\{'prompt'"),
        (GOOD.encode() + b'{"prompt": "\xff"}', {}, "line 2 is not JSON in UTF-8"),
        (GOOD + "\n7", {}, "line 3: expected an object with columns, got 7"),
        ('[{"prompt": "a", "response": "b"}, 7]', {}, "item 2: expected an object"),
        ("[1, ", {}, "begins like a JSON list, but is none"),
        ('{"content": "a", "summary": "b"}', {}, "line 1 has no column 'prompt'; its columns are 'content', 'summary'"),
        (GOOD, {"history_column": "rounds"}, "line 1 has no column 'rounds'"),
        (GOOD + '{"prompt": "a", "response": " \\n"}', {}, "line 2: the column 'response' is empty"),
        (GOOD + '{"prompt": "a", "response": "\\u200b"}', {}, "line 2: the column 'response' has no text"),
        (GOOD + '{"prompt": "\\u200b", "response": "a"}', {}, "line 2: the column 'prompt' has no text"),
        (GOOD + '{"prompt": "\\ud83d", "response": "a"}', {}, r"line 2 holds half a character, '.ud83d'"),
        (GOOD + "[" * 200000, {}, "line 2 is not JSON"),
        ('{"prompt": null, "response": "b"}', {}, "line 1: the column 'prompt' is empty"),
        ('{"prompt": ["a"], "response": "b"}', {}, r"line 1: the column 'prompt' is no text: \['a'\]"),
        ('{"prompt": "a", "response": "b", "history": [["a"]]}', {}, r"line 1: expected 'history' .* got \['a'\]"),
        ('{"prompt": "a", "response": "b", "history": "a"}', {}, "line 1: expected 'history' .* got 'a'"),
        ("", {}, "has no dialogue"),
    ],
)
def test_bad_data(data, names, message, tokenizer, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    with pytest.raises(ValueError, match=message) as caught:
        read_examples(path, tokenizer, settings(**names), quiet=True)
    assert str(path) in str(caught.value)


def test_long_dialogues(tokenizer, tmp_path, capsys):
    """The oldest rounds go first; what is too long without any goes altogether; both are counted and said."""
    rounds = [["first", "one"], ["second", "two"]]
    rows = [
        {"prompt": "hi", "response": "ho"},
        {"prompt": "hi", "response": "ho", "history": rounds},
        {"prompt": "hi", "response": "x" * 200},
    ]
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    whole = read_examples(path, tokenizer, settings(), quiet=True)
    limit = len(whole[1]["input_ids"]) - 1
    examples = read_examples(path, tokenizer, settings(max_length=limit))
    rows[1]["history"] = rounds[1:]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert examples == read_examples(path, tokenizer, settings(), quiet=True)[:2]
    printed = capsys.readouterr().out
    assert "2 dialogues" in printed
    assert f"1 with more than --max-length = {limit} tokens were cut to their last rounds" in printed
    assert "were left out, the first: " + str(path) + ", line 3" in printed


ALPACA = {"prompt_column": "instruction", "response_column": "output"}
TALK = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
    {"role": "assistant", "content": "d"},
]
TALK_ROWS = [
    {"prompt": "a", "response": "b"},
    {"prompt": "c", "response": "d", "history": [["a", "b"]]},
]
SHARE = [
    {"from": {"user": "human", "assistant": "gpt"}[message["role"]], "value": message["content"]} for message in TALK
]


def ids_of(rows: list[dict], tokenizer, folder: Path, **names) -> list[list[int]]:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return [example["input_ids"] for example in read_examples(path, tokenizer, settings(**names))]


@pytest.mark.parametrize(
    ("row", "names", "same"),
    [
        ({"instruction": "a", "input": "b", "output": "c"}, ALPACA, [{"prompt": "a\nb", "response": "c"}]),
        ({"instruction": "a", "input": "", "output": "c"}, ALPACA, [{"prompt": "a", "response": "c"}]),
        ({"instruction": "a", "input": None, "output": "c", "id": None}, ALPACA, [{"prompt": "a", "response": "c"}]),
        ({"prompt": "a", "input": "b", "response": "c"}, {}, [{"prompt": "a\nb", "response": "c"}]),
        (
            {"prompt": "a", "text": "b", "response": "c"},
            {"input_column": "text"},
            [{"prompt": "a\nb", "response": "c"}],
        ),
        (
            {"input": "a", "system": "b"},
            {"prompt_column": "input", "response_column": "system"},
            [{"prompt": "a", "response": "b"}],
        ),
        ({"messages": TALK}, {}, TALK_ROWS),
        ({"conversations": SHARE}, {}, TALK_ROWS),
        ({"talk": SHARE}, {"messages_column": "talk"}, TALK_ROWS),
        (
            {"messages": [{"role": "system", "content": "s"}, *TALK]},
            {},
            [{**row, "system": "s"} for row in TALK_ROWS],
        ),
        ({"conversations": SHARE, "system": "s"}, {}, [{**row, "system": "s"} for row in TALK_ROWS]),
        (
            {"prompt": "a", "response": "b", "instructions": "s"},
            {"system_column": "instructions"},
            [{"prompt": "a", "response": "b", "system": "s"}],
        ),
    ],
)
def test_forms_of_public_data(row, names, same, tokenizer, tmp_path, capsys):
    assert ids_of([row], tokenizer, tmp_path, **names) == ids_of(same, tokenizer, tmp_path)
    assert not re.search("WARNING", capsys.readouterr().err)


def test_system_texts_stand_before_the_first_round(tokenizer, tmp_path):
    (ids,) = ids_of([{"prompt": "hi", "response": "ho", "system": "be kind"}], tokenizer, tmp_path)
    messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids[: len(prompt)] == prompt


@pytest.mark.parametrize(
    ("row", "unused"),
    [
        ({"prompt": "a", "response": "b", "context": "c", "id": "", "tags": []}, ["context"]),
        ({"prompt": "a", "response": "b", "histroy": [["x", "y"]]}, ["histroy"]),
        ({"messages": TALK, "tools": "[]"}, ["tools"]),
        ({"messages": [*TALK, TALK[0]]}, ["messages: messages after the last answer"]),
        ({"messages": [{**TALK[0], "weight": 2}, TALK[1]]}, ["messages: weight"]),
    ],
)
def test_what_is_not_learnt_is_said(row, unused, tokenizer, tmp_path, capsys):
    ids_of([row, row, {"prompt": "a", "response": "b"}], tokenizer, tmp_path)
    (line,) = capsys.readouterr().err.splitlines()  # and no progress bar, since this is no terminal
    assert f"not learnt: {', '.join(f'{name!r} (2 times)' for name in unused)}. --prompt-column" in line


@pytest.mark.parametrize(
    ("row", "names", "message"),
    [
        ({"messages": []}, {}, "line 1: 'messages' has no answer"),
        ({"messages": TALK[:1]}, {}, "line 1: 'messages' has no answer"),
        ({"messages": "hi"}, {}, "line 1: expected 'messages' to hold messages"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, {}, "to hold messages with a role"),
        ({"messages": [{"role": "tool", "content": "x"}]}, {}, 'with a role .*got {"role": "tool"'),
        ({"messages": [TALK[0], {"role": "assistant", "content": None}]}, {}, "and a text, got"),
        ({"prompt": "a", "response": "b"}, {"messages_column": "talk"}, "line 1 has no column 'talk'"),
        ({"prompt": "a", "response": "b"}, {"input_column": "text"}, "line 1 has no column 'text'"),
        ({"prompt": "a", "response": "b", "input": 7}, {}, "the column 'input' is no text: 7"),
        ({"prompt": "a", "response": "b", "system": ["s"]}, {}, "the column 'system' is no text"),
    ],
)
def test_bad_conversations(row, names, message, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=message):
        ids_of([row], tokenizer, tmp_path, **names)


def test_most_rounds():
    """As many as if each number were tried, for a few times as many ids as the limit has, however long the history."""
    for available in range(1, 40):
        for limit in range(0, 130, 7):
            expected = max([1, *(rounds for rounds in range(1, available + 1) if 3 * rounds <= limit)])
            assert most_rounds(lambda rounds: [0] * (3 * rounds), available, limit) == (expected, [0] * (3 * expected))
    made = []

    def encode(rounds: int) -> list[int]:
        made.append(10 * rounds)
        return [0] * made[-1]

    assert most_rounds(encode, 100_000, 1024)[0] == 102
    assert sum(made) < 10 * 1024


# What is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "full"], "holds INT8 weights, which --method full can't train.*dequantize"),
        (["--method", "lora", "--max-length", "4096"], "max-length is 4096, but the model reads 2048"),
        (["--method", "lora", "--model", "nowhere"], "nowhere"),
        (["--method", "lora", "--do-predict"], "validation-file: give one"),
        (["--method", "lora", "--eval-strategy", "steps"], "validation-file: give one"),
        (["--method", "lora", "--resume-from-checkpoint", "nowhere"], "names no folder: nowhere"),
        (["--method", "ptuning", "--pre-seq-len", "0"], "pre-seq-len is 0"),
        (["--method", "lora", "--train-file", "nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_refused_arguments(arguments, message, tiny, tmp_path, capsys):
    given = ["--model", tiny, "--train-file", DIALOGUES, "--output-dir", tmp_path, "--seed", 1, *arguments]
    assert re.search(message, refused(capsys, *given))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: --train-file, --method"),
        (["--train-file", "a"], "the following arguments are required: --method"),
        (["--train-file", "a", "--method", "qlora"], "argument --method: invalid choice: 'qlora'"),
        (["--train-file", "a", "--method", "lora", "--learning-rat", "1"], "unrecognized arguments: --learning-rat 1"),
        (["--train-file", "a", "--method", "lora", "data.jsonl"], "unrecognized arguments: data.jsonl"),
        (["--train-file", "a", "--method", "lora", "--learning-rate", "x"], "argument --learning.rate.*'x'"),
        (["--train-file", "a", "--method", "lora", "--lora-rank", "x"], "argument --lora-rank: invalid int value: 'x'"),
    ],
)
def test_wrong_arguments(arguments, message, capsys):
    """A short usage, the line that says what is wrong, and code 2."""
    with pytest.raises(SystemExit) as end:
        cli.main(["finetune", *arguments])
    assert end.value.code == 2
    *usage, line = capsys.readouterr().err.splitlines()
    assert re.match(f"chatglm finetune: error: {message}", line)
    assert len(usage) < 40


def test_spellings_and_defaults_of_training_arguments(tmp_path):
    given = ["--method", "ptuning", "--train_file", "a", "--prefix_projection", "--max_steps", "3"]
    _, parsed = cli.parse(["finetune", *given, "--output_dir", str(tmp_path), "--use_cpu"])
    assert settings_of(parsed) == Settings("a", "ptuning", prefix_projection=True)
    training = training_arguments(parsed.other_options, parsed.method, pytest.fail)
    assert (training.max_steps, training.learning_rate, training.output_dir) == (3, 2e-2, str(tmp_path))
    assert training.disable_tqdm, "a progress bar in a log file"


def test_help_of_training_arguments(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["finetune", "--help-training"])
    assert not end.value.code
    assert "--gradient-checkpointing" in capsys.readouterr().out


@needs_peft
@pytest.mark.parametrize("half", [[], ["--bf16"]])
def test_frozen_weights_are_half_with_bf16(half, tiny, tmp_path):
    given = ["--method", "lora", "--model", tiny, "--train-file", DIALOGUES, "--output-dir", tmp_path, *half]
    _, parsed = cli.parse(["finetune", *map(str, given), "--use-cpu", "true"])
    training = training_arguments(parsed.other_options, parsed.method, parsed.refuse)
    assert training.learning_rate == 1e-3
    model = build_model(settings_of(parsed), training)
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert {dtype for name, dtype in dtypes.items() if "lora_" in name} == {torch.float32}
    expected = torch.bfloat16 if half else torch.float32
    assert {dtype for name, dtype in dtypes.items() if "layernorm" in name} == {expected}


def test_full_tuning_beside_a_prefix_is_refused(tiny_float, tmp_path, capsys):
    """Only the prefix would be trained, and saved."""
    config = ChatGLMConfig.from_pretrained(tiny_float, pre_seq_len=4)
    model = ChatGLMForConditionalGeneration.from_pretrained(tiny_float, config=config)
    model.save_pretrained(tmp_path / "with")
    for name in ("ice_text.model", "tokenizer_config.json"):
        shutil.copyfile(tiny_float / name, tmp_path / "with" / name)
    given = ["--method", "full", "--model", tmp_path / "with", "--train-file", DIALOGUES]
    assert "holds a P-Tuning v2 prefix" in refused(capsys, *given, "--output-dir", tmp_path / "out")


def test_processes_that_would_train_alone_are_refused(tiny, tmp_path, monkeypatch, capsys):
    """accelerate connects processes without GPUs only if told so."""
    monkeypatch.setattr(tuning, "PROCESSES", 2)
    given = ["--method", "lora", "--model", tiny, "--train-file", DIALOGUES, "--output-dir", tmp_path]
    assert re.search("2 processes, but no GPUs.*--use-cpu true", refused(capsys, *given))


# Learning


@needs_peft
@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        ("lora", ["--num-train-epochs", 16, "--learning-rate", 5e-3]),
        ("ptuning", ["--num-train-epochs", 45, "--learning-rate", 0.2, "--pre-seq-len", 64]),
    ],
)
def test_a_few_dialogues_are_learnt(method, arguments, tokenizer, tmp_path):
    """And the INT8 weights stay as they are; merged or put in, the answers are the same."""
    data = first_dialogues(tmp_path / "data.jsonl", 2)
    tuned = tmp_path / "tuned"
    tune(
        *("--method", method, "--train-file", data, "--output-dir", tuned, "--save-strategy", "no"),
        *("--per-device-train-batch-size", 2, "--lora-dropout", 0, "--validation-file", data, "--do-predict"),
        *("--adam-beta2", 0.98, *arguments),
    )
    assert json.loads((tuned / "eval_results.json").read_text())["exact"] == 100
    rows = [json.loads(line) for line in (tuned / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    assert all(row["predicted"] == row["response"] for row in rows)

    new = tmp_path / "new"
    if method == "lora":
        rewrite_folder(ROOT, new, lora=Lora(tuned), progress=False)
    else:
        assert all("prefix_encoder" in name for name in load_file(tuned / "model.safetensors"))
        rewrite_folder(ROOT, new, prefix=checkpoint.read_prefix(tuned), progress=False)
    model = AutoModel.from_pretrained(new).eval()
    assert model.config.quantization_bit == 8
    assert count_right(model, tokenizer, data) == 2
    before = AutoModel.from_pretrained(ROOT).eval()
    assert count_right(before, tokenizer, data) == 0


@pytest.mark.slow
@needs_peft
@pytest.mark.parametrize("method", ["lora", "ptuning"])
def test_fifty_dialogues_are_learnt_word_for_word(method, tokenizer, tmp_path):
    """And after a merge into INT8 at least 49 of the answers are the same."""
    arguments = LEARN_FIFTY[method]
    tuned, new = tmp_path / "tuned", tmp_path / "new"
    torch.set_num_threads(2)
    try:
        tune("--method", method, "--train-file", DIALOGUES, "--output-dir", tuned, *arguments)
    finally:
        torch.set_num_threads(1)
    if method == "lora":
        import peft

        model = peft.PeftModel.from_pretrained(AutoModel.from_pretrained(ROOT, dtype=torch.float32), tuned)
        model = model.get_base_model().eval()
        rewrite_folder(ROOT, new, lora=Lora(tuned), progress=False)
    else:
        model = AutoModel.from_pretrained(ROOT, dtype=torch.float32).load_prefix(tuned).eval()
        rewrite_folder(ROOT, new, prefix=checkpoint.read_prefix(tuned), progress=False)
    assert count_right(model, tokenizer, DIALOGUES) == 50
    assert count_right(AutoModel.from_pretrained(new).eval(), tokenizer, DIALOGUES) >= 49


# Adam's short memory suits the few steps; the targets are all of the blocks' linears.
LEARN_FIFTY = {
    "lora": [
        *("--num-train-epochs", 20, "--learning-rate", 4e-3, "--per-device-train-batch-size", 5, "--max-grad-norm", 10),
        *("--adam-beta2", 0.98, "--lora-dropout", 0, "--save-strategy", "no"),
        *("--lora-targets", "query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
    ],
    "ptuning": [
        *("--num-train-epochs", 36, "--learning-rate", 0.15, "--per-device-train-batch-size", 5, "--pre-seq-len", 64),
        *("--adam-beta2", 0.98, "--save-strategy", "no"),
    ],
}


@needs_peft
@pytest.mark.parametrize("how", [["--label-smoothing-factor", 1e-9], ["--gradient-checkpointing"]])
def test_smoothing_and_checkpointing_change_no_loss(how, tiny, tmp_path):
    """Trainer shifts the labels itself when it smooths them, but only for models that it knows."""
    given = ["--method", "lora", "--model", tiny, "--train-file", DIALOGUES, "--lora-dropout", 0, "--max-steps", 2]
    for name, more in (("plain", []), ("other", how)):
        tune(*given, "--logging-steps", 1, *more, "--output-dir", tmp_path / name)
    expected = [loss for _, loss in losses(tmp_path / "plain")]
    assert [loss for _, loss in losses(tmp_path / "other")] == pytest.approx(expected, rel=1e-4)


def test_a_response_is_expected_as_the_model_can_give_it(tokenizer, tmp_path, monkeypatch):
    """Tokenizer and `process_response` change characters, of which a right answer would seem wrong."""
    row = {"prompt": "几点开门", "response": "（八点）…周一,休息"}
    (tmp_path / "data.jsonl").write_text(json.dumps(row), encoding="utf-8")
    examples = read_examples(tmp_path / "data.jsonl", tokenizer, settings(), quiet=True)
    model = ChatGLMForConditionalGeneration.from_pretrained(ROOT).eval()
    ids = torch.tensor([examples[0]["input_ids"]])
    monkeypatch.setattr(model, "generate", lambda **given: ids)
    arguments = types.SimpleNamespace(per_device_eval_batch_size=1, process_index=0, world_size=1)
    accelerator = types.SimpleNamespace(unwrap_model=lambda model: model)
    trainer = types.SimpleNamespace(args=arguments, accelerator=accelerator, model=model)
    (row,) = predict(trainer, tokenizer, examples, 10)
    assert row["response"] == "（八点）…周一,休息"
    assert row["predicted"] == row["expected"] == "(八点)...周一，休息"


def test_scores_of_answers():
    """Identical answers have all of everything, an empty one nothing, and the means are over both."""
    for package in ("jieba", "rouge_chinese", "nltk"):
        pytest.importorskip(package, reason="needs the packages of the extra train")
    same = {"expected": "今天天气很好，我们去公园。", "predicted": "今天天气很好，我们去公园。"}
    nothing = {**same, "predicted": ""}
    names = {"exact", "bleu-4", "rouge-1", "rouge-2", "rouge-l"}
    assert answer_scores([same]) == pytest.approx(dict.fromkeys(names, 100.0), abs=0.01)
    assert answer_scores([same, nothing]) == pytest.approx(dict.fromkeys(names, 50.0), abs=0.01)
    half = {**same, "predicted": "今天天气很好。"}
    scores = answer_scores([half])
    assert scores["exact"] == 0
    assert all(10 < scores[name] < 90 for name in names - {"exact"})


def test_scores_without_the_packages(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "jieba", None)
    assert answer_scores([{"expected": "a", "predicted": "a"}]) == {"exact": 100}
    assert "pip install jieba rouge_chinese nltk" in capsys.readouterr().out


# Stopping and going on


def losses(folder: Path) -> list[tuple[int, float]]:
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [(entry["step"], entry["loss"]) for entry in log if "loss" in entry]


RUN = ["--max-steps", 12, "--save-steps", 4, "--logging-steps", 1, "--per-device-train-batch-size", 3, "--seed", 5]


WAITING = """
import time

from chatglm_int8.apps import cli
from chatglm_int8.apps.finetuning.trainer import FineTuner

step = FineTuner.training_step


def step_until_the_seventh(self, *args, **kwargs):
    if self.state.global_step == 6:
        time.sleep(1000)
    return step(self, *args, **kwargs)


FineTuner.training_step = step_until_the_seventh
cli.main()
"""


@needs_peft
@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        ("lora", ["--learning-rate", 1e-2]),
        ("ptuning", ["--pre-seq-len", 4]),
        pytest.param("full", ["--learning-rate", 1e-3], marks=pytest.mark.slow),
    ],
)
def test_killed_and_resumed(method, arguments, tiny, tiny_float, tmp_path, capfd):
    """The losses, with dropout, are those of a run that was let be. It waits for the kill, so as not to end before."""
    model = tiny_float if method == "full" else tiny
    common = ["--method", method, "--model", model, "--train-file", DIALOGUES, *RUN, *arguments]
    tune(*common, "--output-dir", tmp_path / "whole")
    killed = tmp_path / "killed"
    command = [sys.executable, "-c", WAITING, "finetune", *map(str, common), "--output-dir", killed]
    command += ["--use-cpu", "true"]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    end = time.monotonic() + 300
    while not (killed / "checkpoint-4" / "trainer_state.json").exists():
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "trainer_state.json").exists()
    capfd.readouterr()
    tune(*common, "--output-dir", killed)
    assert "going on from" in capfd.readouterr().out
    assert len(losses(killed)) == 12
    assert losses(killed) == losses(tmp_path / "whole")


@needs_peft
def test_incomplete_checkpoints_are_passed_over(tiny, tmp_path):
    out = tmp_path / "out"
    arguments = ["--method", "lora", "--model", tiny, "--train-file", DIALOGUES, *RUN, "--output-dir", out]
    tune(*arguments, "--save-total-limit", 5)
    assert last_complete(out) == out / "checkpoint-12"
    (out / "checkpoint-12" / "trainer_state.json").unlink()
    assert last_complete(out) == out / "checkpoint-8"
    for name in ("adapter_model.safetensors", "optimizer.pt"):
        damaged = out / "checkpoint-8" / name
        whole = damaged.read_bytes()
        damaged.write_bytes(whole[:500])
        assert last_complete(out) == out / "checkpoint-4"
        damaged.write_bytes(whole)
    assert last_complete(out) == out / "checkpoint-8"
    random_state = out / "checkpoint-8" / "rng_state.pth"
    random_state.write_bytes(random_state.read_bytes()[:-100])
    assert last_complete(out) == out / "checkpoint-4"
    state = out / "checkpoint-4" / "trainer_state.json"
    for wrong in (state.read_text()[:-3], "[]"):
        state.write_text(wrong)
        assert last_complete(out) is None
    assert last_complete(tmp_path / "nowhere") is None


@needs_peft
def test_a_run_that_is_done_stays_as_it_is(tiny, tmp_path):
    """It ended between two epochs' ends; stopped before the adapter was written, it writes the same again."""
    out = tmp_path / "out"
    arguments = ["--method", "lora", "--model", tiny, "--train-file", DIALOGUES, *RUN, "--output-dir", out]
    tune(*arguments)
    before = losses(out)
    adapter = out / "adapter_model.safetensors"
    weights = adapter.read_bytes()
    adapter.unlink()
    tune(*arguments)
    assert losses(out) == before
    assert adapter.read_bytes() == weights
    assert last_complete(out) == out / "checkpoint-12"


@needs_peft
def test_another_run_is_not_continued(tiny, tmp_path, capsys):
    out, other = tmp_path / "out", first_dialogues(tmp_path / "data.jsonl", 20)
    arguments = ["--method", "lora", "--model", tiny, "--train-file", DIALOGUES, *RUN, "--output-dir", out]
    tune(*arguments)
    for given, changed in (
        (["--lora-rank", 4], "lora_rank was 8, is 4"),
        (["--learning-rate", 1e-5], "learning_rate was 0.001, is 1e-05"),
        (["--train-file", other], "train_file's CRC was"),
    ):
        assert re.search(rf"another run .{changed}.*give another --output-dir", refused(capsys, *arguments, *given))


@needs_peft
def test_the_plot_and_life_without_it(tiny, tmp_path, monkeypatch, capfd):
    arguments = ["--method", "lora", "--model", tiny, "--train-file", DIALOGUES, *RUN, "--validation-file", DIALOGUES]
    arguments += ["--eval-strategy", "steps", "--eval-steps", 6]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib.figure", None)
        tune(*arguments, "--output-dir", tmp_path / "without")
    assert capfd.readouterr().out.count("pip install matplotlib") == 1
    assert not (tmp_path / "without" / "loss.png").exists()
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    tune(*arguments, "--output-dir", tmp_path / "with")
    assert (tmp_path / "with" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert losses(tmp_path / "with") == losses(tmp_path / "without")


# Several processes


def launch(config: str, arguments: list, script: list = PROGRAM, more: list = ("--use-cpu", "true")) -> str:
    """Run the program by `accelerate launch` in two processes on CPUs; returns what it printed."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--main_process_port", "0"]
    command += ["--config_file", str(ROOT / "examples" / "accelerate" / config), "--mixed_precision", "no"]
    command += [*map(str, [*script, *arguments]), "--ddp-backend", "gloo", *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, timeout=500)
    assert done.returncode == 0, done.stderr.decode()[-10000:]
    return done.stdout.decode()


@needs_peft
@pytest.mark.parametrize("method", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_two_processes_have_the_losses_of_one(method, tiny, tiny_float, tmp_path):
    """And write what one process goes on from."""
    model = tiny_float if method == "full" else tiny
    arguments = ["--method", method, "--model", model, "--train-file", DIALOGUES, "--lora-dropout", 0]
    arguments += ["--learning-rate", 1e-2, "--logging-steps", 1, "--save-steps", 3, "--lr-scheduler-type", "constant"]
    tune(*arguments, "--max-steps", 8, "--per-device-train-batch-size", 4, "--output-dir", tmp_path / "one")
    two = ["--output-dir", tmp_path / "two"]
    launch("ddp.yaml", [*arguments, *two, "--max-steps", 6, "--per-device-train-batch-size", 2])
    expected, got = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert [step for step, _ in got] == [1, 2, 3, 4, 5, 6]
    assert [loss for _, loss in got] == pytest.approx([loss for _, loss in expected[:6]], rel=1e-4)
    last = last_complete(tmp_path / "two")
    assert len(list(last.glob("rng_state_*.pth"))) == 2
    tune(
        *(*arguments, *two, "--max-steps", 8, "--per-device-train-batch-size", 4, "--resume-from-checkpoint", last),
    )
    assert [loss for _, loss in losses(tmp_path / "two")] == pytest.approx([loss for _, loss in expected], rel=1e-4)


AS_IF_ON_GPUS = """
import sys

from accelerate import PartialState
from accelerate.utils import DistributedType

begin = PartialState.__init__


def begin_as_if_on_gpus(self, *args, **kwargs):
    begin(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self._shared_state["distributed_type"] = DistributedType.MULTI_GPU


PartialState.__init__ = begin_as_if_on_gpus
from chatglm_int8.apps import cli

cli.main(["finetune", *sys.argv[1:]])
"""


@pytest.mark.parametrize(
    "config", ["fsdp", pytest.param("zero2", marks=pytest.mark.slow), pytest.param("zero3", marks=pytest.mark.slow)]
)
def test_sharded_runs_are_those_of_one_process(config, tiny_float, tmp_path):
    """In their losses, after a stop too, and in the files that they leave. On CPUs, with float32 for DeepSpeed.

    accelerate has FSDP for processes on GPUs alone: it is told that these are some. It has DeepSpeed where it is not
    told to use CPUs, and finds nothing else.
    """
    arguments = ["--method", "full", "--model", tiny_float, "--train-file", DIALOGUES, "--learning-rate", 1e-2]
    arguments += ["--logging-steps", 1, "--save-steps", 3, "--lr-scheduler-type", "constant"]
    one, two = tmp_path / "one", tmp_path / "two"
    tune(*arguments, "--max-steps", 6, "--per-device-train-batch-size", 4, "--output-dir", one)
    arguments += ["--per-device-train-batch-size", 2, "--output-dir", two]
    how = {"more": []}
    if config == "fsdp":
        how = {"script": [tmp_path / "as_if_on_gpus.py"]}
        how["script"][0].write_text(AS_IF_ON_GPUS)
    elif importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs deepspeed")
    printed = launch(f"{config}.yaml", [*arguments, "--max-steps", 3], **how)
    weights = load_file(one / "model.safetensors")
    assert f"full: {sum(weight.numel() for weight in weights.values()):,} numbers are trained" in printed
    printed = launch(f"{config}.yaml", [*arguments, "--max-steps", 6], **how)
    assert f"going on from {two / 'checkpoint-3'}" in printed
    sharded = "pytorch_model_fsdp*" if config == "fsdp" else "global_step6/zero_*"
    assert list((two / "checkpoint-6").glob(sharded)), "it was not sharded"
    assert [step for step, _ in losses(two)] == [1, 2, 3, 4, 5, 6]
    assert [loss for _, loss in losses(two)] == pytest.approx([loss for _, loss in losses(one)], rel=1e-4)

    assert {path.name for path in one.iterdir()} == {path.name for path in two.iterdir()}
    assert json.loads((one / "config.json").read_text()) == json.loads((two / "config.json").read_text())
    got = load_file(two / "model.safetensors")
    assert got.keys() == weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(got[name], weight, rtol=1e-3, atol=1e-3, msg=name)


SHARDED = """if True:
    import os
    import sys
    import torch
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    from chatglm_int8 import ChatGLMForConditionalGeneration

    dist.init_process_group("gloo")
    ids = torch.tensor([[7, 8, 2657, 2660, 9, 10, 11], [70, 80, 2657, 2660, 90, 100, 2661]])
    labels = ids.clone()
    labels[:, :4] = -100
    losses = {}
    for sharded in (False, True):
        model = ChatGLMForConditionalGeneration.from_pretrained(sys.argv[1], dtype=torch.float32).train()
        rows = slice(None)
        if sharded:
            for block in model.transformer.layers:
                fully_shard(block)
            fully_shard(model)
            assert hasattr(model.lm_head.weight, "to_local")  # a DTensor
            assert model.lm_head.weight is model.transformer.word_embeddings.weight
            rows = slice(dist.get_rank(), dist.get_rank() + 1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses[sharded] = []
        for _ in range(4):
            loss = model(ids[rows], labels=labels[rows], use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            mean = loss.detach().clone()
            if sharded:
                dist.all_reduce(mean)
                mean /= 2
            losses[sharded].append(mean.item())
    torch.testing.assert_close(torch.tensor(losses[True]), torch.tensor(losses[False]), rtol=1e-4, atol=0)
    assert losses[True][-1] < losses[True][0] - 0.1
    dist.destroy_process_group()
    # DTensor's caches still hold the group, whose threads let go of tensors some time after a collective is done. That
    # takes the interpreter's lock: asked for while the interpreter shuts down, it ends the thread, and so the process.
    os._exit(0)
"""


def test_sharded_weights_have_the_losses_of_whole_ones(tiny_float, tmp_path):
    """FSDP's `fully_shard` over blocks, embedding and head, in two processes. Without Trainer."""
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, script, tiny_float], env=environment, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr.decode()[-10000:]


@pytest.mark.parametrize("path", sorted((ROOT / "examples" / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_configurations_are_understood(path):
    """accelerate reads each without a complaint about unknown keys, and names the block that exists."""
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.num_processes == 2
    block = (config.fsdp_config or {}).get("fsdp_transformer_layer_cls_to_wrap", "GLMBlock")
    assert [block] == ChatGLMForConditionalGeneration._no_split_modules


# chatglm merge


def peft_folder(model_folder: Path, folder: Path, **fields) -> Path:
    """An adapter with random matrices."""
    import peft

    torch.manual_seed(0)
    model = AutoModel.from_pretrained(model_folder, dtype=torch.float32)
    given = {"r": 4, "lora_alpha": 8, "target_modules": ["query_key_value", "dense_4h_to_h"], **fields}
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **given))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return folder


@needs_peft
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"use_rslora": True},
        {"alpha_pattern": {"query_key_value": 3}, "rank_pattern": {"layers.1.mlp.dense_4h_to_h": 2}},
    ],
    ids=["plain", "rslora", "patterns"],
)
def test_merged_float_weights_are_those_of_peft(fields, tiny_float, tmp_path):
    import peft

    adapter = peft_folder(tiny_float, tmp_path / "adapter", **fields)
    rewrite_folder(tiny_float, tmp_path / "new", lora=Lora(adapter), progress=False, shard_size=50_000)
    model = AutoModel.from_pretrained(tiny_float, dtype=torch.float32)
    expected = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload().half().state_dict()
    got = AutoModel.from_pretrained(tmp_path / "new").state_dict()
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.allclose(got[name].float(), tensor.float(), rtol=1e-3, atol=1e-6), name


@needs_peft
@pytest.mark.parametrize(("old_bits", "new_bits"), [(8, 8), (8, 0), (4, 4), (0, 8)])
def test_merged_integers_are_within_half_a_step(old_bits, new_bits, tmp_path):
    """Of weight + B·A·scaling; what has no LoRA keeps its bits exactly."""
    source = make_tiny(tmp_path / "source", old_bits)
    adapter = peft_folder(source, tmp_path / "adapter")
    lora = Lora(adapter)
    rewrite_folder(source, tmp_path / "new", new_bits, lora=lora, progress=False)
    before, after = (AutoModel.from_pretrained(folder) for folder in (source, tmp_path / "new"))
    assert after.config.quantization_bit == new_bits
    weights = {}
    for model in (before, after):
        for name, module in model.transformer.layers.named_modules():
            if isinstance(module, torch.nn.Linear):
                weight = module.dequantize(torch.float32) if hasattr(module, "dequantize") else module.weight.float()
                weights.setdefault(f"layers.{name}", []).append((weight.detach(), module))
    assert len(weights) == 8
    assert sum(name in lora.pairs for name in weights) == 4
    for name, ((old, old_module), (new, new_module)) in weights.items():
        if name not in lora.pairs and old_bits == new_bits:
            assert torch.equal(old_module.weight, new_module.weight)
            assert torch.equal(old_module.weight_scale, new_module.weight_scale)
            continue
        expected = old
        if name in lora.pairs:
            a, b, scaling = lora.pairs[name]
            expected = old + scaling * b @ a
        step = expected.abs().amax(dim=1, keepdim=True) / {8: 127, 4: 7, 0: 2**10}[new_bits]
        # Rounded to half a step, and the scale to half precision, which moves the outermost by 2^-11 of their size.
        assert ((new - expected).abs() <= 0.5 * step + expected.abs() * 2**-10 + 1e-7).all(), name


@needs_peft
def test_adapters_that_do_not_fit(tiny, tiny_float, tmp_path):
    def refused(adapter: Path, source: Path = tiny) -> str:
        with pytest.raises((ValueError, OSError)) as caught:
            rewrite_folder(source, tmp_path / "new", lora=Lora(adapter), progress=False)
        assert not (tmp_path / "new" / "config.json").exists()
        return str(caught.value)

    assert "no adapter_config.json" in refused(tmp_path)
    assert "more than plain LoRA" in refused(peft_folder(tiny_float, tmp_path / "dora", use_dora=True), tiny_float)
    adapter = peft_folder(tiny, tmp_path / "adapter")
    assert "belong to different models" in refused(adapter, ROOT)
    note = adapter / "adapter_config.json"
    config = json.loads(note.read_text())
    note.write_text(json.dumps({**config, "peft_type": "IA3"}))
    assert "holds IA3, not LoRA" in refused(adapter)
    for wrong in ("{", "[]", json.dumps({**config, "lora_alpha": "x"})):
        note.write_text(wrong)
        assert "damaged" in refused(adapter)
    assert "lm_head" in refused(peft_folder(tiny, tmp_path / "head", target_modules=["lm_head"]))


@pytest.fixture(scope="module")
def adapter(tiny, tmp_path_factory) -> Path:
    pytest.importorskip("peft", reason="needs peft")
    return peft_folder(tiny, tmp_path_factory.mktemp("adapter"))


def with_fields(adapter: Path, folder: Path, **fields) -> Path:
    """A copy of an adapter, with other fields in its configuration."""
    shutil.copytree(adapter, folder)
    note = folder / "adapter_config.json"
    note.write_text(json.dumps({**json.loads(note.read_text()), **fields}))
    return folder


@pytest.mark.parametrize(
    "fields",
    [
        {"lora_alpha": float("nan")},
        {"lora_alpha": float("-inf")},
        {"lora_alpha": 10**400},
        {"lora_alpha": True},
        {"lora_alpha": None},
        {"alpha_pattern": {"query_key_value": float("nan")}},
        {"alpha_pattern": {"query_key_value": "8"}},
        {"alpha_pattern": ["query_key_value"]},
    ],
)
def test_scalings_that_are_no_numbers(fields, adapter, tmp_path):
    with pytest.raises(OSError, match="damaged"):
        Lora(with_fields(adapter, tmp_path / "damaged", **fields))


def test_regular_expressions_of_adapters(adapter, tmp_path, monkeypatch):
    """They mean what they mean in PEFT, the first that matches; hostile and wrong ones are refused."""
    pattern = {r"layers\.(1|7)\.attention\.[a-z_]+": 4, "dense_4h_to_h": 2, "query_key_.*": 12}
    lora = Lora(with_fields(adapter, tmp_path / "one", alpha_pattern=pattern))
    scalings = {name.removeprefix("layers."): 4 * scaling for name, (_, _, scaling) in lora.pairs.items()}
    assert scalings == {
        "0.attention.query_key_value": 12,
        "1.attention.query_key_value": 4,
        "0.mlp.dense_4h_to_h": 2,
        "1.mlp.dense_4h_to_h": 2,
    }
    monkeypatch.setattr(lora_adapter, "MATCH_SECONDS", 0.5)
    for number, hostile in enumerate(["([a-z_.]+)+!", ".*" * 20 + "!"]):
        with pytest.raises(ValueError, match=r"alpha_pattern.*take too long"):
            Lora(with_fields(adapter, tmp_path / str(number), alpha_pattern={hostile: 4}))
    with pytest.raises(ValueError, match=r"wrong regular expression in \['\(a'\].*unterminated"):
        Lora(with_fields(adapter, tmp_path / "wrong", alpha_pattern={"(a": 4}))


def test_dequantized_answers_are_the_same(tiny, tmp_path):
    assert cli.main(["merge", "dequantize", str(tiny), str(tmp_path / "new")]) == 0
    ids = torch.tensor([[7, 8, 9, 2657, 2660, 10]])
    model = AutoModel.from_pretrained(tmp_path / "new", dtype=torch.float32).eval()
    assert model.config.quantization_bit == 0
    expected = AutoModel.from_pretrained(tiny, dtype=torch.float32).eval()(ids).logits
    assert torch.allclose(model(ids).logits, expected, atol=2e-3 * expected.abs().max().item())


LOAD_WITHOUT_THE_PACKAGE = """
import sys
from transformers import AutoModel, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
assert "chatglm_int8" not in sys.modules
assert model.config.pre_seq_len == 4, model.config.pre_seq_len
print(len(model.chat(tokenizer, "hello", do_sample=False, max_new_tokens=3)))
"""


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("projection", [False, True], ids=["direct", "projection"])
def test_prefix_out_and_in_again(projection, suffix, tiny, tmp_path):
    """The same logits; the folder loads with the code that lies in it."""
    out = tmp_path / "out"
    arguments = ["--method", "ptuning", "--pre-seq-len", 4, "--prefix-projection", projection, "--output-dir", out]
    tune(*arguments, "--model", tiny, "--train-file", DIALOGUES, "--max-steps", 2)
    prefix, new = tmp_path / f"prefix{suffix}", tmp_path / "new"
    for command in (["export-prefix", out, prefix], ["import-prefix", tiny, prefix, new]):
        assert cli.main(["merge", *map(str, command)]) == 0
    ids = torch.tensor([[7, 8, 9, 2657, 2660, 10]])
    model = AutoModel.from_pretrained(tiny, dtype=torch.float32).eval()
    without = model(ids).logits
    expected = model.load_prefix(out)(ids).logits
    assert not torch.allclose(without, expected, atol=1e-3)
    assert torch.equal(AutoModel.from_pretrained(new, dtype=torch.float32).eval()(ids).logits, expected)
    if not projection and suffix == ".safetensors":
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment["HF_MODULES_CACHE"] = str(tmp_path / "modules")
        command = [sys.executable, "-c", LOAD_WITHOUT_THE_PACKAGE, str(new)]
        done = subprocess.run(command, env=environment, capture_output=True, timeout=300, cwd=tmp_path)
        assert done.returncode == 0, done.stderr.decode()[-2000:]


def test_a_prefix_takes_the_place_of_another(tiny, tmp_path):
    torch.manual_seed(0)
    shapes = {"embedding.weight": (3, 32), "trans.0.weight": (32, 32), "trans.0.bias": (32,)}
    shapes |= {"trans.2.weight": (2 * 2 * 32, 32), "trans.2.bias": (2 * 2 * 32,)}
    projected = {name: torch.randn(shape) for name, shape in shapes.items()}
    direct = {"embedding.weight": torch.randn(4, 2 * 2 * 32)}
    rewrite_folder(tiny, tmp_path / "one", prefix=projected, progress=False)
    rewrite_folder(tmp_path / "one", tmp_path / "two", prefix=direct, progress=False)
    rewrite_folder(tmp_path / "two", tmp_path / "three", prefix=projected, progress=False)
    for folder, prefix in (("one", projected), ("two", direct), ("three", projected)):
        got = checkpoint.read_prefix(tmp_path / folder)
        assert got.keys() == prefix.keys()
        assert all(torch.equal(got[name], prefix[name]) for name in prefix)
        config = AutoModel.from_pretrained(tmp_path / folder).config
        assert config.pre_seq_len == len(prefix["embedding.weight"])
        assert config.prefix_projection == (prefix is projected)


def test_prefixes_that_do_not_fit(tiny, tmp_path):
    with pytest.raises(ValueError, match="model of another shape"):
        prefix = {"embedding.weight": torch.zeros(4, 2 * 3 * 32)}
        rewrite_folder(tiny, tmp_path / "new", prefix=prefix, progress=False)
    with pytest.raises(ValueError, match=r"no transformer\.prefix_encoder"):
        export_prefix(tiny, tmp_path / "prefix.bin")
