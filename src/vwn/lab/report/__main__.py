"""Make the report of each folder again from its report.json: `python -m vwn.lab.report results/widths ...`."""

import sys
from pathlib import Path

from vwn.lab.report.write import renew

if len(sys.argv) < 2:
    sys.exit("give the folders whose report.json is to be drawn again, such as results/widths")
for folder in sys.argv[1:]:
    if not (Path(folder) / "report.json").exists():
        sys.exit(f"there is no report.json in {folder}")
    renew(Path(folder))
