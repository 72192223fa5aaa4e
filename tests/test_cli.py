"""The command `chatglm`: its help, its exit codes, its streams."""

import argparse
import importlib
import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest

from chatglm_int8.apps import arguments, cli, streams
from chatglm_int8.apps.imports import imports

APPS = Path(cli.__file__).parent
# What the installed script does, without an installation.
ENTER = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("chatglm_command", sys.argv.pop(1))
command = importlib.util.module_from_spec(spec)
spec.loader.exec_module(command)
"""
COMMAND = [sys.executable, "-c", f"{ENTER}\nsys.exit(command.main())", str(APPS / "command" / "__init__.py")]


@pytest.fixture
def program(monkeypatch):
    """A function that makes its argument the `run` of a program, `fake`."""
    monkeypatch.setattr(cli, "PROGRAMS", {"fake": "fake"})
    monkeypatch.delenv("TQDM_DISABLE", raising=False)

    def make(run) -> None:
        module = types.ModuleType("chatglm_int8.apps.fake", "A program.")
        module.run = run
        module.add_arguments = lambda parser: parser.add_argument("--a-number", type=int, default=7, help="a number")
        monkeypatch.setitem(sys.modules, module.__name__, module)

    return make


# Help


def test_help_imports_nothing_that_takes_long():
    script = f"""{ENTER}
for arguments in [["--help"], *([name, "--help"] for name in sys.argv[1:])]:
    sys.argv[1:] = arguments
    try:
        command.main()
    except SystemExit as end:
        assert not end.code
assert not hasattr(sys.modules["chatglm_int8"], "__version__")
heavy = {{"torch", "transformers", "fastapi", "uvicorn", "gradio", "ray", "peft"}} & set(sys.modules)
assert not heavy, heavy
"""
    command = [sys.executable, "-c", script, COMMAND[-1], *cli.PROGRAMS]
    done = subprocess.run(command, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr.decode()
    assert all(f"usage: chatglm {name}" in done.stdout.decode() for name in cli.PROGRAMS)


def test_the_package_is_whole_when_a_program_needs_it():
    script = f"""{ENTER}
command.main()
import chatglm_int8.apps.imports
with chatglm_int8.apps.imports.imports():
    from chatglm_int8 import ChatGLMConfig
    from transformers import AutoConfig
