"""Fine-tunes a ChatGLM model: LoRA, P-Tuning v2, or all of its weights.

    python examples/finetune.py --method lora --train-file examples/new_dialogues.jsonl --output-dir FOLDER
    python examples/finetune.py --method ptuning --pre-seq-len 128 --fp16 --train-file train.json --output-dir FOLDER \\
        --model CHATGLM_FOLDER --prompt-column content --response-column summary --validation-file dev.json --do-predict

LoRA and P-Tuning v2 train beside weights that stay as they are, INT8, INT4 or float; `--method full` needs float
weights. The data is one JSON object a line (or a JSON list of them) with a prompt, a response and, for dialogues, a
history of earlier rounds, [[question, answer], …]. All arguments of transformers' TrainingArguments can be given.

The same command goes on where it was stopped, from the last checkpoint that is complete, with the losses that it would
have had. OUTPUT_DIR gets the adapter, prefix or model, `loss.png`, and with `--do-predict` answers to the prompts of
the validation file, with BLEU-4 and ROUGE. `merge.py` puts adapters and prefixes into model folders.
"""

import argparse
import atexit
import dataclasses
import functools
import json
import os
import re
import sys
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

try:
    import torch
    from accelerate.utils import gather_object
    from tqdm import tqdm
    from transformers import HfArgumentParser, Trainer, TrainerCallback, TrainingArguments, set_seed
    from transformers.training_args import ParallelMode

    from chatglm_int8 import ChatGLMConfig, ChatGLMForConditionalGeneration, ChatGLMTokenizer, checkpoint
except ModuleNotFoundError as error:
    sys.exit(f'{error}. Install the package first: pip install ".[train]"   (in the folder above examples)')

ROOT = Path(__file__).resolve().parent.parent
PROCESSES = int(os.environ.get("WORLD_SIZE", 1))
LEARNING_RATES = {"lora": 1e-3, "ptuning": 2e-2, "full": 2e-5}
# Arguments that can differ between a run and its continuation.
MAY_DIFFER = ("model", "train_file", "validation_file", "device_map", "max_new_tokens")


@dataclass
class Settings:
    """What is trained, on what. The arguments of TrainingArguments stand beside these."""

    train_file: str = field(metadata={"help": "dialogues to learn"})
    method: Literal["lora", "ptuning", "full"] = field(metadata={"help": "what is trained"})
    model: str = field(default=str(ROOT), metadata={"help": "checkpoint folder to start from"})
    validation_file: str | None = field(default=None, metadata={"help": "dialogues to evaluate on"})
    prompt_column: str = field(default="prompt", metadata={"help": "name of the column with the question"})
    response_column: str = field(default="response", metadata={"help": "name of the column with the answer"})
    history_column: str | None = field(
        default=None, metadata={"help": 'name of the column with earlier rounds; "history", where there is one'}
    )
    max_length: int = field(default=1024, metadata={"help": "most tokens of a prompt and its answer together"})
    max_new_tokens: int = field(default=256, metadata={"help": "most tokens of an answer with --do-predict"})
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = field(
        default="auto",
        metadata={
            "help": "of the weights; auto is float32 for --method full, else half with --fp16 and --bf16. What is "
            "trained beside frozen weights is always float32"
        },
    )
    device_map: str | None = field(default=None, metadata={"help": "auto spreads the layers over all GPUs"})
    pre_seq_len: int = field(default=128, metadata={"help": "positions of the P-Tuning v2 prefix"})
    prefix_projection: bool = field(default=False, metadata={"help": "make the prefix by a two-layer network"})
    lora_rank: int = field(default=8, metadata={"help": "rank of the LoRA matrices"})
    lora_alpha: int = field(default=32, metadata={"help": "LoRA's update is scaled by alpha / rank"})
    lora_dropout: float = field(default=0.1, metadata={"help": "share of LoRA's inputs that is dropped"})
    lora_targets: list[str] = field(
        default_factory=lambda: ["query_key_value"],
        metadata={"help": "linears with LoRA: query_key_value, dense, dense_h_to_4h, dense_4h_to_h"},
    )


