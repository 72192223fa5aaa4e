"""Checkpoints to go on from."""

import dataclasses
import json
import os
import zipfile
import zlib
from pathlib import Path

from transformers import TrainingArguments

from ... import checkpoint
from .settings import Settings

# Arguments that can differ between a run and its continuation.
MAY_DIFFER = ("model", "train_file", "validation_file", "device_map", "max_new_tokens")


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
