"""The crash tests use the installations of the end-to-end tests."""

from __future__ import annotations

from tests.e2e.conftest import make_system

__all__ = ["make_system"]
