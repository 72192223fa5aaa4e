"""The terminal chat, the quantising of folders and the making of random ones."""

import argparse
import builtins
import json
import os
import random
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from chatglm_int8 import ChatGLMConfig, ChatGLMForConditionalGeneration, ChatGLMTokenizer
from chatglm_int8.apps import chat, cli, loading, model_folder
from chatglm_int8.apps.arguments import size
from chatglm_int8.apps.quantize_folder import quantize_folder

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(__file__).resolve().parent / "data"
for folder in ("examples", "benchmarks"):
    sys.path.insert(0, str(ROOT / folder))

import make_checkpoint  # noqa: E402
import make_vocabulary  # noqa: E402

CHAT = [sys.executable, "-m", "chatglm_int8.apps", "chat"]
MODULES = {"checkpoint.py", "configuration_chatglm.py", "modeling_chatglm.py", "quantization.py"}
TINY = {"vocab_size": 1024, "hidden_size": 32, "num_layers": 2, "num_attention_heads": 2, "max_sequence_length": 2048}


def tiny_config(**fields) -> ChatGLMConfig:
    """A small shape whose special ids fit; a vocabulary replaces them."""
    ids = {"bos_token_id": 904, "eos_token_id": 905, "mask_token_id": 900, "gmask_token_id": 901}
    return ChatGLMConfig(**{**TINY, **ids, **fields})


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """An INT8 folder with a vocabulary, random but for <eop>, which never comes: answers fill the length."""
    folder = tmp_path_factory.mktemp("tiny")
    lines = make_vocabulary.read_lines([ROOT / "examples" / "dialogues_en.jsonl"])
    (folder / "made.model").write_bytes(make_vocabulary.build_vocabulary(lines, 700))
    config = tiny_config()
    make_checkpoint.write_checkpoint(folder, config, seed=7, vocabulary=folder / "made.model", progress=False)
    state = load_file(folder / "model.safetensors")
    embedding = state["transformer.word_embeddings.weight"]
    embedding[config.eos_token_id] = 0
    embedding[700:] = 0  # rows without a piece
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


# chatglm chat


def run_chat(*arguments: str, typed: str | None = None, **environment: str) -> subprocess.CompletedProcess:
    """The program, with what is typed, else with its standard input closed."""
    return subprocess.run(
        [*CHAT, "--device", "cpu", "--dtype", "float32", "--greedy", *arguments],
        input=None if typed is None else typed.encode(),
        capture_output=True,
        preexec_fn=(lambda: os.close(0)) if typed is None and os.name == "posix" else None,
        timeout=120,
        env={**os.environ, **environment},
    )


@pytest.fixture(scope="session")
def greedy_answer(tiny):
    """What the model answers, as the command should print it."""
    model, tokenizer = loading.load(str(tiny), "cpu", "float32")

    def answer(query: str, max_length: int, history: list[tuple[str, str]] | None = None) -> str:
        return model.chat(tokenizer, query, history, max_length=max_length, do_sample=False)[0]

    return answer


def test_query_as_an_argument(tiny, greedy_answer):
    query = "Hello，你好"
    # A locale without Chinese must not matter.
    done = run_chat(query, "--model", str(tiny), "--max-length", "60", PYTHONIOENCODING="latin-1")
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode() == greedy_answer(query, 60) + "\n"


def test_queries_from_a_pipe(tiny, greedy_answer):
    """Rounds, empty lines, a query that is too long, `clear`; nothing but answers on stdout; `stop` ends."""
    typed = f"first\n\nsecond\nclear\n{'x' * 200}\nfirst\nstop\nnot asked\n"
    done = run_chat("--model", str(tiny), "--max-length", "90", typed=typed)
    first = greedy_answer("first", 90)
    second = greedy_answer("second", 90, [("first", first)])
    assert done.returncode == 0
    assert done.stdout.decode() == f"{first}\n{second}\n\n{first}\n"
    (error,) = [line for line in done.stderr.decode().splitlines() if line.startswith("chatglm chat:")]
    assert "The query has" in error


