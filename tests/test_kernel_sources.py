"""C and CUDA in files of their own, and the module that carries them."""

import ast
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from chatglm_int8.kernel_sources import FILES

ROOT = Path(__file__).parent.parent
FOLDERS = ("kernels", "apps", "benchmarks", "examples", "tests")
FILES_HERE = sorted([*ROOT.glob("*.*"), *(path for name in FOLDERS for path in (ROOT / name).rglob("*.*"))])
C_FILES = [path for path in FILES_HERE if path.suffix in (".c", ".h", ".cu", ".cuh")]
PYTHON_FILES = [path for path in FILES_HERE if path.suffix == ".py" and path.name != "kernel_sources.py"]
# What neither prose nor a line of glue has: a system header, a line that opens a body, a body in one line, a kernel.
C_CODE = re.compile(r"^\s*#\s*include\s*<|\)\s*\{\s*$|\)\s*\{[^\n}]*;|__global__\s+\w", re.MULTILINE)


def test_the_carrier_is_fresh():
    spec = importlib.util.spec_from_file_location("bundle", ROOT / "kernels" / "bundle.py")
    bundle = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bundle)
    written = (ROOT / "kernel_sources.py").read_text(encoding="utf-8")
    assert written == bundle.bundle(), "kernel_sources.py is stale: run `python kernels/bundle.py`"


def test_the_carrier_holds_the_files():
    files = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in C_FILES}
    assert {name: text for name, text in files.items() if name.startswith("kernels/")} == FILES


def test_files_are_formatted():
    formatter = shutil.which("clang-format")
    if formatter is None:
        pytest.skip("needs clang-format, which the test extra installs")
    done = subprocess.run([formatter, "--dry-run", "--Werror", *C_FILES], capture_output=True, text=True)
    assert done.returncode == 0, f"run `clang-format -i` on what is named here:\n{done.stderr}"


def strings(text: str) -> list[str]:
    return [
        node.value
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]


@pytest.mark.parametrize("path", PYTHON_FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_c_in_python(path):
    found = [match[0] for text in strings(path.read_text(encoding="utf-8")) if (match := C_CODE.search(text))]
    assert not found, f"C or CUDA in a string: it belongs into a file in kernels/: {found}"
