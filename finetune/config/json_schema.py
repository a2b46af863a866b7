"""The schema as JSON Schema, for the completion and checks of editors."""

from __future__ import annotations

import json
from typing import Any

from finetune.config.schema import Config

_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_EXTENDS = {
    "description": "Presets under this file: a shipped recipe (`domain-knowledge`), a YAML file relative to this one, or a list of them, "
    "merged left to right. Mappings merge, lists are replaced; one level deep.",
    "anyOf": [{"type": "string", "minLength": 1}, {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1}],
}


def config_schema() -> dict[str, Any]:
    """For whole configurations. What a preset may bring is only required where nothing is extended."""
    schema = _relaxed("A run of finetune")
    schema["properties"] = {"extends": _EXTENDS, **schema["properties"]}
    required = [name for name, info in Config.model_fields.items() if info.is_required()]
    schema["if"] = {"not": {"required": ["extends"]}}
    schema["then"] = {"required": required}
    return schema


def preset_schema() -> dict[str, Any]:
    """For recipes and other presets: nothing is required."""
    return _relaxed("A preset of finetune, for `extends`")


def to_text(schema: dict[str, Any]) -> str:
    """The bytes that are shipped."""
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def _relaxed(title: str) -> dict[str, Any]:
    schema: dict[str, Any] = _partial(Config.model_json_schema())
    return {"$schema": _DIALECT, "title": title, **schema}


def _partial(schema: Any) -> Any:
    """The schema for files that state only a part: another layer may hold the rest, also the key that chooses a union's member."""
    if isinstance(schema, list):
        return [_partial(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {key: value for key, value in schema.items() if key not in ("required", "discriminator") and not _is_title(key, value)}
    # Without that key more than one member fits, which `oneOf` would refuse.
    return {("anyOf" if key == "oneOf" else key): _partial(value) for key, value in kept.items()}


def _is_title(key: str, value: object) -> bool:
    return key == "title" and isinstance(value, str)
