"""Chat with a model in the terminal.

With a QUERY it prints the answer and ends. Without one it reads queries, from the terminal or from a pipe; `clear`
starts a new conversation, `stop` or the end of the input ends the program, Ctrl-C breaks off an answer.
"""

import argparse
import contextlib
import sys

from .answer_text import settled
from .arguments import add_model_arguments
from .imports import imports
from .streams import complain, output_was_closed

GREETING = """\
ChatGLM. Type a query; clear starts a new conversation, stop ends, Ctrl-C breaks off an answer.
欢迎使用 ChatGLM。输入内容即可对话；clear 清空历史，stop 结束程序，Ctrl-C 中断回答。"""
INTERRUPTED = "(Broken off; this round is not kept. 已中断，本轮不计入历史。)"
HOW_TO_LEAVE = "(Type stop or press Ctrl-C again to leave. 输入 stop 或再按一次 Ctrl-C 退出。)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("query", nargs="?", metavar="QUERY", help="answer this one query and end")
    add_model_arguments(parser)
    parser.add_argument("--greedy", action="store_true", help="take the likeliest token instead of sampling")
    parser.add_argument("--max-length", type=int, default=2048, help="tokens of prompt and answer")
    parser.add_argument("--top-p", type=float, default=0.7, help="share of likely tokens to sample")
    parser.add_argument("--temperature", type=float, default=0.95, help="of sampling")


def run(arguments: argparse.Namespace) -> None:
    if output_was_closed():
        raise OSError("The standard output is closed: there is no place for answers.")
    with imports():
        from .loading import load
    settings = {"max_length": arguments.max_length, "do_sample": not arguments.greedy}
    if not arguments.greedy:
        settings.update(top_p=arguments.top_p, temperature=arguments.temperature)
    model, tokenizer = load(arguments.model, arguments.device, arguments.dtype)
    if arguments.query is not None:
        answer(model, tokenizer, arguments.query, [], settings)
    else:
        chat(model, tokenizer, settings)


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


def chat(model, tokenizer, settings: dict) -> None:
    """Read queries and answer them, until `stop` or the end of the input."""
    import torch

    with contextlib.suppress(ImportError):  # line editing in input(), where Python has it
        import readline  # noqa: F401
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
                complain("chatglm chat", error)
    if from_terminal:
        print()
