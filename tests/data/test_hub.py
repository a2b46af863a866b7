"""Datasets of the hub: read from a fake one on this machine, then from the cache without it; never code, never another commit."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import pytest

from finetune.config.data import HubSource
from finetune.data.hub import read_hub
from finetune.errors import DataError

COMMIT, OTHER = "a" * 40, "b" * 40
ROWS = [{"question": f"q{number}", "answer": f"a{number}"} for number in range(30)]
REPOSITORIES = {
    "owner/name": {"train.jsonl": "".join(json.dumps(row) + "\n" for row in ROWS).encode(), "README.md": b"---\nlicense: mit\n---\n"},
    "owner/code": {"code.py": b"import pathlib\npathlib.Path('ran').touch()\n", "README.md": b"---\nlicense: mit\n---\n"},
}
# In a process of its own: the hub's address and whether it may be asked are read once, as its library is imported.
READ = """
import json, sys
from finetune.config.data import HubSource
from finetune.data.sources import read_rows
for settings in json.loads(sys.argv[1]):
    found = list(read_rows(HubSource.model_validate(settings)))
    print(json.dumps([[row.values, row.where] if hasattr(row, "values") else str(row) for row in found]))
"""


class FakeHub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as loading a dataset asks for."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def _answer(self) -> None:
        path = urlsplit(self.path).path
        for name, files in REPOSITORIES.items():
            listed = [{"type": "file", "path": file, "size": len(data), "oid": _etag(data)} for file, data in files.items()]
            answers: dict[str, Any] = {
                f"/api/datasets/{name}/revision/{COMMIT}": {"id": name, "sha": COMMIT, "siblings": [{"rfilename": file} for file in files]},
                f"/api/datasets/{name}/tree/{COMMIT}": listed,
            }
            if path in answers:
                return self._send(json.dumps(answers[path]).encode(), "application/json")
            start = f"/datasets/{name}/resolve/{COMMIT}/"
            if path.startswith(start) and (data := files.get(path.removeprefix(start))) is not None:
                return self._send(data, "application/octet-stream")
        code = "RevisionNotFound" if OTHER in path else "EntryNotFound"
        return self._send(b"", "text/plain", status=404, code=code)

    def _send(self, data: bytes, kind: str, *, status: int = 200, code: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        if code:
            self.send_header("X-Error-Code", code)
        else:
            self.send_header("ETag", f'"{_etag(data)}"')
            self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)


def _etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


Read = Callable[..., list[list[Any]]]


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Read]:
    """(*settings, offline) -> what each source gives, in a new process that shares one cache."""
    home = tmp_path_factory.mktemp("hub")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def run(*settings: dict[str, object], offline: bool) -> list[list[Any]]:
        environment = {
            **os.environ,
            "HF_HOME": str(home / "cache"),
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HUB_OFFLINE": "1" if offline else "0",
            "PYTHONPATH": str(Path(__file__).parents[2]),
        }
        for name in ("HF_DATASETS_CACHE", "HF_HUB_CACHE", "HF_TOKEN", "HF_DATASETS_OFFLINE"):
            environment.pop(name, None)
        command = [sys.executable, "-c", READ, json.dumps(settings)]
        done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    yield run
    assert not (home / "ran").exists()
    server.shutdown()


def hub(name: str = "name", revision: str = COMMIT, **more: object) -> dict[str, object]:
    return {"source": f"hub:owner/{name}", "revision": revision, **more}


def test_c2_hub_datasets_at_a_commit_and_never_their_code(read: Read) -> None:
    whole, part, no_split, code, commit = read(
        hub(), hub(split="train[5:7]"), hub(split="test"), hub("code"), hub(revision=OTHER), offline=False
    )
    assert whole == [[row, f"hub:owner/name[train] row {number}"] for number, row in enumerate(ROWS, start=1)]
    assert part == [[row, f"hub:owner/name[train[5:7]] row {number}"] for number, row in enumerate(ROWS[5:7], start=1)]
    assert "test" in no_split[0]
    assert "check the name, `revision`, `subset` and `split`" in no_split[0]
    assert "consists of code, which is never run" in code[0]
    assert f"at {OTHER}" in commit[0]
    again, absent, other = read(hub(), hub("absent"), hub(revision=OTHER), offline=True)
    assert again == whole
    assert "HF_HUB_OFFLINE is set" in absent[0]
    assert f"hf download --repo-type dataset owner/absent --revision {COMMIT}" in absent[0]
    assert f"the cache holds another version of the dataset ({COMMIT})" in other[0]


def test_a_directory_of_the_same_name_is_not_taken_for_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="also a file or directory") as caught:
        list(read_hub(HubSource.model_validate(hub())))
    assert caught.value.problems[0].fix.endswith("`source: ./owner/name`")


@pytest.mark.parametrize(
    ("fault", "what"),
    [
        (ConnectionError("no route"), "the hub cannot be reached"),
        (ValueError("Unknown split 'x'"), "Unknown split 'x'"),
        (OSError(28, "No space left on device"), "No space left"),
    ],
)
def test_what_loading_raises_becomes_an_error_with_a_fix(fault: Exception, what: str) -> None:
    def load(*_: object, **__: object) -> Any:
        raise fault

    with pytest.raises(DataError, match=what) as caught:
        list(read_hub(HubSource.model_validate(hub()), load))
    assert caught.value.problems[0].where.startswith("hub:owner/name")
    assert caught.value.problems[0].fix


def test_a_split_without_rows_is_an_error() -> None:
    empty = SimpleNamespace(cache_files=[])
    empty.with_format = lambda _: SimpleNamespace(iter=lambda _: iter(()))

    class Empty(SimpleNamespace):
        def __len__(self) -> int:
            return 0

    (error,) = read_hub(HubSource.model_validate(hub()), lambda *_, **__: Empty(**vars(empty)))
    assert isinstance(error, DataError)
    assert "gives no row" in str(error)
