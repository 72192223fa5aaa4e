"""Fine-tune a model: LoRA, P-Tuning v2, or all of its weights.

    chatglm finetune --method lora --train-file dialogues.jsonl --output-dir tuned
    chatglm finetune --method ptuning --pre-seq-len 128 --fp16 --model CHATGLM_FOLDER --train-file train.json \\
        --prompt-column content --response-column summary --validation-file dev.json --do-predict --output-dir tuned

LoRA and P-Tuning v2 train beside weights that stay as they are, INT8, INT4 or float; `--method full` needs float
weights. The data is one JSON object a line (or a JSON list of them): a prompt, a response and perhaps more input, a
system text and a history of earlier rounds, [[question, answer], …]; or messages, each with role and content.

All arguments of transformers' TrainingArguments can be given, too, such as --output-dir, --learning-rate (1e-3 for
lora, 2e-2 for ptuning, 2e-5 for full), --num-train-epochs (3), --per-device-train-batch-size (8), --fp16, --bf16,
--gradient-checkpointing, --eval-strategy and --do-predict; --help-training shows them.

The same command goes on where it was stopped, from the last checkpoint that is complete, with the losses that it would
have had. OUTPUT_DIR gets the adapter, prefix or model, `loss.png`, and with `--do-predict` answers to the prompts of
the validation file, with BLEU-4 and ROUGE. `chatglm merge` puts adapters and prefixes into model folders. On several
GPUs: accelerate launch -m chatglm_int8.apps.finetune …
"""

import argparse
import atexit
import os
import sys

from .finetuning.settings import add_settings, settings_of
from .imports import imports

TAKES_OTHER_OPTIONS = True  # those of TrainingArguments


class ShowTrainingArguments(argparse.Action):
    def __call__(self, parser, *_):
        with imports():
            from .finetuning.trainer import training_parser
        training_parser().print_help()
        parser.exit()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_settings(parser)
    parser.add_argument(
        "--help-training", action=ShowTrainingArguments, nargs=0, help="show TrainingArguments' arguments and exit"
    )
    parser.set_defaults(refuse=parser.error)


def run(arguments: argparse.Namespace) -> None:
    with imports("train"):
        from .finetuning import tune
        from .finetuning.trainer import training_arguments
    training = training_arguments(arguments.other_options, arguments.method, arguments.refuse)
    _trainer = tune.tune(settings_of(arguments), training)
    if tune.PROCESSES > 1:
        # gloo's threads let go of tensors some time after a collective is done, for which they need the interpreter.
        # While it waits for them, as it does when the trainer goes, that is a deadlock; while it shuts down, it ends
        # them, and that aborts the process. So this one ends here, with the trainer alive.
        atexit._run_exitfuncs()
        sys.stdout.flush()
        os._exit(0)


if __name__ == "__main__":
    from .cli import main

    sys.exit(main(["finetune", *sys.argv[1:]]))