def parse_arguments() -> tuple[Settings, TrainingArguments]:
    parser = HfArgumentParser((Settings, TrainingArguments), description=__doc__.splitlines()[0])
    # A checkpoint that is being written needs the one before it; losses that are not finite must be seen.
    parser.set_defaults(
        report_to="none",
        logging_steps=10,
        save_total_limit=2,
        logging_nan_inf_filter=False,
        prediction_loss_only=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
    )
    first = argparse.ArgumentParser(add_help=False)  # of them all, whose --help is to show this
    first.add_argument("--method")
    method = first.parse_known_args()[0].method
    parser.set_defaults(learning_rate=LEARNING_RATES.get(method, f"that of the method: {LEARNING_RATES}"))
    settings, training = parser.parse_args_into_dataclasses()
    if training.ddp_find_unused_parameters is None:
        training.ddp_find_unused_parameters = False
    return settings, training


# Data


def read_rows(path: str | os.PathLike) -> Iterator[tuple[str, dict]]:
    """The objects of a JSONL file or of a JSON list, each with its place: "FILE, line 3".

    Raises:
        OSError: no such file.
        ValueError: a line that is not a JSON object.
    """
    data = Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf")
    if data.lstrip().startswith(b"["):
        try:
            rows = json.loads(data)
        except ValueError as error:
            raise ValueError(f"{path} begins like a JSON list, but is none: {error}.") from None
        numbered = ((f"{path}, item {number}", row) for number, row in enumerate(rows, start=1))
    else:
        lines = ((f"{path}, line {number}", line) for number, line in enumerate(data.split(b"\n"), start=1))
        numbered = ((place, _parsed(place, line)) for place, line in lines if line.strip())
    for place, row in numbered:
        if not isinstance(row, dict):
            raise ValueError(
                f"{place}: expected an object with columns, got {json.dumps(row, ensure_ascii=False)!s:.60}"
            )
        yield place, row


def _parsed(place: str, line: bytes) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:  # a UnicodeDecodeError is a ValueError
        raise ValueError(f"{place} is not JSON in UTF-8 ({error}): {line.strip()[:60]!r}") from None


def as_messages(place: str, row: dict, settings: Settings) -> list[dict]:
    """A row as the messages of a dialogue, which ends with the response. Raises ValueError with what is wrong."""
    history_column = settings.history_column or "history"
    needed = [settings.prompt_column, settings.response_column]
    for name in [*needed, settings.history_column] if settings.history_column else needed:
        if name not in row:
            raise ValueError(
                f"{place} has no column {name!r}; its columns are {', '.join(map(repr, row))}. Name them with "
                "--prompt-column, --response-column and --history-column."
            )
    for name in needed:
        if not isinstance(row[name], str) or not row[name].strip():
            what = "is empty" if row[name] in ("", None) or isinstance(row[name], str) else f"is no text: {row[name]!r}"
            raise ValueError(f"{place}: the column {name!r} {what}.")
    rounds = row.get(history_column) or []
    messages = []
    half = re.search("[\ud800-\udfff]", json.dumps([rounds, *(row[name] for name in needed)], ensure_ascii=False))
    if half:
        raise ValueError(f"{place} holds half a character, {half[0]!r}: an emoji was cut in two.")
    for pair in rounds if isinstance(rounds, list) else [rounds]:
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise ValueError(f"{place}: expected {history_column!r} to hold pairs [question, answer], got {pair!r:.60}")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    messages.append({"role": "user", "content": row[settings.prompt_column]})
    messages.append({"role": "assistant", "content": row[settings.response_column]})
    return messages


