"""Where torchtitan is imported, and what is said where it is not installed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import vwn

SOURCE = Path(vwn.__file__).parent


def test_every_import_of_torchtitan_is_in_one_package():
    files = [f for f in SOURCE.rglob("*.py") if re.search(r"\b(import|from) (torchtitan|spmd_types)", f.read_text())]
    assert files
    assert {f.relative_to(SOURCE).parts[0] for f in files} == {"titan"}


def test_without_torchtitan_one_sentence():
    code = "import sys; sys.modules['torchtitan'] = None; import vwn.titan"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stderr.splitlines()[-1] == "ImportError: vwn.titan needs torchtitan 0.3; pip install torchtitan==0.3.0"
