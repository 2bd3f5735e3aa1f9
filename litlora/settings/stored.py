"""How files store settings."""

from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any

import yaml

from litlora.settings.data import DataSource


def stored_values(settings: Any) -> dict[str, Any]:
    """The values of a settings object by name, as files store them. A field marked "unless default"
    is left out at its default, because files written before the field existed do not have it."""
    return {
        field.name: getattr(settings, field.name)
        for field in fields(settings)
        if field.metadata.get("stored") != "unless default"
        or getattr(settings, field.name) != _default(field)
    }


def _default(field: Field) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def dump(settings: Any) -> str:
    """Settings as YAML that `--config` of the same command takes back."""
    return yaml.safe_dump(_plain(settings), sort_keys=False, allow_unicode=True)


def _plain(value: Any) -> Any:
    """Dataclasses to mappings; a data source also says which one it is."""
    if not is_dataclass(value):
        return value
    values = {name: _plain(entry) for name, entry in stored_values(value).items()}
    if isinstance(value, DataSource):
        return {"class_path": type(value).__name__, "init_args": values}
    return values
