"""`python -m kvcag.cli`."""

from kvcag.cli import main

main()
