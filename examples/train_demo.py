"""Train the small demonstration model that this repository carries, from scratch.

    python examples/train_demo.py --output FOLDER [--steps 2000] [--device cuda]

Reads the dialogues beside this script, builds a vocabulary from them, trains a 28-block model of hidden size 192 with
transformers' Trainer, quantises it to INT8, and writes ice_text.model, tokenizer_config.json, config.json,
generation_config.json and model.safetensors into FOLDER. Then it asks every question of the dialogues, and those of
tests/data/rewordings_*.jsonl, which the training did not see, and every dialogue behind other ones, and prints how many
answers are right to the letter.
It takes some minutes on a GPU, hours without one.
"""

import argparse
import itertools
import json
import random
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from make_vocabulary import build_vocabulary, read_lines
from transformers import GenerationConfig, Trainer, TrainingArguments, set_seed

from chatglm_int8 import ChatGLMConfig, ChatGLMForConditionalGeneration, ChatGLMTokenizer

HERE = Path(__file__).resolve().parent
DIALOGUES = [HERE / "dialogues_zh.jsonl", HERE / "dialogues_en.jsonl"]
REWORDINGS = sorted((HERE.parent / "tests" / "data").glob("rewordings_*.jsonl"))
WRITTEN = ("ice_text.model", "tokenizer_config.json", "config.json", "generation_config.json", "model.safetensors")