class Terminal:
    """A program on a pseudo-terminal of its own."""

    def __init__(self, command: list[str]):
        import pty  # not on Windows

        self.pid, self.descriptor = pty.fork()
        if self.pid == 0:
            os.execve(command[0], command, {**os.environ, "PYTHONIOENCODING": "utf-8", "TERM": "dumb"})
        self.output = b""

    def wait_for(self, expected: str, timeout: float = 60) -> None:
        """Read until `expected` comes, and forget what came up to it."""
        end = time.monotonic() + timeout
        expected = expected.encode()
        while expected not in self.output:
            ready, _, _ = select.select([self.descriptor], [], [], max(0, end - time.monotonic()))
            assert ready, f"no {expected!r} in {timeout} s, but {self.output!r}"
            try:
                self.output += os.read(self.descriptor, 4096)
            except OSError:  # how Linux says that the other end is closed
                pytest.fail(f"ended without {expected!r}, with {self.output!r}")
        self.output = self.output.split(expected, 1)[1]

    def type(self, keys: str) -> None:
        time.sleep(0.5)  # like a person: Python's input() may miss a Ctrl-C between its prompt and its waiting
        os.write(self.descriptor, keys.encode())

    def exit_code(self) -> int:
        while True:  # what is still printed must be read, or the program waits
            try:
                if not os.read(self.descriptor, 4096):
                    break
            except OSError:
                break
        _, status = os.waitpid(self.pid, 0)
        self.pid = None
        return os.waitstatus_to_exitcode(status)

    def close(self) -> None:
        if self.pid is not None:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self.descriptor)


@pytest.mark.slow  # and of little use on a busy machine, where Python now and then loses a Ctrl-C
@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals and terminals")
def test_ctrl_c_on_a_terminal(tiny):
    """It breaks off an answer of two thousand tokens, the chat goes on, and twice at the prompt it ends."""
    terminal = Terminal([*CHAT, "--model", str(tiny), "--device", "cpu", "--greedy"])
    try:
        terminal.wait_for("User: ")
        terminal.type("hello\r")
        terminal.wait_for("ChatGLM: ")
        terminal.type("\x03")
        terminal.wait_for(chat.INTERRUPTED)
        terminal.wait_for("User: ")
        terminal.type("\x03")
        terminal.wait_for(chat.HOW_TO_LEAVE)
        terminal.wait_for("User: ")
        terminal.type("\x03")
        assert terminal.exit_code() == 0
    finally:
        terminal.close()


class ScriptedModel:
    """Streams what it is told to, and keeps the histories that it is given."""

    def __init__(self, answers: list):
        self.answers = answers
        self.histories = []

    def stream_chat(self, tokenizer, query, history, **settings):
        self.histories.append(history)
        response = ""
        for piece in self.answers.pop(0):
            if isinstance(piece, BaseException):
                raise piece
            response += piece
            yield response, [*history, (query, response)]


def test_history(monkeypatch, capsys):
    """Neither a broken-off round nor a refused one is kept, an empty answer is, and `clear` forgets all."""
    answers = [["one"], ["tw", KeyboardInterrupt()], [], [ValueError("too long")], ["five"], ["six"]]
    typed = iter(["a", "b", "", "c", "d", "e", "clear", "f"])

    def read(prompt):
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr(builtins, "input", read)
    model = ScriptedModel(answers)
    chat.chat(model, None, {})
    kept = [("a", "one"), ("c", "")]
    assert model.histories == [[], kept[:1], kept[:1], kept, kept, []]
    out, err = capsys.readouterr()
    assert out == f"one\ntw\n{chat.INTERRUPTED}\n\n\nfive\nsix\n"
    assert err == "chatglm chat: too long\n"


