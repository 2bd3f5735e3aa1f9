"""How files store settings."""

from dataclasses import fields
from typing import Any


def stored_values(settings: Any) -> dict[str, Any]:
    """The values of a settings object by name, as files store them. A field marked "unless default"
    is left out at its default, because files written before the field existed do not have it."""
    return {
        field.name: getattr(settings, field.name)
        for field in fields(settings)
        if field.metadata.get("stored") != "unless default" or getattr(settings, field.name) != field.default
    }
