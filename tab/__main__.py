"""`python -m tab` is `tab`."""

import signal
import sys


def main() -> None:
    """The command line; Control-C before a command has begun ends it without a traceback."""
    try:
        from .cli.main import main

        main()
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    main()
