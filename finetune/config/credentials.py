"""Tokens and keys do not belong into a configuration, which is copied into every run directory: they are refused, and never shown."""

from __future__ import annotations

import re
from dataclasses import replace

from finetune.config.hints import nearest
from finetune.config.tree import KeyPath, Node, dotted
from finetune.errors import Problem

_SECRET_KEY = re.compile(
    r"(?:^|[_-])(?:token|api[_-]?key|apikey|passw(?:or)?d|passphrase|secret(?:[_-]key)?|access[_-]?key|private[_-]?key|credentials?|wandb[_-]?key|auth)$",
    re.IGNORECASE,
)
_SPECIAL_TOKEN = re.compile(r"^(?:eos|bos|pad|unk|sep|cls|mask|image|stop|additional_special)[_-]token$", re.IGNORECASE)
_SECRET_VALUES = (
    (re.compile(r"hf_[A-Za-z0-9]{16,}"), "Hugging Face"),
    (re.compile(r"api_org_[A-Za-z0-9]{16,}"), "Hugging Face"),
    (re.compile(r"wandb_v[0-9]_[A-Za-z0-9_]{16,}"), "Weights & Biases"),
    (re.compile(r"^(?:local-)?[0-9a-f]{40}$"), "Weights & Biases"),  # the whole value: paths into caches contain commits
    (re.compile(r"(?<![A-Za-z0-9])sk-[A-Za-z0-9_-]{16,}"), "an API"),
    (re.compile(r"gh[pousr]_[A-Za-z0-9]{20,}|github_pat_[A-Za-z0-9_]{20,}"), "GitHub"),
    (re.compile(r"(?<![A-Z0-9])(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Z0-9])"), "AWS"),
    (re.compile(r"(?<=//)[^/@\s:]+:[^/@\s]+(?=@)"), "a web address"),
)
_KEYED_LINE = re.compile(
    r"((?:[A-Za-z0-9]+[_-])*(?:token|api[_-]?key|apikey|passw(?:or)?d|secret|access[_-]?key|private[_-]?key|wandb[_-]?key)[\"']?\s*[:=]\s*)"
    r"(?![0-9.]{1,9}\s*(?:[,}#]|$))(\S.*)",  # a short number is a misspelt max_tokens rather than a secret
    re.IGNORECASE,
)
MASK = "***"


def find_secrets(tree: Node) -> dict[KeyPath, Problem]:
    """A problem for every token, key or password in the tree."""
    problems = {}
    for path, node in tree.walk():
        kind = _kind(path, node)
        if kind:
            place = node.heading
            what = f"`{dotted(path)}` holds a secret, or looks like it: {kind}"
            problems[path] = Problem(what, str(place), _fix(kind), place.excerpt())
    return problems


def secret_values(tree: Node) -> frozenset[str]:
    """The text of every secret in the tree, so that no message repeats it."""
    contents = [tree.nearest(path).content for path in find_secrets(tree)]
    keys = [path[-1] for path in find_secrets(tree) if path and _looks_secret(str(path[-1]))]
    return frozenset(str(text) for text in (*contents, *keys) if isinstance(text, (str, int)) and len(str(text)) > 3)


def is_secret_key(key: str) -> bool:
    """Whether a key is named like a secret (special tokens of a tokenizer are not)."""
    return bool(_SECRET_KEY.search(key)) and not _SPECIAL_TOKEN.match(key)


def masked(problem: Problem, secrets: frozenset[str] = frozenset()) -> Problem:
    """The problem without any secret in its text."""
    return replace(
        problem,
        what=mask(problem.what, secrets),
        where=mask(problem.where, secrets),
        fix=mask(problem.fix, secrets),
        excerpt="\n".join(mask(line, secrets) for line in problem.excerpt.split("\n")),
    )


def mask(text: str, secrets: frozenset[str] = frozenset()) -> str:
    """The text with everything that looks like a secret replaced."""
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, MASK)
    for pattern, _ in _SECRET_VALUES:
        text = pattern.sub(MASK, text)
    return _KEYED_LINE.sub(lambda match: match[1] + MASK, text)


def _kind(path: KeyPath, node: Node) -> str | None:
    key = str(path[-1]) if path else ""
    if nearest(key, ("revision", "model_revision", "commit"), cutoff=0.7):  # a commit has the form of an old wandb key
        return None
    if is_secret_key(key) and _may_be_secret(key, node):
        return _owner(key)
    return _looks_secret(key) or (_looks_secret(node.content) if isinstance(node.content, str) else None)


def _looks_secret(text: str) -> str | None:
    return next((kind for pattern, kind in _SECRET_VALUES if pattern.search(text)), None)


def _may_be_secret(key: str, node: Node) -> bool:
    """A password may be a number; a token is text, and `max_token: 512` is a misspelt key."""
    if isinstance(node.content, str):
        return True
    return isinstance(node.content, int) and not isinstance(node.content, bool) and "token" not in key.lower()


def _owner(key: str) -> str:
    if "wandb" in key.lower():
        return "Weights & Biases"
    return "Hugging Face" if key.lower().startswith(("hf", "hub", "token", "use_auth")) else "a password or key"


def _fix(kind: str) -> str:
    login = {"Hugging Face": "log in once with `hf auth login`", "Weights & Biases": "log in once with `wandb login`"}
    return f"remove it (and revoke it if the file was shared); {login.get(kind, 'keep secrets in the environment')}"
