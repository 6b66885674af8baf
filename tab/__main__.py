"""`python -m tab` is `tab`."""

from .cli.main import main

main()
