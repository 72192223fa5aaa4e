"""What is trained, on what."""

import argparse
import dataclasses

from ..arguments import DTYPES, EMBEDDED

METHODS = ("lora", "ptuning", "full")


@dataclasses.dataclass
class Settings:
    """The arguments that are not transformers' TrainingArguments."""

    train_file: str = dataclasses.field(metadata={"help": "dialogues to learn, JSONL or a JSON list"})
    method: str = dataclasses.field(metadata={"help": "what is trained", "choices": METHODS})
    model: str = dataclasses.field(
        default=str(EMBEDDED), metadata={"help": "checkpoint folder to start from", "metavar": "FOLDER"}
    )
    validation_file: str | None = dataclasses.field(default=None, metadata={"help": "dialogues to evaluate on"})
    prompt_column: str = dataclasses.field(default="prompt", metadata={"help": "name of the column with the question"})
    response_column: str = dataclasses.field(
        default="response", metadata={"help": "name of the column with the answer"}
    )
    input_column: str | None = dataclasses.field(
        default=None,
        metadata={"help": 'name of the column with what follows the question in a line of its own (default: "input")'},
    )
    system_column: str | None = dataclasses.field(
        default=None, metadata={"help": 'name of the column with a system text (default: "system")'}
    )
    history_column: str | None = dataclasses.field(
        default=None, metadata={"help": 'name of the column with earlier rounds (default: "history")'}
    )
    messages_column: str | None = dataclasses.field(
        default=None,
        metadata={
            "help": "name of the column with a whole conversation, each of whose answers is learnt, in the place of "
            'question, answer and history (default: "messages" or "conversations", if there is no question)'
        },
    )
    max_length: int = dataclasses.field(
        default=1024, metadata={"help": "most tokens of a prompt and its answer together"}
    )
    max_new_tokens: int = dataclasses.field(default=256, metadata={"help": "most tokens of a --do-predict answer"})
    dtype: str = dataclasses.field(
        default="auto",
        metadata={
            "help": "of the weights; auto is float32 for --method full, else half with --fp16 and --bf16. What is "
            "trained beside frozen weights is always float32",
            "choices": DTYPES,
        },
    )
    device_map: str | None = dataclasses.field(default=None, metadata={"help": "auto spreads the layers over all GPUs"})
    pre_seq_len: int = dataclasses.field(default=128, metadata={"help": "positions of the P-Tuning v2 prefix"})
    prefix_projection: bool = dataclasses.field(
        default=False, metadata={"help": "make the prefix by a two-layer network"}
    )
    lora_rank: int = dataclasses.field(default=8, metadata={"help": "rank of the LoRA matrices"})
    lora_alpha: int = dataclasses.field(default=32, metadata={"help": "LoRA's update is scaled by alpha / rank"})
    lora_dropout: float = dataclasses.field(default=0.1, metadata={"help": "share of LoRA's inputs that is dropped"})
    lora_targets: list[str] = dataclasses.field(
        default_factory=lambda: ["query_key_value"],
        metadata={"help": "linears with LoRA: query_key_value, dense, dense_h_to_4h, dense_4h_to_h"},
    )


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Declare the fields of `Settings`."""
    for field in dataclasses.fields(Settings):
        options = dict(field.metadata)
        if field.default_factory is not dataclasses.MISSING:
            options.update(default=field.default_factory(), nargs="+")
        elif field.default is dataclasses.MISSING:
            options["required"] = True
        elif isinstance(field.default, bool):
            options.update(default=field.default, type=boolean, nargs="?", const=True)
        else:
            options.update(default=field.default, type=str if field.default is None else type(field.default))
        parser.add_argument(f"--{field.name.replace('_', '-')}", **options)


def settings_of(arguments: argparse.Namespace) -> Settings:
    return Settings(**{field.name: getattr(arguments, field.name) for field in dataclasses.fields(Settings)})


def boolean(text: str) -> bool:
    """True or False, as transformers reads it."""
    if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
        raise ValueError
    return text.lower() in ("true", "1", "yes")