def read_examples(path: str, tokenizer: ChatGLMTokenizer, settings: Settings, quiet: bool = False) -> list[dict]:
    """The dialogues of a file as ids `prompt [gMASK] <sop> answer <eop>`.

    Of dialogues with more than `max_length` tokens the oldest rounds are left out, as `model.chat` does; those whose
    last round alone is longer are left out altogether. How many is printed, unless `quiet`.

    Returns:
        `input_ids`, and as text the last question, `prompt`, and its answer, `response`, of each example.

    Raises:
        OSError: no such file.
        ValueError: a bad line, or nothing left to learn.
    """
    examples, shortened, left_out = [], [], []
    for place, row in tqdm(read_rows(path), desc=f"reading {os.path.basename(path)}", disable=quiet):
        messages = as_messages(place, row, settings)
        try:
            ids = tokenizer.apply_chat_template(messages, return_dict=False)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
        start = ids.index(tokenizer.bos_token_id)
        for name, count in ((settings.prompt_column, start - 1), (settings.response_column, len(ids) - start - 2)):
            if count < 1:
                raise ValueError(f"{place}: the column {name!r} has no text that gives tokens.")
        whole = len(ids)
        while len(ids) > settings.max_length and len(messages) > 2:
            del messages[:2]
            ids = tokenizer.apply_chat_template(messages, return_dict=False)
        if len(ids) > settings.max_length:
            left_out.append(place)
            continue
        if len(ids) < whole:
            shortened.append(place)
        examples.append({"input_ids": ids, "prompt": messages[-2]["content"], "response": messages[-1]["content"]})
    if not examples:
        raise ValueError(
            f"{path} has no dialogue of at most --max-length = {settings.max_length} tokens, of {len(left_out)}."
        )
    if not quiet:
        print(f"{path}: {len(examples)} dialogues, {sum(len(example['input_ids']) for example in examples)} tokens")
        for places, fate in ((shortened, "were cut to their last rounds"), (left_out, "were left out")):
            if places:
                print(
                    f"{path}: {len(places)} with more than --max-length = {settings.max_length} tokens {fate}, "
                    f"the first: {places[0]}"
                )
    return examples


class Collator:
    """Examples → int64 `input_ids`, `attention_mask`, `labels`, each [B, S], padded on the left."""

    def __init__(self, tokenizer: ChatGLMTokenizer):
        self.tokenizer = tokenizer

    def __call__(self, examples: list[dict]) -> dict[str, torch.Tensor]:
        ids = [example["input_ids"] for example in examples]
        batch = self.tokenizer.pad({"input_ids": ids}, padding_side="left", return_tensors="pt")
        # The loss is on what follows <sop>, which no text of a dialogue can contain.
        starts = batch["input_ids"] == self.tokenizer.bos_token_id
        is_answer = (starts.cumsum(dim=1) > 0) & ~starts
        return {**batch, "labels": batch["input_ids"].where(is_answer, -100)}


# Model


def build_model(settings: Settings, training: TrainingArguments) -> torch.nn.Module:
    """The model with what is to be trained in it, and nothing else that requires gradients.

    Raises:
        OSError, ValueError: a folder that can't be loaded, or can't be trained like this.
    """
    config = ChatGLMConfig.from_pretrained(settings.model)
    if settings.max_length > config.max_sequence_length:
        raise ValueError(f"--max-length is {settings.max_length}, but the model reads {config.max_sequence_length}.")
    dtype = settings.dtype
    if settings.method == "full":
        if config.quantization_bit:
            raise ValueError(
                f"{settings.model} holds INT{config.quantization_bit} weights, which --method full can't train: give "
                "the FP16 model, or one made by `merge.py dequantize`; or train beside them with lora or ptuning."
            )
        if config.pre_seq_len is not None:
            raise ValueError(
                f"{settings.model} holds a P-Tuning v2 prefix, beside which --method full would train nothing: give a "
                "model without it."
            )
        if dtype == "float16":
            raise ValueError("--method full can't train float16 weights: use --fp16 alone, or --dtype bfloat16.")
        dtype = "float32" if dtype == "auto" else dtype
    elif dtype == "auto":
        dtype = "float16" if training.fp16 else "bfloat16" if training.bf16 else "float32"
    if settings.method == "ptuning":
        if settings.pre_seq_len < 1:
            raise ValueError(f"--pre-seq-len is {settings.pre_seq_len}, expected a positive number.")
        config.pre_seq_len, config.prefix_projection = settings.pre_seq_len, settings.prefix_projection
    set_seed(training.seed)
    model = ChatGLMForConditionalGeneration.from_pretrained(
        settings.model, config=config, dtype=dtype, device_map=settings.device_map
    )
    if settings.method == "ptuning":
        model.transformer.prefix_encoder.float()
    if settings.method == "lora":
        try:
            import peft
        except ImportError:
            raise ValueError("--method lora needs PEFT: pip install peft") from None
        lora = peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=settings.lora_rank,
            lora_alpha=settings.lora_alpha,
            lora_dropout=settings.lora_dropout,
            target_modules=settings.lora_targets,
        )
        model = peft.get_peft_model(model, lora)
    checkpointing = training.gradient_checkpointing or getattr(training, "activation_checkpointing", False)
    if settings.method != "full" and checkpointing:
        model.enable_input_require_grads()
    return model


