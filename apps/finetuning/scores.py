"""Answers of a trained model, and their scores."""

import torch
from accelerate.utils import gather_object
from tqdm import tqdm
from transformers import Trainer

from ... import ChatGLMTokenizer


@torch.no_grad()
def predict(trainer: Trainer, tokenizer: ChatGLMTokenizer, examples: list[dict], max_new_tokens: int) -> list[dict]:
    """Greedy answers: the examples' `prompt` and `response`, and the model's `predicted`, with what it is `expected`
    to be: the response as tokenizer and model would give it back."""
    arguments, model = trainer.args, trainer.accelerator.unwrap_model(trainer.model).eval()
    size = arguments.per_device_eval_batch_size
    mine = sorted(examples, key=lambda example: len(example["input_ids"]))[
        arguments.process_index :: arguments.world_size
    ]
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    rows = []
    for start in tqdm(range(0, len(mine), size), desc="answering", disable=arguments.process_index > 0 or None):
        batch = mine[start : start + size]
        ends = [example["input_ids"].index(tokenizer.bos_token_id) + 1 for example in batch]
        prompts = [example["input_ids"][:end] for example, end in zip(batch, ends, strict=True)]
        inputs = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(model.device)
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        answers = output[:, inputs["input_ids"].shape[1] :].tolist()
        for example, end, ids in zip(batch, ends, answers, strict=True):
            row = {"prompt": example["prompt"], "response": example["response"]}
            for name, said in (("expected", example["input_ids"][end:]), ("predicted", ids)):
                row[name] = base.process_response(tokenizer.decode(said))
            rows.append(row)
    return gather_object(rows)


def answer_scores(rows: list[dict]) -> dict[str, float]:
    """BLEU-4 of characters, ROUGE-1, -2 and -L of words, as the public scripts compute them, and the share of answers
    that are right to the letter: each a mean, in percent. Without the packages, only the last."""
    totals = {"exact": sum(row["predicted"] == row["expected"] for row in rows)}
    try:
        import jieba
        from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
        from rouge_chinese import Rouge
    except ImportError as error:
        print(f"No BLEU and ROUGE ({error}): pip install jieba rouge_chinese nltk")
    else:
        jieba.setLogLevel("WARNING")
        smoothing = SmoothingFunction().method3
        totals.update(dict.fromkeys(("bleu-4", "rouge-1", "rouge-2", "rouge-l"), 0.0))
        for row in rows:
            said, expected = row["predicted"], row["expected"]
            words = [" ".join(jieba.cut(text)) for text in (said, expected)]
            if not said.strip() or not any(word.strip(". ") for word in words[0].split()):
                continue  # nothing said scores nothing; ROUGE refuses it
            totals["bleu-4"] += sentence_bleu([list(expected)], list(said), smoothing_function=smoothing)
            for name, score in Rouge().get_scores(*words)[0].items():
                totals[name] += score["f"]
    return {name: round(100 * total / len(rows), 4) for name, total in totals.items()}