def test_printed_text_is_the_response(golden_model, capsys):
    """Whatever the response becomes at its end, the increments make up the last form of it."""
    process = golden_model("int8").process_response
    generator = random.Random(3)
    alphabet = [*"ab ,!?:;，中文\n[]", "[[训练时间]]", "[[训练时", "间]]"]

    class Model:
        def stream_chat(self, tokenizer, query, history, **settings):
            text = ""
            for piece in generator.choices(alphabet, k=12):
                text += piece
                self.response = process(text)
                yield self.response, [(query, self.response)]

    for _ in range(500):
        model = Model()
        assert chat.answer(model, None, "", [], {}) == [("", model.response)]
        assert capsys.readouterr().out == model.response + "\n"


@pytest.mark.parametrize(
    ("folder", "device", "message"),
    [
        ("nowhere", "cpu", "no folder nowhere"),
        (".", "tpu9", "--device tpu9 can't be used"),
        (".", "cpu", "no vocabulary file"),
    ],
)
def test_what_can_not_be_loaded(folder, device, message, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["chat", "hello", "--model", folder, "--device", device]) == 1
    out, err = capsys.readouterr()
    assert not out
    assert message in err
    assert err.startswith("chatglm chat: ")
    assert err.count("\n") == 1


# chatglm quantize


def write_source(folder: Path, form: str = "model.safetensors") -> Path:
    """The golden base model as a float folder, in one of the forms that transformers knows."""
    folder.mkdir()
    fields = json.loads((DATA / "base.config.json").read_text())
    if form == "pickled shards":
        del fields["quantization_bit"]  # the release's FP16 configuration has none
    (folder / "config.json").write_text(json.dumps(fields))
    (folder / "ice_text.model").write_bytes(b"a vocabulary")
    state = load_file(DATA / "base.safetensors")
    names = sorted(state)
    if form == "model.safetensors":
        save_file(state, folder / form)
    elif form == "pytorch_model.bin":
        torch.save(state, folder / form)
    else:
        suffix, save = (".bin", torch.save) if form == "pickled shards" else (".safetensors", save_file)
        stem = "pytorch_model" if suffix == ".bin" else "model"
        shards = {f"{stem}-0000{i + 1}-of-00003{suffix}": names[i::3] for i in range(3)}
        for file_name, shard in shards.items():
            save({name: state[name] for name in shard}, folder / file_name)
        weight_map = {name: file_name for file_name, shard in shards.items() for name in shard}
        (folder / f"{stem}{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(path))
    return tensors


def assert_is_golden(folder: Path, bits: int) -> None:
    expected = load_file(DATA / f"int{bits}.safetensors")
    expected = {name: tensor for name, tensor in expected.items() if not name.endswith("inv_freq")}
    del expected["lm_head.weight"]  # tied
    got = read_all(folder)
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name
    assert not (folder / ".partial").exists()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("form", ["model.safetensors", "safetensors shards", "pytorch_model.bin", "pickled shards"])
def test_quantized_folder_is_golden(form, bits, tmp_path, golden_model):
    source = write_source(tmp_path / "source", form)
    quantize_folder(source, tmp_path / "result", bits, shard_size=100_000, progress=False)
    assert_is_golden(tmp_path / "result", bits)
    model = AutoModel.from_pretrained(tmp_path / "result")
    assert model.config.quantization_bit == bits
    ids = torch.tensor([[5, 6, 7, model.config.gmask_token_id, model.config.bos_token_id]])
    with torch.no_grad():
        expected = golden_model(f"int{bits}", model.dtype, attention="sdpa")(ids).logits
        torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=0)