class FineTuner(Trainer):
    """Trainer whose checkpoints of a P-Tuning v2 run hold the prefix alone, and whose configurations are for use.

    Sharded or not, a run writes the same files.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.label_smoother is not None:  # Trainer shifts labels only for models that it knows
            self.label_smoother = functools.partial(self.label_smoother, shift_labels=True)

    def _save(self, output_dir=None, state_dict=None):
        config = self.accelerator.unwrap_model(self.model).config
        if config.pre_seq_len is not None and not hasattr(self.model, "peft_config"):
            state_dict = {name: t for name, t in self.model.state_dict().items() if "prefix_encoder." in name}
        if self.is_fsdp_enabled and isinstance(self.model, ChatGLMForConditionalGeneration):
            # FSDP makes a class of its own of the model's. The folder is to name the latter, and to get its code.
            sharded = type(self.model)
            sharded.__module__ = ChatGLMForConditionalGeneration.__module__
            sharded.__name__ = ChatGLMForConditionalGeneration.__name__
        if state_dict is not None and config.tie_word_embeddings:
            state_dict.pop("lm_head.weight", None)  # gathered weights are copies, no longer seen to be one
        config.use_cache = True  # Trainer switches it off for the training
        super()._save(output_dir, state_dict)
        config.use_cache = self.args.use_cache

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        encoder = getattr(getattr(self.model, "transformer", None), "prefix_encoder", None)
        if encoder is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            encoder.load_state_dict(checkpoint.read_prefix(resume_from_checkpoint))

    def get_batch_samples(self, *args, **kwargs):
        """No batches for a run that had all its steps when it was stopped: Trainer would make one more."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return [], None
        return super().get_batch_samples(*args, **kwargs)


# Checkpoints


def last_complete(folder: Path) -> Path | None:
    """The newest checkpoint in a folder that was written to its end.

    Trainer writes weights and optimizer first, then each process its random state, and last trainer_state.json.
    """
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    for path in sorted(found, key=lambda path: -int(path.name.removeprefix("checkpoint-"))):
        try:
            is_state = isinstance(json.loads((path / "trainer_state.json").read_text()), dict)
            for file in path.glob("*.safetensors"):
                checkpoint.read_tensors(str(file), "meta")
        except (OSError, ValueError):
            continue
        pickles = [file for file in path.iterdir() if file.suffix in (".pth", ".pt", ".bin")]
        if is_state and list(path.glob("rng_state*.pth")) and all(map(zipfile.is_zipfile, pickles)):
            return path
    return None


