"""Put what fine-tuning made into model folders.

`lora` adds the LoRA matrices of a PEFT folder to the weights. Quantised weights are expanded, added to and quantised
again, to as many bits as they had or to `--bits` (0: float weights). `export-prefix` writes the P-Tuning v2 prefix of a
checkpoint to a file of its own, and `import-prefix` makes a model folder with a prefix in it, from such a file or a
folder of `chatglm finetune`. New folders load like any other; tensors are read, changed and written one by one.
"""

import argparse

from .arguments import size
from .imports import imports


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name: str, summary: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name, help=summary, description=summary, formatter_class=parser.formatter_class, allow_abbrev=False
        )

    lora = add("lora", "merge a LoRA into a model")
    dequantize = add("dequantize", "make float weights out of INT8 or INT4 ones")
    taking = add("export-prefix", "write a P-Tuning v2 prefix to a file of its own")
    putting = add("import-prefix", "put a P-Tuning v2 prefix into a model")
    taking.add_argument("source", metavar="TUNED_FOLDER", help="a checkpoint or model folder that holds a prefix")
    taking.add_argument("destination", metavar="PREFIX_FILE", help="file to write, .safetensors or .bin")
    for command in (lora, dequantize, putting):
        command.add_argument("source", metavar="MODEL_FOLDER", help="folder of the model")
        if command is lora:
            command.add_argument("adapter", metavar="ADAPTER_FOLDER", help="folder that PEFT wrote")
            command.add_argument("--bits", type=int, choices=(8, 4, 0), help="of the new weights (default: as before)")
        if command is putting:
            command.add_argument("prefix", metavar="PREFIX", help="file or folder with transformer.prefix_encoder.*")
        command.add_argument("destination", metavar="NEW_FOLDER", help="folder to write")
        command.add_argument("--shard-size", type=size, default="1GB", help="largest file")
        command.add_argument("--overwrite", action="store_true", help="replace a checkpoint in NEW_FOLDER")


def run(arguments: argparse.Namespace) -> None:
    with imports():
        from ..checkpoint import read_prefix
        from .lora_adapter import Lora
        from .rewrite_folder import export_prefix, rewrite_folder
    if arguments.command == "export-prefix":
        export_prefix(arguments.source, arguments.destination)
        return
    if arguments.command == "lora":
        changes = {"lora": Lora(arguments.adapter), "bits": arguments.bits}
    elif arguments.command == "dequantize":
        changes = {"bits": 0}
    else:
        changes = {"prefix": read_prefix(arguments.prefix)}
    rewrite_folder(
        arguments.source,
        arguments.destination,
        shard_size=arguments.shard_size,
        overwrite=arguments.overwrite,
        **changes,
    )
