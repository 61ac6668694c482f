"""Modules of torch's that may not be there."""

from __future__ import annotations

import importlib
from typing import Any


def imported(name: str) -> Any:
    """Returns the module of this name, or None."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None
