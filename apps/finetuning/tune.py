"""A run of fine-tuning, from data to scores."""

import json
import os
from pathlib import Path

from transformers import Trainer, TrainingArguments
from transformers.training_args import ParallelMode

from ... import ChatGLMTokenizer
from .examples import Collator, read_examples
from .model import build_model
from .resume import where_to_resume
from .scores import answer_scores, predict
from .settings import Settings
from .trainer import FineTuner, LossPlot

PROCESSES = int(os.environ.get("WORLD_SIZE", 1))


def tune(settings: Settings, training: TrainingArguments) -> Trainer:
    """Train, and write what was trained, the losses and the scores into `output_dir`.

    Raises:
        OSError, ValueError: files that can't be read, arguments that don't go together.
    """
    quiet = training.process_index > 0
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
        raise ValueError("--method ptuning and --do-predict need a whole model in each process: use ddp.yaml.")
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
