"""The published JSON schemas of results.json, for the tests."""

from __future__ import annotations

import json

from jsonschema import Draft202012Validator

from tests.conftest import ROOT


def check(which: str, results: dict) -> None:
    """Fail where `results` do not follow `which` schema, "induction" or "qk"; the schema itself must be valid too."""
    schema = json.loads((ROOT / "common" / "results" / f"{which}.schema.json").read_text(encoding="utf-8"))
    Draft202012Validator.check_schema(schema)
    errors = [f"{one.json_path}: {one.message[:200]}" for one in Draft202012Validator(schema).iter_errors(results)]
    assert errors == []


def fits_a_screen(shown: object) -> None:
    """Fail where a repr takes more than 24 lines of 100 characters."""
    lines = repr(shown).splitlines()
    assert 0 < len(lines) <= 24 and max(map(len, lines)) <= 100
