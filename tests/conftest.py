"""Fixtures of all tests: a tiny random Llama with a real byte-level tokenizer, and a way to run the command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXT = "Doctors also call this condition by another name. What is the official title of the disease? Answer with the title only, please."


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The tests of an `xdist_group` go to one worker, so that what they share is made once.

    pytest-xdist 3.8 writes the group into an attribute that pytest 9.2 no longer reads: without this each worker gets some of them.
    """
    for item in items if getattr(config.option, "loadgroup", False) else ():
        group = "@" + "_".join(sorted({str(mark.args[0]) for mark in item.iter_markers("xdist_group")}))
        if group != "@" and not item.nodeid.endswith(group) and hasattr(item, "_id"):
            item._id = type(item._id).parse(item.nodeid + group)


def write_tokenizer(directory: Path) -> None:
    """A byte-level BPE tokenizer with ChatML turns, where padding and end of turn are one token (as in SmolLM2)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer.train_from_iterator(
        [TEXT],
        trainers.BpeTrainer(
            vocab_size=320, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        ),
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>")
    fast.chat_template = CHATML
    fast.save_pretrained(directory)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache for this session alone, in which the models that were converted once are those of the user."""
    from finetune.cache import cache_directory

    models, directory = cache_directory() / "models", tmp_path_factory.mktemp("cache")
    models.mkdir(parents=True, exist_ok=True)
    (directory / "models").symlink_to(models.absolute())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FINETUNE_CACHE", str(directory))
        yield directory


@pytest.fixture(scope="session")
def tiny_tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with only the tokenizer."""
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory)
    return directory


@pytest.fixture(scope="session")
def make_tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """(tied=True, seed=0, **config) -> directory of a random 2-layer Llama in bf16 with its tokenizer."""

    def make(*, tied: bool = True, seed: int = 0, **changes: object) -> Path:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        directory = tmp_path_factory.mktemp("model")
        write_tokenizer(directory)
        settings = {
            "vocab_size": 320,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "tie_word_embeddings": tied,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 2,
        }
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**(settings | changes))).to(torch.bfloat16)
        model.save_pretrained(directory)
        return directory

    return make


@pytest.fixture(scope="session")
def tiny_model_dir(make_tiny_model: Callable[..., Path]) -> Path:
    """A tied random Llama that nobody changes."""
    return make_tiny_model()


@pytest.fixture(scope="session")
def chat_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 short conversations of different lengths."""
    path = tmp_path_factory.mktemp("data") / "chat.jsonl"
    words = TEXT.split()
    rows = [
        {
            "messages": [
                {"role": "user", "content": " ".join(words[: 2 + number % 9])},
                {"role": "assistant", "content": f"Title {number} " + "of it " * (number % 5)},
            ]
        }
        for number in range(24)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def write_config(tmp_path: Path, tiny_model_dir: Path, chat_file: Path) -> Callable[..., Path]:
    """(**sections) -> path of a small runnable config; sections replace or extend the default ones."""

    def write(name: str = "run.yaml", **sections: object) -> Path:
        config: dict[str, object] = {
            "model": {"id": str(tiny_model_dir)},
            "tuning": {"method": "lora", "rank": 4, "alpha": 8, "targets": "all-linear"},
            "optimizer": {"learning_rate": 0.01},
            "data": {"train": [{"source": str(chat_file)}], "validation": {"fraction": 0.2}, "max_tokens": 256},
            "train": {"epochs": 2, "batch_size": 8, "precision": "fp32", "tokens_per_device": 256},
            "output": str(tmp_path / "run"),
        }
        path = tmp_path / name
        path.write_text(json.dumps(config | sections, indent=1))  # JSON is YAML
        return path

    return write


@pytest.fixture(scope="session")
def train_here() -> Callable[..., Path]:
    """(config file, *overrides, resume=False) -> run directory. In this process: starting a new one costs seconds of imports."""

    def run(path: Path, *overrides: str, resume: bool = False) -> Path:
        from finetune import api

        return api.train(api.load_config(path, overrides).config, resume=resume).path

    return run


@pytest.fixture
def measured_here(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """What was written is measured by the same code without a fresh process, for tests about something else: each takes seconds of imports.

    Commands that a test runs are not changed: they measure in a process of their own.
    """
    from safetensors.torch import load_file

    from finetune.errors import VerificationError
    from finetune.merging import combine, exports, verify
    from finetune.merging.reload import Measurement, Probe

    def measured(module: str, directory: Path, settings: tuple[str, ...], probe: Probe, device: str) -> Measurement:
        folder = tmp_path_factory.mktemp("measured")
        inputs, outputs = folder / "probe.safetensors", folder / "result.safetensors"
        probe.save(inputs)
        if import_module(module).main([str(directory), str(inputs), str(outputs), device, *settings]):
            raise VerificationError("what was written does not reload", where=str(directory))
        found = load_file(outputs)
        return Measurement(found["logits"], float(found["loss"]))

    for owner in (verify, combine, exports):
        monkeypatch.setattr(owner, "measured_by", measured)


class Finished:
    """A command that ran."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


class Warm:
    """The process of warm.py, started for the first command."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: subprocess.Popen[str] | None = None

    def run(self, arguments: list[str], cwd: Path, timeout: float, environment: dict[str, str]) -> Finished:
        if self._process is None:
            command = [sys.executable, str(Path(__file__).with_name("warm.py"))]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdin
        assert self._process.stdout
        out, err = self._folder / "out", self._folder / "err"
        for path in (out, err):
            path.write_text("")
        request = {"arguments": arguments, "cwd": str(cwd), "environment": environment, "out": str(out), "err": str(err)}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        child = int(self._process.stdout.readline())
        late = threading.Timer(timeout, os.kill, (child, signal.SIGKILL))
        late.start()
        code = int(self._process.stdout.readline())
        assert late.is_alive(), (arguments, "took longer than", timeout, err.read_text()[-2000:])
        late.cancel()
        return Finished(code, out.read_text(), err.read_text())

    def stop(self) -> None:
        if self._process is not None:
            self._process.communicate()  # closes stdin, which ends it


_READ_WHILE_RUNNING = {"COLUMNS", "FINETUNE_CACHE"}
"""Of the environment; what else a test sets is read while modules are imported, and takes a process from the start."""


@pytest.fixture(scope="session")
def finetune(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Finished]]:
    """Run `finetune ARGUMENTS` in a process of its own as a user would."""
    warm = Warm(tmp_path_factory.mktemp("warm"))

    def run(*arguments: object, cwd: Path | None = None, timeout: float = 300, **environment: str) -> Finished:
        words, surroundings = list(map(str, arguments)), {**os.environ, "COLUMNS": "100", **environment}
        if environment.keys() <= _READ_WHILE_RUNNING:
            return warm.run(words, cwd or Path.cwd(), timeout, surroundings)
        command = [sys.executable, "-m", "finetune", *words]
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout, check=False, env=surroundings)
        return Finished(done.returncode, done.stdout, done.stderr)

    yield run
    warm.stop()