def test_files_of_a_folder(tmp_path):
    source = write_source(tmp_path / "source")
    fields = json.loads((source / "config.json").read_text())
    fields["auto_map"] = {"AutoModel": "owner/name--modeling_chatglm.ChatGLMForConditionalGeneration"}
    (source / "config.json").write_text(json.dumps(fields))
    quantize_folder(source, tmp_path / "one", progress=False)
    files = {path.name for path in (tmp_path / "one").iterdir()}
    assert {"config.json", "model.safetensors", "ice_text.model", "tokenization_chatglm.py", *MODULES} <= files
    assert not any(name.endswith(".index.json") for name in files)
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    assert config["auto_map"]["AutoModel"] == "modeling_chatglm.ChatGLMForConditionalGeneration"

    quantize_folder(source, tmp_path / "many", shard_size=100_000, progress=False)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert shards == [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    assert sorted(set(index["weight_map"].values())) == shards
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in read_all(tmp_path / "many").values())
    for name in shards:
        tensors = load_file(tmp_path / "many" / name)
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= 100_000


def test_folder_serves_remote_code(tmp_path):
    """Without this package, with what lies in the folder alone."""
    quantize_folder(write_source(tmp_path / "source"), tmp_path / "result", progress=False)
    script = (
        "import sys; from transformers import AutoModel;"
        "model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True);"
        "assert type(model).__module__.startswith('transformers_modules'), type(model);"
        "assert model.config.quantization_bit == 8"
    )
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", script, tmp_path / "result"], env=environment, check=True, timeout=120)


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals and terminals")
def test_killed_run_is_finished_by_the_same_command(tmp_path):
    source, result = write_source(tmp_path / "source"), tmp_path / "result"
    script = """if True:
        import os, signal, sys
        from chatglm_int8 import quantization
        from chatglm_int8.apps import cli
        calls, genuine = [], quantization.quantize_weight
        def killing(*arguments):
            calls.append(1)
            if len(calls) == 7:
                os.kill(os.getpid(), signal.SIGKILL)
            return genuine(*arguments)
        quantization.quantize_weight = killing
        cli.main()
    """
    command = [sys.executable, "-c", script, "quantize", source, result, "--shard-size", "50KB"]
    assert subprocess.run(command, capture_output=True, timeout=120).returncode == -signal.SIGKILL
    assert any((result / ".partial").iterdir())
    with pytest.raises((OSError, ValueError)):
        AutoModel.from_pretrained(result)
    quantize_folder(source, result, shard_size=100_000, progress=False)
    assert_is_golden(result, 8)


