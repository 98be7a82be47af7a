"""`python -m vwn`."""

from vwn.cli import main

main()