assert AutoConfig.for_model("chatglm").__class__ is ChatGLMConfig
assert sys.modules["chatglm_int8"].modeling_chatglm.ChatGLMModel is chatglm_int8.ChatGLMModel
"""
    command = [sys.executable, "-c", script, COMMAND[-1], "chat", "hello", "--model", "nowhere"]
    done = subprocess.run(command, capture_output=True, timeout=120)
    message = "chatglm chat: There is no folder nowhere: give a ChatGLM checkpoint folder with --model.\n"
    assert (done.returncode, done.stdout.decode(), done.stderr.decode()) == (0, "", message)


def parsers(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """A parser and those of its subcommands."""
    found = [parser]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found += [inner for child in action.choices.values() for inner in parsers(child)]
    return found


def options(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """Options and arguments by the help that is shown for them."""
    actions = [action for action in parser._actions if not isinstance(action, argparse._SubParsersAction)]
    return {parser._get_formatter()._expand_help(action): action for action in actions}


@pytest.mark.parametrize("name", cli.PROGRAMS)
def test_help_of_every_argument_with_its_default(name):
    module = importlib.import_module(f"chatglm_int8.apps.{cli.PROGRAMS[name]}")
    parser = argparse.ArgumentParser(formatter_class=arguments.HelpFormatter)
    module.add_arguments(parser)
    for inner in parsers(parser):
        for shown, action in options(inner).items():
            assert shown.strip(), action
            if action.default not in (None, False, argparse.SUPPRESS):
                assert "(default: " in shown


def test_defaults_in_help():
    parser = argparse.ArgumentParser(formatter_class=arguments.HelpFormatter, add_help=False)
    parser.add_argument("--zero", default=0, help="a number")
    parser.add_argument("--names", nargs="+", default=["a", "b%"], help="names")
    parser.add_argument("--said", default=1, help="a number (default: one)")
    parser.add_argument("--flag", action="store_true", help="a flag")
    parser.add_argument("--none", help="nothing")
    expected = ["a number (default: 0)", "names (default: a b%)", "a number (default: one)", "a flag", "nothing"]
    assert list(options(parser)) == expected


# Arguments


def test_underscores_and_unknown_options(program, capsys):
    seen = []
    program(lambda parsed: seen.append(parsed.a_number))
    assert cli.main(["fake", "--a_number", "3"]) == 0
    assert cli.main(["fake", "--a_number=4"]) == 0
    assert seen == [3, 4]
    for wrong in (["--a-numbers", "3"], ["--a-num", "3"], ["more"]):
        with pytest.raises(SystemExit) as end:
            cli.main(["fake", *wrong])
        assert end.value.code == 2
        assert capsys.readouterr().err.endswith(f"chatglm fake: error: unrecognized arguments: {' '.join(wrong)}\n")


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [(arguments.port, "80", 80), (arguments.positive(int), "3", 3), (arguments.positive(float), "0.5", 0.5)],
)
def test_numbers(parse, text, value):
    assert parse(text) == value
    for wrong in ("-1", "", "nan", "65536x"):
        with pytest.raises(ValueError):
            parse(wrong)


# Ends


def raising(error: BaseException):
    def run(parsed):
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (FileNotFoundError("no\nfile"), 1, "chatglm fake: no file\n"),
        (ValueError("wrong"), 1, "chatglm fake: wrong\n"),
        (KeyboardInterrupt(), 130, "chatglm fake: interrupted\n"),
        (BrokenPipeError(), 1, ""),
    ],
)
def test_ends_in_a_line(error, code, said, program, capsys):
    program(raising(error))
    assert cli.main(["fake"]) == code
    assert capsys.readouterr().err == said


def test_a_fault_of_ours_keeps_its_traceback(program):
    program(raising(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        cli.main(["fake"])


def test_no_progress_bars_in_log_files(program):
    program(lambda parsed: None)
    cli.main(["fake"])
    assert os.environ["TQDM_DISABLE"] == "1"


def test_a_missing_package_is_a_line_that_says_what_to_install():
    message = r'^The package no_such is missing: pip install "chatglm-int8\[serve\]"$'
    with pytest.raises(ValueError, match=message), imports("serve"):
        import no_such  # noqa: F401
    with pytest.raises(ModuleNotFoundError), imports("serve"):
        import chatglm_int8.no_such  # noqa: F401
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_ctrl_c_while_modules_are_imported():
    script = (
        "import importlib.util, sys, time\n"
        "sys.modules['chatglm_int8'] = importlib.util\n"
        "importlib.util.__version__ = ''\n"
        "spec = importlib.util.spec_from_file_location('imports', sys.argv[1])\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "with module.imports():\n"
        "    print('importing', flush=True)\n"
        "    time.sleep(60)\n"
    )
    command = [sys.executable, "-c", script, str(APPS / "imports.py")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == b"importing\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30) == (b"", b"")
    assert process.returncode == -signal.SIGINT


# Streams


def closing(*descriptors: int):
    def close() -> None:
        for descriptor in descriptors:
            os.close(descriptor)

    return close


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX descriptors")
@pytest.mark.parametrize("closed", [(1,), (0, 1), (0, 1, 2)])
def test_chat_needs_a_standard_output(closed):
    done = subprocess.run(
        [*COMMAND, "chat", "hi"], stderr=subprocess.PIPE, preexec_fn=closing(*closed), timeout=60, check=False
    )
    assert done.returncode == 1
    said = "" if 2 in closed else "chatglm chat: The standard output is closed: there is no place for answers.\n"
    assert done.stderr.decode() == said


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX descriptors")
def test_closed_streams_are_not_those_of_later_files():
    script = (
        "import importlib.util, os, sys\n"
        "spec = importlib.util.spec_from_file_location('streams', sys.argv[1])\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "module.prepare_streams()\n"
        "assert os.open(sys.argv[1], os.O_RDONLY) > 2\n"
        "print('lost')\n"
        "print(repr(sys.stdin.read()), file=sys.stderr)\n"
    )
    command = [sys.executable, "-c", script, streams.__file__]
    done = subprocess.run(command, stderr=subprocess.PIPE, preexec_fn=closing(0, 1), timeout=60)
    assert (done.returncode, done.stderr) == (0, b"''\n")


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX pipes")
def test_a_reader_that_has_gone():
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([*COMMAND, "--help"], stdout=writing, stderr=subprocess.PIPE, timeout=60)
    os.close(writing)
    assert done.stderr == b""


# The wheel


def test_every_folder_of_programs_is_in_the_wheel():
    text = (APPS.parent / "pyproject.toml").read_text(encoding="utf-8")
    folders = [path.parent.relative_to(APPS.parent) for path in APPS.rglob("__init__.py")]
    packages = {".".join(["chatglm_int8", *folder.parts]) for folder in folders} - {"chatglm_int8.apps.command"}
    assert all(f'"{name}"' in text for name in {*packages, "chatglm_command"})