@pytest.mark.parametrize("overwrite", [False, True])
def test_run_stopped_while_files_move_up(overwrite, tmp_path, monkeypatch):
    source, result = write_source(tmp_path / "source"), tmp_path / "result"
    if overwrite:
        quantize_folder(source, result, bits=4, shard_size=50_000, progress=False)
    calls, genuine = [], os.replace

    class Stopped(BaseException):
        """As good as a kill: nobody cleans up after it."""

    def stopping(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise Stopped
        genuine(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stopping)
        with pytest.raises(Stopped):
            quantize_folder(source, result, shard_size=50_000, progress=False, overwrite=overwrite)
    assert not (result / "config.json").exists()
    quantize_folder(source, result, shard_size=100_000, progress=False)
    assert_is_golden(result, 8)


def test_overwriting(tmp_path, monkeypatch):
    """Only when told to, with nothing of the old weights left; a failed run leaves the old folder as it was."""
    source, result = write_source(tmp_path / "source"), tmp_path / "result"
    quantize_folder(source, result, bits=4, shard_size=50_000, progress=False)
    with pytest.raises(FileExistsError, match="--overwrite"):
        quantize_folder(source, result, progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(model_folder, "copy_code", lambda folder: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            quantize_folder(source, result, progress=False, overwrite=True)
    assert_is_golden(result, 4)
    (result / ".partial").mkdir()  # left by a run that was killed, with --overwrite
    with pytest.raises(FileExistsError, match="--overwrite"):
        quantize_folder(source, result, progress=False)
    quantize_folder(source, result, progress=False, overwrite=True)
    assert_is_golden(result, 8)
    assert not (result / "model.safetensors.index.json").exists()


def quantize_fails(monkeypatch, capsys, *arguments: str | Path) -> str:
    """The one line that the command says before it ends with code 1."""
    assert cli.main(["quantize", *map(str, arguments)]) == 1
    out, err = capsys.readouterr()
    assert not out
    line = err.rsplit("\r", 1)[-1].strip().splitlines()[-1]
    assert line.startswith("chatglm quantize: ")
    return line


class FullDisk:
    """What `shutil.disk_usage` would say of one."""

    free = 0


def test_quantize_errors(tmp_path, monkeypatch, capsys):
    source, result = write_source(tmp_path / "source"), tmp_path / "result"

    def fails(*arguments):
        return quantize_fails(monkeypatch, capsys, *arguments)

    assert "no folder" in fails(tmp_path / "nowhere", result)
    assert "the source itself" in fails(source, source)
    (tmp_path / "empty").mkdir()
    assert "config.json" in fails(tmp_path / "empty", result)
    (tmp_path / "empty" / "config.json").write_bytes((source / "config.json").read_bytes())
    assert "no weight files" in fails(tmp_path / "empty", result)
    done = tmp_path / "done"
    quantize_folder(source, done, progress=False)
    assert "quantised already" in fails(done, result)
    with monkeypatch.context() as patch:
        patch.setattr(model_folder.shutil, "disk_usage", lambda folder: FullDisk)
        assert "0.00 GB left" in fails(source, result)
    assert list(result.iterdir()) == []

    state = load_file(source / "model.safetensors")
    name = "transformer.layers.1.mlp.dense_h_to_4h.weight"
    save_file({**state, name: state[name] * float("nan")}, source / "model.safetensors")
    assert name in fails(source, result)
    save_file({key: tensor for key, tensor in state.items() if key != name}, source / "model.safetensors")
    assert "missing" in fails(source, result)
    data = (DATA / "base.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(data[:-1000])
    assert "cut short" in fails(source, result)
    assert list(result.iterdir()) == []


def test_no_progress_bar_in_a_log_file(tmp_path, capsys):
    quantize_folder(write_source(tmp_path / "source"), tmp_path / "result")
    assert capsys.readouterr().err == ""


def test_an_untied_head_is_kept(tmp_path):
    source = write_source(tmp_path / "source")
    state = load_file(source / "model.safetensors")
    state["lm_head.weight"] = state["lm_head.weight"] + 1
    save_file(state, source / "model.safetensors")
    quantize_folder(source, tmp_path / "result", progress=False)
    assert torch.equal(read_all(tmp_path / "result")["lm_head.weight"], state["lm_head.weight"])


def test_shards_of_mixed_dtypes(tmp_path):
    """Wide elements behind an odd number of narrow ones are readable, and bfloat16 and scalars are kept."""
    tensors = {
        "a": torch.randint(-128, 128, (3, 7), dtype=torch.int8),
        "b": torch.randn(5),
        "c": torch.randn(3, 3).bfloat16().T,
        "d": torch.tensor(2.0, dtype=torch.float64),
        "e": torch.randn(0, 4).half(),
    }
    layout = {name: tensor.to("meta") for name, tensor in tensors.items()}
    model_folder.write_shards(tmp_path, layout, tensors.items(), progress=False)
    got, data = load_file(tmp_path / "model.safetensors"), (tmp_path / "model.safetensors").read_bytes()
    assert got.keys() == tensors.keys()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    for name, tensor in tensors.items():
        assert (start + header[name]["data_offsets"][0]) % tensor.itemsize == 0, "not every reader takes this"
        assert got[name].dtype == tensor.dtype
        assert torch.equal(got[name], tensor)
    with pytest.raises(ValueError, match="Expected a"):
        model_folder.write_shards(tmp_path, layout, reversed(tensors.items()), progress=False)


@pytest.mark.parametrize(("text", "expected"), [("1GB", 10**9), ("500mb", 5 * 10**8), ("1.5 K", 1500), ("12", 12)])
def test_sizes(text, expected):
    assert size(text) == expected


@pytest.mark.parametrize("text", ["", "GB", "1 Gib", "-1GB", "0"])
def test_sizes_that_are_none(text):
    with pytest.raises(argparse.ArgumentTypeError):
        size(text)


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals and terminals")
def test_quantizing_needs_little_memory(tmp_path):
    """Of ten layers of 25 MB, about one is in memory at a time, with its copies in float32."""
    config = tiny_config(hidden_size=1024, num_layers=10, num_attention_heads=8, quantization_bit=0)
    make_checkpoint.write_checkpoint(tmp_path / "source", config, progress=False)
    size = sum(path.stat().st_size for path in (tmp_path / "source").glob("*.safetensors"))
    assert size > 250e6
    script = """if True:
        import resource, sys, torch
        from chatglm_int8 import quantization
        from chatglm_int8.apps.quantize_folder import quantize_folder
        quantization.quantize_weight(torch.randn(64, 64).half(), 8)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        quantize_folder(sys.argv[1], sys.argv[2], shard_size=60_000_000, progress=False)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    command = [sys.executable, "-c", script, tmp_path / "source", tmp_path / "result"]
    done = subprocess.run(command, capture_output=True, timeout=120, check=True)
    grown = int(done.stdout) * (1 if sys.platform == "darwin" else 1024)
    assert grown < size / 2, f"{grown / 1e6:.0f} MB for a model of {size / 1e6:.0f} MB"


# benchmarks/make_checkpoint.py


def test_random_folder(tiny):
    """The vocabulary decides on the special ids; folder and tokenizer load; scores are finite in FP16."""
    tokenizer = ChatGLMTokenizer.from_pretrained(tiny)
    model = ChatGLMForConditionalGeneration.from_pretrained(tiny)
    assert model.dtype == torch.float16
    assert model.config.eos_token_id == tokenizer.eos_token_id < 700
    logits = model(torch.tensor([tokenizer("hello").input_ids])).logits
    assert logits.isfinite().all()
    assert logits.std() > 0.05
    config = json.loads((tiny / "config.json").read_text())
    assert config["auto_map"]["AutoModel"] == "modeling_chatglm.ChatGLMForConditionalGeneration"
    assert {"tokenizer_config.json", "ice_text.model", "tokenization_chatglm.py", *MODULES} <= set(os.listdir(tiny))


@pytest.mark.parametrize("bits", [8, 4, 0])
def test_random_weights_follow_the_seed(bits, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make_checkpoint.write_checkpoint(tmp_path / name, tiny_config(quantization_bit=bits), seed, progress=False)
    data = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"]
    assert data[0] == data[1] != data[2]
    model = AutoModel.from_pretrained(tmp_path / "a")
    weight = model.transformer.layers[1].mlp.dense_4h_to_h
    weight = weight.dequantize() if bits else weight.weight
    # The sixteen steps of INT4 spread a little further than ±7.
    assert weight.float().std().item() == pytest.approx(0.02, rel=0.15 if bits == 4 else 0.03)


def test_random_folder_by_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "argv", ["make_checkpoint.py", "--output", str(tmp_path), "--layers", "1", "--hidden-size", "128"]
    )
    make_checkpoint.main()
    model = AutoModel.from_pretrained(tmp_path)
    assert (model.config.num_layers, model.config.hidden_size, model.config.quantization_bit) == (1, 128, 8)
    assert model.config.bos_token_id == 130004
    with pytest.raises(SystemExit):
        monkeypatch.setattr(sys, "argv", [*sys.argv, "--vocabulary", str(tmp_path / "nowhere")])
        make_checkpoint.main()
    assert "nowhere" in capsys.readouterr().err.splitlines()[-1]


def test_vocabulary_larger_than_the_embedding(tiny, tmp_path):
    ids = {"bos_token_id": 600, "eos_token_id": 601, "mask_token_id": 602, "gmask_token_id": 603}
    with pytest.raises(ValueError, match="700 pieces"):
        make_checkpoint.write_checkpoint(
            tmp_path, tiny_config(vocab_size=650, **ids), vocabulary=tiny / "ice_text.model"
        )