def read_jsonl(path: Path) -> list[dict]:
    """The objects of a file with one JSON object a line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def as_messages(turns: list[dict], asks: Iterable[str]) -> list[dict]:
    """Turns, each asked in the given wording, as messages that end with the last answer."""
    messages = []
    for turn, ask in zip(turns, asks, strict=True):
        messages.append({"role": "user", "content": ask})
        messages.append({"role": "assistant", "content": turn["answer"]})
    return messages


def with_history(turns: list[dict], dialogues: list[dict]) -> list[dict]:
    """The turns behind the first turns of one or two other dialogues."""
    earlier = random.sample(dialogues, random.choice((1, 2)))
    return [*(dialogue["turns"][0] for dialogue in earlier), *turns]


def beginnings(dialogues: list[dict]) -> list[dict]:
    """Every dialogue up to its first, second, … turn, each once."""
    found = {}
    for dialogue in dialogues:
        for last in range(1, len(dialogue["turns"]) + 1):
            turns = dialogue["turns"][:last]
            found[json.dumps(turns)] = {"turns": turns}
    return list(found.values())


def all_wordings(dialogues: list[dict]) -> list[list[dict]]:
    """Dialogues as messages, in every combination of wordings, each once."""
    found = {}
    for dialogue in dialogues:
        for asks in itertools.product(*(turn["ask"] for turn in dialogue["turns"])):
            messages = as_messages(dialogue["turns"], asks)
            found[json.dumps(messages)] = messages
    return list(found.values())


def carelessly_typed(conversation: list[dict]) -> list[dict]:
    """The conversation with its last question in small letters and without its last punctuation mark."""
    question = conversation[-2]["content"]
    question = question.lower().rstrip("?？!！.。") or question
    return [*conversation[:-2], {"role": "user", "content": question}, conversation[-1]]


class Collator:
    """Makes batches out of dialogues: picks a wording for each question, and disturbs half of the prompts.

    Many dialogues get other ones before them, so that a question is understood behind any history. So that wordings
    that are not in the dialogues are understood too, a disturbed prompt is cut into other pieces than the likeliest
    (subword regularisation, Kudo 2018, arXiv:1804.10959), and some of them are left out.
    """

    def __init__(self, tokenizer: ChatGLMTokenizer, dialogues: list[dict], left_out: float = 0.1):
        self.tokenizer = tokenizer
        self.dialogues = dialogues
        self.left_out = left_out

    def __call__(self, dialogues: list[dict]) -> dict[str, torch.Tensor]:
        """Dialogues to answer the last turn of → int64 `input_ids`, `attention_mask`, `labels`, each [B, S]."""
        batch = self.tokenizer.pad({"input_ids": [self._ids(d["turns"]) for d in dialogues]}, return_tensors="pt")
        # The loss is on what follows <sop>.
        is_answer = (batch["input_ids"] == self.tokenizer.bos_token_id).cumsum(dim=1) > 0
        is_answer &= batch["input_ids"] != self.tokenizer.bos_token_id
        return {**batch, "labels": batch["input_ids"].where(is_answer, -100)}

    def _ids(self, turns: list[dict]) -> list[int]:
        if random.random() < 0.4:
            turns = with_history(turns, self.dialogues)
        conversation = as_messages(turns, [random.choice(turn["ask"]) for turn in turns])
        if random.random() < 0.3:
            conversation = carelessly_typed(conversation)
        ids = self.tokenizer.apply_chat_template(conversation, return_dict=False)
        if random.random() < 0.5:
            return ids
        prompt = self.tokenizer.apply_chat_template(conversation[:-1], tokenize=False).replace("\n", "<n>")
        pieces = self.tokenizer.sp_model.encode(prompt, enable_sampling=True, nbest_size=-1, alpha=0.1)
        kept = [piece for piece in pieces if random.random() >= self.left_out]
        return (kept or pieces) + ids[ids.index(self.tokenizer.gmask_token_id) :]


def count_right(model, tokenizer, conversations: list[list[dict]], batch_size: int = 256) -> tuple[int, list[str]]:
    """How many conversations the model ends as given, in greedy mode, and what it said wrong."""
    right, wrong = 0, []
    ordered = sorted(conversations, key=lambda messages: sum(len(message["content"]) for message in messages))
    for start in range(0, len(ordered), batch_size):
        batch = ordered[start : start + batch_size]
        inputs = tokenizer.apply_chat_template(
            [messages[:-1] for messages in batch],
            add_generation_prompt=True,
            padding=True,
            return_tensors="pt",
            return_dict=True,
        ).to(model.device)
        output = model.generate(**inputs, max_new_tokens=128, do_sample=False)
        for messages, ids in zip(batch, output[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
            said = model.process_response(tokenizer.decode(ids))
            if said == messages[-1]["content"]:
                right += 1
            else:
                wrong.append(f"{messages[-2]['content']} | {said} | {messages[-1]['content']}")
    return right, wrong


def report(model, tokenizer, dialogues: list[dict]) -> None:
    """Print how many questions of the training, in other words, and behind other dialogues are answered right."""
    reworded = [
        [{"role": "user", "content": line["ask"]}, {"role": "assistant", "content": line["answer"]}]
        for path in REWORDINGS
        for line in read_jsonl(path)
    ]
    random.seed(0)
    behind_others = [with_history(dialogue["turns"], dialogues) for dialogue in dialogues]
    behind_others = [as_messages(turns, [turn["ask"][0] for turn in turns]) for turns in behind_others]
    for name, questions in (
        ("trained", all_wordings(dialogues)),
        ("reworded", reworded),
        ("behind other dialogues", behind_others),
    ):
        right, wrong = count_right(model, tokenizer, questions)
        print(f"{name}: {right} of {len(questions)} answers word for word")
        print("\n".join(f"    asked | said | expected: {line}" for line in wrong[:20]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder to write the model into")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=192)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--pieces", type=int, default=3000, help="size of the vocabulary")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    set_seed(0)
    arguments.output.mkdir(parents=True, exist_ok=True)

    vocabulary = arguments.output / "ice_text.model"
    vocabulary.write_bytes(build_vocabulary(read_lines(DIALOGUES), arguments.pieces))
    tokenizer = ChatGLMTokenizer(vocabulary, num_image_tokens=0)
    special = {
        f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "mask", "gmask", "pad")
    }
    config = ChatGLMConfig(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=192,
        num_attention_heads=6,
        quantization_bit=0,
        **special,
    )
    model = ChatGLMForConditionalGeneration(config)

    dialogues = beginnings([dialogue for path in DIALOGUES for dialogue in read_jsonl(path)])
    print(f"{len(dialogues)} dialogues, {len(tokenizer)} pieces, {model.num_parameters():,} parameters")

    with tempfile.TemporaryDirectory() as scratch:
        Trainer(
            model,
            TrainingArguments(
                output_dir=scratch,
                max_steps=arguments.steps,
                per_device_train_batch_size=arguments.batch,
                learning_rate=arguments.learning_rate,
                lr_scheduler_type="cosine",
                warmup_steps=arguments.steps // 20,
                weight_decay=0.05,
                adam_beta2=0.98,
                logging_steps=max(1, arguments.steps // 20),
                save_strategy="no",
                report_to="none",
                remove_unused_columns=False,
                dataloader_num_workers=8,
                use_cpu=arguments.device == "cpu",
                seed=0,
            ),
            train_dataset=dialogues,
            data_collator=Collator(tokenizer, dialogues),
        ).train()

        model.eval().half().quantize(8)
        model.config.use_cache = True  # the Trainer switches it off
        model.generation_config = GenerationConfig(
            bos_token_id=config.bos_token_id,
            eos_token_id=config.eos_token_id,
            pad_token_id=config.pad_token_id,
        )
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        for name in WRITTEN:
            shutil.copyfile(Path(scratch) / name, arguments.output / name)

    report(model.to(arguments.device), tokenizer, dialogues)


if __name__ == "__main__":
    main()
