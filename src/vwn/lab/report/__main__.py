"""Make the report of each folder again: `python -m vwn.lab.report results/widths ...`.

It is made from report.json, or from the runs that have ended by now in the folder of a comparison.
"""

import sys
from pathlib import Path

from vwn.lab.compare.finished import read_report
from vwn.lab.report.write import renew

if len(sys.argv) < 2:
    sys.exit("give the folders whose report is to be made again, such as results/widths")
for folder in map(Path, sys.argv[1:]):
    report = read_report(folder)
    if not report:
        sys.exit(f"{folder} has neither a report.json nor a comparison's run that has ended")
    renew(report, folder)
