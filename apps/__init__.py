"""The programs of the command `chatglm`, and what they share.

A program is a module with a docstring, whose first line is its summary, and two functions: `add_arguments(parser)`
declares its arguments, `run(arguments)` does the work and may return an exit code. So that `--help` answers at once,
what takes long to import, torch and the modules in the root among it, is imported inside `run`, under
`imports.imports`.
"""
