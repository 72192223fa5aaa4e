"""Chats with a ChatGLM model in the terminal.

    python examples/cli_demo.py [QUERY] [--model FOLDER] [--device DEVICE] [--dtype auto] [--greedy]

With a QUERY it prints the answer and ends. Without one it reads queries, from the terminal or from a pipe; `clear`
starts a new conversation, `stop` or the end of the input ends the program, Ctrl-C breaks off an answer. The default
model is the small one in this checkout.
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

try:
    import torch
    from transformers import AutoModel
    from transformers.utils import logging

    from chatglm_int8 import ChatGLMTokenizer
except ModuleNotFoundError as error:
    sys.exit(f"{error}. Install the package first: pip install .   (in the folder above examples)")

with contextlib.suppress(ImportError):  # line editing in input(), where Python has it
    import readline  # noqa: F401

ROOT = Path(__file__).resolve().parent.parent
GREETING = """\
ChatGLM. Type a query; clear starts a new conversation, stop ends, Ctrl-C breaks off an answer.
欢迎使用 ChatGLM。输入内容即可对话；clear 清空历史，stop 结束程序，Ctrl-C 中断回答。"""
INTERRUPTED = "(Broken off; this round is not kept. 已中断，本轮不计入历史。)"
HOW_TO_LEAVE = "(Type stop or press Ctrl-C again to leave. 输入 stop 或再按一次 Ctrl-C 退出。)"
TRAINING_DATE = "[[训练时间]]"  # replaced in responses
# Ends of a response that later text may change, the longest first.
UNSETTLED = (*(TRAINING_DATE[:length] for length in range(len(TRAINING_DATE) - 1, 0, -1)), *",!:;?")


def settled(response: str) -> str:
    """The beginning of a growing response that no later text can change.

    `process_response` widens a last punctuation mark if a Chinese character follows, and replaces a whole
    `[[训练时间]]`.
    """
    if not response.endswith(UNSETTLED):
        return response
    return next(response[: -len(end)] for end in UNSETTLED if response.endswith(end))


def answer(model, tokenizer, query: str, history: list[tuple[str, str]], settings: dict) -> list[tuple[str, str]]:
    """Print the answer as it grows; returns the history with this round."""
    latest, shown = ("", [*history, (query, "")]), 0
    for latest in model.stream_chat(tokenizer, query, history, **settings):
        ready = settled(latest[0])
        print(ready[shown:], end="", flush=True)
        shown = max(shown, len(ready))
    response, longer_history = latest
    print(response[shown:], flush=True)
    return longer_history


def complain(error: Exception) -> None:
    print(f"cli_demo.py: {' '.join(str(error).split())}", file=sys.stderr, flush=True)


def chat(model, tokenizer, settings: dict) -> None:
    """Read queries and answer them, until `stop` or the end of the input."""
    from_terminal = sys.stdin.isatty()
    if from_terminal:
        print(GREETING)
    history: list[tuple[str, str]] = []
    leaving = False  # whether the last thing typed was Ctrl-C
    while True:
        try:
            query = input("\n用户 User: " if from_terminal else "").strip()
        except EOFError:
            break
        except KeyboardInterrupt:
            if leaving:
                break
            leaving = True
            print(f"\n{HOW_TO_LEAVE}")
            continue
        leaving = False
        if query == "stop":
            return
        if query == "clear":
            history = []
            if sys.stdout.isatty():
                print("\033[2J\033[H", end="")
                print(GREETING)
        elif query:
            try:
                if from_terminal:
                    print("ChatGLM: ", end="", flush=True)
                history = answer(model, tokenizer, query, history, settings)
            except KeyboardInterrupt:
                print(f"\n{INTERRUPTED}", flush=True)
            except (ValueError, torch.OutOfMemoryError) as error:
                print(flush=True)
                complain(error)
    if from_terminal:
        print()


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """What `load` is given: --model, --device and --dtype."""
    parser.add_argument("--model", default=str(ROOT), metavar="FOLDER", help="checkpoint folder (default: %(default)s)")
    parser.add_argument("--device", help="such as cpu, cuda or cuda:1 (default: cuda if there is one)")
    parser.add_argument("--dtype", choices=("auto", "float32", "float16", "bfloat16"), default="auto")


def load(folder: str, device: str | None, dtype: str) -> tuple:
    """The model and tokenizer of a folder. Raises OSError or ValueError with what is wrong."""
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"There is no folder {folder}: give a ChatGLM checkpoint folder with --model.")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=device).tolist()
    except Exception as error:  # each backend has its own
        raise ValueError(f"--device {device} can't be used here: {str(error).splitlines()[0]}") from error
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    tokenizer = ChatGLMTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, dtype=dtype, device_map=device)
    return model.eval(), tokenizer


def prepare_streams() -> None:
    """Let any text through: UTF-8 where the locale's encoding has no Chinese, "?" for what can't be written."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        try:
            "中".encode(stream.encoding)
            encoding = stream.encoding
        except UnicodeEncodeError:
            encoding = "utf-8"
        stream.reconfigure(encoding=encoding, errors="replace")


def port(text: str) -> int:
    """A number of a port, of an argument's text."""
    value = int(text)
    if not 0 <= value < 65536:
        raise ValueError
    return value


def positive(kind: type) -> Callable[[str], float]:
    """What makes a positive number, an int or a float, of an argument's text."""

    def parse(text: str) -> float:
        value = kind(text)
        if not value > 0:
            raise ValueError
        return value

    parse.__name__ = f"positive {kind.__name__}"  # argparse shows it
    return parse


def main() -> int:
    parser = argparse.ArgumentParser(description="Chats with a ChatGLM model in the terminal.")
    parser.add_argument("query", nargs="?", metavar="QUERY", help="answer this one query and end")
    add_model_arguments(parser)
    parser.add_argument("--greedy", action="store_true", help="take the likeliest token instead of sampling")
    parser.add_argument("--max-length", type=int, default=2048, help="tokens of prompt and answer (default: 2048)")
    parser.add_argument("--top-p", type=float, default=0.7, help="share of likely tokens to sample (default: 0.7)")
    parser.add_argument("--temperature", type=float, default=0.95, help="of sampling (default: 0.95)")
    arguments = parser.parse_args()
    settings = {"max_length": arguments.max_length, "do_sample": not arguments.greedy}
    if not arguments.greedy:
        settings.update(top_p=arguments.top_p, temperature=arguments.temperature)
    prepare_streams()
    try:
        model, tokenizer = load(arguments.model, arguments.device, arguments.dtype)
        if arguments.query is not None:
            answer(model, tokenizer, arguments.query, [], settings)
        else:
            chat(model, tokenizer, settings)
    except BrokenPipeError:  # who read the output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (OSError, ValueError, torch.OutOfMemoryError) as error:
        complain(error)
        return 1
    except KeyboardInterrupt:
        print()
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
