"""Make the report of each folder again: `python -m vwn.lab.report results/widths ...`.

It is made from report.json, or from the runs that have ended by now in the folder of a comparison.
"""

import argparse
from pathlib import Path

from vwn.lab.compare.finished import read_report
from vwn.lab.report.write import renew

parser = argparse.ArgumentParser(prog="python -m vwn.lab.report", description=__doc__)
parser.add_argument("folders", nargs="+", type=Path, help="folders whose report is to be made again")
for folder in parser.parse_args().folders:
    if not (report := read_report(folder)):
        parser.error(f"{folder} has neither a report.json nor a comparison's run that has ended")
    renew(report, folder)
