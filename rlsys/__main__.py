"""The entry point of `rlsys` and `python -m rlsys`. An interrupt while the command line is imported is one line."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; see `rlsys.cli.main`."""
    try:
        from rlsys.cli import main as run

        run()
    except KeyboardInterrupt:
        print("stopped by SIGINT", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
