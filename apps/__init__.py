"""The programs of the command `chatglm`, and what they share.

A program is a module with a docstring, whose first line is its summary, and two functions: `add_arguments(parser)`
declares its arguments, `run(arguments)` does the work and may return an exit code. So that `--help` answers at once,
modules of programs import nothing that takes long before `run`: neither torch nor the package itself, which
`from . import x` would do, unlike `from .x import y`. Inside `run`, such imports stand under `imports.imports`.
"""
