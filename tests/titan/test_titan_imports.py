"""Where torchtitan is imported."""

from __future__ import annotations

import re
from pathlib import Path

import vwn

SOURCE = Path(vwn.__file__).parent


def test_every_import_of_torchtitan_is_in_one_package():
    files = [f for f in SOURCE.rglob("*.py") if re.search(r"\b(import|from) (torchtitan|spmd_types)", f.read_text())]
    assert files
    assert {f.relative_to(SOURCE).parts[0] for f in files} == {"titan"}
