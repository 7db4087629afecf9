"""`python -m tightship`."""

from tightship.cli import main

main()
