"""``python -m shardplan`` and the console script."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its status."""
    from shardplan.cli import run

    sys.exit(run(arguments))


if __name__ == "__main__":
    main()