def where_to_resume(settings: Settings, training: TrainingArguments) -> str | None:
    """The checkpoint to go on from, if the output folder has one; raises ValueError if another run wrote it."""
    folder = Path(training.output_dir)
    if training.resume_from_checkpoint:
        if not os.path.isdir(training.resume_from_checkpoint):
            raise ValueError(
                f"--resume-from-checkpoint names no folder: {training.resume_from_checkpoint}. Without it, the run "
                "goes on from the last complete checkpoint of --output-dir."
            )
        return training.resume_from_checkpoint
    run = {name: value for name, value in dataclasses.asdict(settings).items() if name not in MAY_DIFFER}
    run["train_file's CRC"] = zlib.crc32(Path(settings.train_file).read_bytes())
    for name in ("seed", "learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps"):
        run[name] = getattr(training, name)
    found = last_complete(folder)
    note = folder / "finetune.json"
    if found and note.is_file():
        try:
            before = dict(json.loads(note.read_text(encoding="utf-8")))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{note} is damaged ({error}): give another --output-dir.") from None
        changed = [
            f"{name} was {before.get(name)!r}, is {run[name]!r}" for name in run if before.get(name) != run[name]
        ]
        if changed:
            raise ValueError(
                f"{folder} holds checkpoints of another run ({'; '.join(changed)}): give another --output-dir, or the "
                "same arguments to go on with that run."
            )
    if training.process_index == 0:
        folder.mkdir(parents=True, exist_ok=True)
        note.write_text(json.dumps(run, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        if found:
            print(f"going on from {found}")
        elif list(folder.glob("checkpoint-*")):
            print(f"starting anew: the checkpoints in {folder} were cut short, or hold the model only")
    return found and str(found)


class LossPlot(TrainerCallback):
    """Draws the losses so far into OUTPUT_DIR/loss.png, whenever a checkpoint is written and at the end."""

    def on_save(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        try:
            from matplotlib.figure import Figure
        except ImportError:
            if not getattr(self, "told", False):
                print("There will be no plot of the losses: pip install matplotlib")
            self.told = True
            return
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.add_subplot(xlabel="step", ylabel="loss")
        for name, label in (("loss", "training"), ("eval_loss", "validation")):
            points = [(entry["step"], entry[name]) for entry in state.log_history if name in entry]
            if points:
                axes.plot(*zip(*points, strict=True), label=label)
        if axes.has_data():
            axes.legend()
        figure.savefig(Path(args.output_dir) / "loss.png", dpi=120)

    on_train_end = on_save


# Evaluation


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
    for start in tqdm(range(0, len(mine), size), desc="answering", disable=arguments.process_index > 0):
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


def main() -> Trainer:
    settings, training = parse_arguments()
    quiet = training.process_index > 0
    try:
        if PROCESSES > 1 and training.parallel_mode != ParallelMode.DISTRIBUTED:
            raise ValueError(f"{PROCESSES} processes, but no GPUs: each would train alone. Give --use-cpu true.")
        if training.do_predict and not settings.validation_file:
            raise ValueError("--do-predict answers the prompts of --validation-file: give one.")
        if training.eval_strategy != "no" and not settings.validation_file:
            raise ValueError("--eval-strategy looks at the losses of --validation-file: give one.")
        if not os.path.isdir(settings.model):
            raise FileNotFoundError(f"There is no folder {settings.model}: give a checkpoint folder with --model.")
        settings.model = os.path.abspath(settings.model)  # PEFT notes it, for whoever loads the adapter
        tokenizer = ChatGLMTokenizer.from_pretrained(settings.model)
        examples = read_examples(settings.train_file, tokenizer, settings, quiet)
        validation = None
        if settings.validation_file:
            validation = read_examples(settings.validation_file, tokenizer, settings, quiet)
        with training.main_process_first():
            resumed = where_to_resume(settings, training)
        model = build_model(settings, training)
    except (OSError, ValueError) as error:
        sys.exit(f"finetune.py: {' '.join(str(error).split())}")
    # Weights that ZeRO-3 has spread are empty, but know their size.
    sizes = (getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad)
    if not quiet:
        print(f"{settings.method}: {sum(sizes):,} numbers are trained")

    trainer = FineTuner(
        model,
        training,
        train_dataset=examples,
        eval_dataset=validation,
        data_collator=Collator(tokenizer),
        processing_class=tokenizer,
        callbacks=[LossPlot()],
    )
    if (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled) and (
        training.do_predict or settings.method == "ptuning"
    ):
        sys.exit("finetune.py: --method ptuning and --do-predict need a whole model in each process: use ddp.yaml.")
    trainer.train(resume_from_checkpoint=resumed)
    trainer.save_model()
    trainer.save_state()
    if validation:
        metrics = trainer.evaluate()
        if training.do_predict:
            rows = predict(trainer, tokenizer, validation, settings.max_new_tokens)
            if trainer.is_world_process_zero():
                metrics.update(answer_scores(rows))
                with open(Path(training.output_dir) / "predictions.jsonl", "w", encoding="utf-8") as file:
                    file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()
    return trainer


if __name__ == "__main__":
    trainer = main()
    if PROCESSES > 1:
        # gloo's threads let go of tensors some time after a collective is done, for which they need the interpreter.
        # While it waits for them, as it does when the trainer goes, that is a deadlock; while it shuts down, it ends
        # them, and that aborts the process. So this one ends here, with the trainer alive.
        atexit._run_exitfuncs()
        sys.stdout.flush()
        os._exit(0)
