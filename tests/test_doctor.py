"""`chatglm doctor`: each fault of a machine or folder is named, with its remedy."""

import errno
import getpass
import importlib.metadata
import json
import os
import shutil
import types
from pathlib import Path

import psutil
import pytest
import torch
from transformers.utils import logging

from chatglm_int8 import cuda_runtime, kernel_cache, kernels_cpu
from chatglm_int8.apps import cli, doctor


@pytest.fixture(autouse=True)
def nothing_said_or_loaded(monkeypatch, tmp_path):
    """Kernels are looked for anew, in a cache of their own, and warnings are given again."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CHATGLM_CPU_KERNEL", raising=False)
    logging.warning_once.cache_clear()
    kernels_cpu._load.cache_clear()
    yield
    kernels_cpu._load.cache_clear()


def cpu_finding() -> doctor.Finding:
    findings = [finding for finding in doctor.check_cpu_kernels() if finding.check == "CPU kernels"]
    assert [finding.state for finding in findings] == ["slower"]
    return findings[0]


def test_no_compiler(monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    finding = cpu_finding()
    assert "there is no C compiler" in finding.text
    assert finding.remedy.startswith("Install gcc")


def test_no_openmp(monkeypatch):
    def only_without(flags, *_):
        if kernels_cpu.OPENMP in flags:
            raise kernels_cpu.CompileError("cc -fopenmp failed: omp.h: No such file or directory")
        return types.SimpleNamespace(allowed=True, instructions="AVX2")

    monkeypatch.setattr(kernels_cpu, "_open", only_without)
    finding = cpu_finding()
    assert "one thread" in finding.text
    assert "libgomp" in finding.remedy


def test_a_cpu_quota(monkeypatch):
    library = types.SimpleNamespace(allowed=True, instructions="AVX2")
    monkeypatch.setattr(kernels_cpu, "_open", lambda *_: library)
    monkeypatch.setattr(kernels_cpu, "_quota", lambda: 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    finding = cpu_finding()
    assert "A CPU quota allows 2" in finding.text
    assert "OMP_NUM_THREADS" in finding.remedy


@pytest.mark.parametrize("number", [errno.EDQUOT, errno.ENOSPC])
def test_no_room_for_compiled_kernels(number, monkeypatch):
    def full(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(kernel_cache.tempfile, "mkstemp", full)
    finding = cpu_finding()
    assert os.strerror(number) in finding.text
    assert "XDG_CACHE_HOME" in finding.remedy and "disk space" in finding.remedy


def test_a_cache_mounted_noexec(monkeypatch, tmp_path):
    def refused(path):
        raise OSError(f"{path}: failed to map segment from shared object")

    monkeypatch.setattr(kernels_cpu, "build", lambda *_: tmp_path / "cpu.so")
    monkeypatch.setattr(kernels_cpu, "Library", refused)
    assert "noexec" in cpu_finding().remedy


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (100 * doctor.GIGABYTE, 140 * doctor.GIGABYTE))


def raising(error: Exception):
    def function():
        raise error

    return function


def test_no_nvrtc(gpu, monkeypatch):
    nvrtc = types.SimpleNamespace(
        version=(0, 0), nvrtcVersion=raising(RuntimeError("Library nvrtc is not initialized"))
    )
    monkeypatch.setattr(cuda_runtime, "load_libraries", lambda: types.SimpleNamespace(nvrtc=nvrtc))
    last = list(doctor.check_gpu())[-1]
    assert (last.state, last.text) == ("slower", "Library nvrtc is not initialized")
    assert last.remedy == "pip install nvidia-cuda-nvrtc"


def test_no_cpm_kernels(gpu, monkeypatch):
    monkeypatch.setattr(cuda_runtime, "load_libraries", raising(ImportError("cpm_kernels is not installed")))
    last = list(doctor.check_gpu())[-1]
    assert (last.state, last.remedy) == ("slower", "pip install cpm_kernels")


@pytest.mark.parametrize(("free", "state"), [(0, "broken"), (7, "slower"), (8, "ok")])
def test_memory(free, state, monkeypatch):
    monkeypatch.setattr(
        psutil, "virtual_memory", lambda: types.SimpleNamespace(available=free * doctor.GIGABYTE + 10**8)
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    [finding] = doctor.check_memory(6_700_000_000, 4 * 28 * 4096)
    assert finding.state == state
    assert "6.93 GB needed with 512 tokens, 7.64 GB with 2048" in finding.text
    assert (finding.remedy is None) == (state == "ok")


def test_transformers_4(monkeypatch):
    version = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "4.57.6" if name == "transformers" else version(name)
    )
    [finding] = [finding for finding in doctor.examine(str(doctor.EMBEDDED)) if finding.state == "broken"]
    assert finding.text == "4.57.6 is too old: 5.0 or newer is needed"
    assert finding.remedy == 'pip install -U "transformers>=5.0"'


def test_a_package_that_is_missing(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert {finding.text for finding in doctor.check_versions()} == {"not installed"}


def test_versions_needed_are_those_of_the_package(root):
    text = (root / "pyproject.toml").read_text(encoding="utf-8")
    for name, (oldest, _) in doctor.VERSIONS.items():
        assert (f'"{name}>={oldest}"' if oldest != "0" else f'"{name}"') in text


def test_a_truncated_folder(root, tmp_path, capsys):
    folder = tmp_path / "home" / "model"
    folder.mkdir(parents=True)
    for name in ("config.json", "tokenizer_config.json", "ice_text.model"):
        shutil.copy(root / name, folder)
    (folder / "model.safetensors").write_bytes((root / "model.safetensors").read_bytes()[:100_000])
    [finding] = doctor.check_folder(str(folder))
    assert finding.state == "broken"
    assert "cut short" in finding.text
    assert "download" in finding.remedy


# The report


def fake(monkeypatch, *findings: doctor.Finding) -> None:
    monkeypatch.setattr(doctor, "examine", lambda folder: iter(findings))


def test_lines_and_exit_codes(monkeypatch, capsys):
    fake(monkeypatch, doctor.Finding("a", "ok", "good"), doctor.Finding("b", "slower", "less", "Do it."))
    assert cli.main(["doctor"]) == 0
    assert capsys.readouterr().out == "ok      a: good\nslower  b: less\n        → Do it.\n"
    fake(monkeypatch, doctor.Finding("a", "broken", "bad", "Do it."))
    assert cli.main(["doctor", "--json"]) == 1
    assert json.loads(capsys.readouterr().out) == [{"check": "a", "state": "broken", "text": "bad", "remedy": "Do it."}]


def test_no_user_names_and_homes(monkeypatch, capsys):
    monkeypatch.setattr(Path, "home", lambda: Path("/home/alice"))
    monkeypatch.setattr(getpass, "getuser", lambda: "alice")
    text = "/home/alice/.cache/x and /data/alice/y and /models/6b/config.json"
    fake(monkeypatch, doctor.Finding("a", "slower", text, f"See {text}."))
    cli.main(["doctor", "--model", "/models/6b"])
    assert capsys.readouterr().out.splitlines()[0] == "slower  a: ~/.cache/x and /data/USER/y and MODEL/config.json"


def test_a_check_that_fails_is_a_line(monkeypatch):
    def broken():
        raise RuntimeError("unforeseen")
        yield

    monkeypatch.setattr(doctor, "check_gpu", broken)
    monkeypatch.setattr(doctor, "check_cpu_kernels", lambda: iter(()))
    found = [finding for finding in doctor.examine(str(doctor.EMBEDDED)) if finding.state == "broken"]
    assert [finding.text for finding in found] == ["RuntimeError: unforeseen"]
