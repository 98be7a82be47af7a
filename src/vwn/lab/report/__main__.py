"""Make the report of each folder again, from report.json or the runs of a comparison that have ended by now."""

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
