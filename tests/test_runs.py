"""Files that are whole or absent, and checkpoints that are what they claim to be."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune import sealed
from finetune.errors import ConfigError, HardwareError, VerificationError
from finetune.runs import RunDirectory, create_run, locked, sweep
from finetune.sealed import MANIFEST, sealed_directory, verify, write_json


def checkpoint(run: RunDirectory, step: int) -> Path:
    directory = run.checkpoint(step)
    with sealed_directory(directory) as temporary:
        (temporary / "weights").write_bytes(bytes(range(100)) * step)
        (temporary / "sub").mkdir()
        (temporary / "sub" / "state.json").write_text("{}")
    return directory


def flip(path: Path) -> None:
    data = bytearray((path / "weights").read_bytes())
    data[7] ^= 1
    (path / "weights").write_bytes(data)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "flipped bit": flip,
    "truncated": lambda path: (path / "weights").write_bytes(b"x"),
    "missing file": lambda path: (path / "sub" / "state.json").unlink(),
    "extra file": lambda path: (path / "extra.bin").write_bytes(b"x"),
    "no manifest": lambda path: (path / MANIFEST).unlink(),
    "broken manifest": lambda path: (path / MANIFEST).write_text("{"),
    "symbolic link": lambda path: (
        (path / "weights").rename(path.parent / "elsewhere"),
        (path / "weights").symlink_to(path.parent / "elsewhere"),
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_b1_a_damaged_checkpoint_does_not_exist(tmp_path: Path, damage: str) -> None:
    run = RunDirectory(tmp_path)
    older, newer = checkpoint(run, 1), checkpoint(run, 2)
    assert run.newest_checkpoint() == newer
    DAMAGE[damage](newer)
    with pytest.raises(VerificationError):
        verify(newer)
    assert run.newest_checkpoint() == older


def test_a_failure_inside_leaves_the_old_directory_and_no_rubbish(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    directory = checkpoint(run, 1)

    def fail() -> None:
        with sealed_directory(directory) as temporary:
            (temporary / "half").write_text("x")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    verify(directory)
    assert [path.name for path in directory.parent.iterdir()] == [directory.name]


def test_b7_a_full_disk_keeps_what_was_there(tmp_path: Path) -> None:
    code = """
import resource, sys
from pathlib import Path
from finetune.sealed import sealed_directory, verify
target = Path(sys.argv[1]) / "kept"
with sealed_directory(target) as directory:
    (directory / "weights").write_bytes(b"old")
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from finetune.errors import HardwareError
try:
    with sealed_directory(target) as directory:
        (directory / "weights").write_bytes(b"new" * 1000)
except HardwareError as error:
    print(error.exit_code, error.problems[0].what)
verify(target)
print((target / "weights").read_bytes())
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["4 cannot write: File too large", "b'old'"]
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_b1_a_kill_while_writing_leaves_the_old_directory(tmp_path: Path) -> None:
    code = """
import os, signal, sys
from pathlib import Path
import finetune.sealed as sealed
target, point = Path(sys.argv[1]) / "kept", int(sys.argv[2])
with sealed.sealed_directory(target) as directory:
    (directory / "weights").write_bytes(b"old")
calls = 0
def maybe_die(*_):
    global calls
    calls += 1
    if calls == point:
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(lambda event, args: maybe_die() if event in ("open", "os.rename", "os.mkdir", "shutil.rmtree", "os.remove") else None)
with sealed.sealed_directory(target) as directory:
    (directory / "weights").write_bytes(b"new")
print("done", calls)
"""
    kept, finished, point = set(), False, 1
    while not finished:
        folder = tmp_path / str(point)
        folder.mkdir()
        done = subprocess.run([sys.executable, "-c", code, str(folder), str(point)], capture_output=True, text=True, check=False)
        finished = done.returncode == 0
        assert finished or done.returncode == -signal.SIGKILL, done.stderr
        directory = folder / "kept"
        verify(directory)  # at no instant is there nothing under the name
        kept.add((directory / "weights").read_bytes())
        point += 1
    assert kept == {b"old", b"new"}
    assert point > 8


def test_b1_where_names_cannot_be_exchanged_a_kill_between_two_renames_is_mended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDirectory(tmp_path)
    directory = checkpoint(run, 1)
    monkeypatch.setattr(sealed, "_exchange", lambda *_: False)
    with sealed_directory(directory) as temporary:
        (temporary / "weights").write_bytes(b"new")
    verify(directory)
    assert [path.name for path in directory.parent.iterdir()] == [directory.name]
    directory.rename(directory.with_name(f".{directory.name}.77.old"))  # as a kill leaves it
    (directory.parent / ".step-00000002.77.tmp").mkdir()
    sweep(run)
    verify(directory)
    assert [path.name for path in directory.parent.iterdir()] == [directory.name]


def test_b11_two_processes_do_not_share_a_run(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from finetune.runs import locked\nwith locked(Path(sys.argv[1])): pass"
    with locked(tmp_path):
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert "another process is writing this run" in done.stderr
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == 0


def test_a_start_that_was_killed_before_its_records_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.yaml").write_text("x")
    create_run(tmp_path)
    (tmp_path / "checkpoints" / "step-00000001").mkdir()
    with pytest.raises(ConfigError, match="not empty"):
        create_run(tmp_path)


def test_b11_a_directory_in_use_is_refused(tmp_path: Path) -> None:
    (tmp_path / "something").write_text("x")
    with pytest.raises(ConfigError, match="not empty"):
        create_run(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="not empty"):
        create_run(tmp_path / "file")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_place_is_a_hardware_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(HardwareError):
        create_run(tmp_path / "run")


def test_nan_never_reaches_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "x.json", {"loss": float("nan")})
    assert not list(tmp_path.iterdir())


def test_a_torn_last_line_of_metrics_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert RunDirectory(tmp_path).metric_rows() == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize("damage", [b"{not json}", b"\x00\xff", b""])
def test_a_damaged_line_in_the_middle_of_metrics_is_an_error(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + damage + b'\n{"step": 3}\n')
    with pytest.raises(VerificationError) as caught:
        RunDirectory(tmp_path).metric_rows()
    assert caught.value.problems[0].where == f"{tmp_path / 'metrics.jsonl'}:2"
    assert caught.value.problems[0].fix
    assert RunDirectory(tmp_path).readable_rows() == ([{"step": 1}, {"step": 3}], [2])
