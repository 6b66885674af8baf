"""`python -m tab` is `tab`."""

from .cli import main

main()
