"""The code blocks of both READMEs run, with the small model; what they show exists."""

import json
import re
import shlex
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

import chatglm_int8
from chatglm_int8.apps import cli
from chatglm_int8.apps.server import Settings

ROOT = Path(__file__).resolve().parent.parent
READMES = ("README.md", "README_zh.md")
SHORTER = {"--num-train-epochs": ["--max-steps", "1", "--use-cpu"]}  # training to the end takes minutes


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name: str) -> list[tuple[str, str]]:
    """Language and text of a README's code blocks."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", read(name), flags=re.MULTILINE | re.DOTALL)


def without_comments(text: str) -> str:
    return re.sub(r"\s+#.*", "", text)


def test_both_readmes_have_the_same_blocks():
    english, chinese = map(blocks, READMES)
    assert [language for language, _ in english] == [language for language, _ in chinese]
    for (language, ours), (_, theirs) in zip(english, chinese, strict=True):
        if language:
            assert without_comments(ours) == without_comments(theirs)
        else:  # the modules: their names are equal
            names = [[re.split(r"\s{2,}", line)[0] for line in text.splitlines()] for text in (ours, theirs)]
            assert names[0] == names[1]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with what the root has for a user."""
    for name in (*COPIED, "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


COPIED = ("config.json", "generation_config.json", "tokenizer_config.json", "ice_text.model", "model.safetensors")


def test_python_blocks(folder, capsys):
    for text in [text for language, text in blocks("README.md") if language == "python"]:
        exec(compile(text, "README.md", "exec"), {})
        assert capsys.readouterr().out.strip()


def commands(text: str) -> list[list[str]]:
    """The command lines of a block, as lists of words."""
    lines = re.sub(r"\\\n", " ", text).splitlines()
    return [shlex.split(part, comments=True) for line in lines for part in line.split(" && ")]


def run_chatglm(words: list[str], capsys) -> None:
    if words[0] == "serve":
        cli.parse(words)  # its requests go to the application
        return
    for option, instead in SHORTER.items():
        if option in words:
            place = words.index(option)
            words = [*words[:place], *instead, *words[place + 2 :]]
    capsys.readouterr()
    assert cli.main(words) == 0
    if words[0] == "chat":
        assert capsys.readouterr().out.strip()


def run_curl(words: list[str]) -> None:
    testclient = pytest.importorskip("fastapi.testclient", reason="needs fastapi and httpx, of the extra `test`")
    from chatglm_int8.apps.server.app import create_app

    url, body = words[0], words[words.index("-d") + 1]
    headers = dict([words[words.index("-H") + 1].split(": ")])
    with testclient.TestClient(create_app(Settings(dtype="float32")), base_url="http://127.0.0.1:8000") as client:
        reply = client.post(url, content=body, headers=headers)
        assert reply.status_code == 200, reply.text
        assert reply.json()["choices"][0]["message"]["content"]


def run_pip(words: list[str]) -> None:
    assert words[0] == "install"
    for extra in re.findall(r"\[(\w+)\]", " ".join(words)):
        assert re.search(rf"^{extra} = \[", read("pyproject.toml"), flags=re.MULTILINE)


SHELL = [text for language, text in blocks("README.md") if language == "bash"]


@pytest.mark.parametrize("text", SHELL, ids=[commands(text)[0][1] for text in SHELL])
def test_shell_blocks(text, folder, capsys):
    if "finetune" in text:
        pytest.importorskip("peft", reason="needs peft, of the extra `train`")
    for program, *words in commands(text):
        if program == "chatglm":
            run_chatglm(words, capsys)
        elif program == "curl":
            run_curl(words)
        elif program == "pip":
            run_pip(words)
        else:
            assert [program, *words] == ["python", "-m", "pytest"]


def test_modules_that_the_readme_lists_exist():
    for text in [text for language, text in blocks("README.md") if not language]:
        for line in text.splitlines():
            for name in re.split(r"\s{2,}", line)[0].split(", "):
                assert (ROOT / name).exists(), name


@pytest.mark.parametrize("name", [*READMES, "benchmarks/RESULTS.md"])
def test_links_and_pictures_exist(name):
    text = read(name)
    for target in [*re.findall(r"\]\(([^)#\s]+)\)", text), *re.findall(r'(?:src|srcset)="([^"]+)"', text)]:
        if not target.startswith("http"):
            assert ((ROOT / name).parent / target).exists(), target


# The model card


def test_length_of_the_readme():
    front, body = read("README.md").split("\n---\n", 1)
    assert front.startswith("---\n")
    assert len(body.strip().splitlines()) <= 150
    for start in ("[中文](README_zh.md)", "[English](README.md)"):
        assert any(start in read(name)[:900] for name in READMES)


def test_front_matter_and_citation():
    yaml = pytest.importorskip("yaml", reason="comes with transformers")
    card = yaml.safe_load(read("README.md").split("---\n")[1])
    assert card["language"] == ["zh", "en"]
    assert card["library_name"] == "transformers" and card["pipeline_tag"] == "text-generation"
    citation = yaml.safe_load(read("CITATION.cff"))
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == chatglm_int8.__version__
    cited = {identifier["value"] for paper in citation["references"] for identifier in paper["identifiers"]}
    assert cited == {"arXiv:2406.12793", "arXiv:2103.10360"}
    assert all(value.removeprefix("arXiv:") in read(name) for value in cited for name in READMES)


# Pictures


def numbers(value) -> list[float]:
    if isinstance(value, dict):
        return [number for item in value.values() for number in numbers(item)]
    if isinstance(value, list):
        return [number for item in value for number in numbers(item)]
    return [value] if isinstance(value, int | float) else []


def test_pictures_are_drawn_from_numbers_of_the_results(tmp_path):
    pytest.importorskip("matplotlib", reason="needs matplotlib, of the extra `train`")
    spec = spec_from_file_location("plots", ROOT / "benchmarks" / "plots.py")
    plots = module_from_spec(spec)
    spec.loader.exec_module(plots)
    results = json.loads(read("benchmarks/results.json"))
    written = read("benchmarks/RESULTS.md").replace(",", "")
    for name, given in results.items():
        for number in numbers({key: value for key, value in given.items() if key not in ("bandwidth", "weights")}):
            assert re.search(rf"(?<![\d.]){number}0?(?![\d])", written), (name, number)
        plots.draw(name, given, "dark", tmp_path / "plot.svg")
        assert "</svg>" in (tmp_path / "plot.svg").read_text(encoding="utf-8")
    drawn = {path.name for path in (ROOT / "benchmarks" / "plots").iterdir()}
    assert drawn == {f"{name}_{theme}.svg" for name in results for theme in plots.INKS}
