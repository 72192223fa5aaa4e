"""transformers' Trainer and its arguments, for the three methods."""

import functools
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import HfArgumentParser, Trainer, TrainerCallback, TrainingArguments

from ... import ChatGLMForConditionalGeneration, checkpoint

LEARNING_RATES = {"lora": 1e-3, "ptuning": 2e-2, "full": 2e-5}


def training_parser(method: str | None = None) -> HfArgumentParser:
    """The options of TrainingArguments, with the defaults for a method."""
    parser = HfArgumentParser(TrainingArguments, prog="chatglm finetune", add_help=False, allow_abbrev=False)
    # A checkpoint that is being written needs the one before it; losses that are not finite must be seen.
    parser.set_defaults(
        learning_rate=LEARNING_RATES.get(method),
        report_to="none",
        logging_steps=10,
        save_total_limit=2,
        logging_nan_inf_filter=False,
        prediction_loss_only=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        disable_tqdm=not sys.stderr.isatty(),
    )
    return parser


def training_arguments(options: list[str], method: str, refuse: Callable[[str], None]) -> TrainingArguments:
    """TrainingArguments of the command line's options; `refuse` ends the program with what is wrong with them."""
    parser = training_parser(method)
    parser.error = refuse
    training, unknown = parser.parse_args_into_dataclasses(
        options, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        refuse(f"unrecognized arguments: {' '.join(unknown)}")
    if training.ddp_find_unused_parameters is None:
        training.ddp_find_unused_parameters = False
    return training


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
