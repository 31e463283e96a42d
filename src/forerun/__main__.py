"""The command line, as `forerun` or `python -m forerun`. Ctrl-C while it is being imported is no mistake, either."""

from __future__ import annotations

import sys


def main() -> None:
    """The entry point of the `forerun` command."""
    try:
        from forerun import cli

        cli.main()
    except KeyboardInterrupt:
        print("forerun: interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
