"""Runs the command line: `python -m kvcag`."""

from kvcag.cli import main

main()
