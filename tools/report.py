"""Rebuilds the report of a run from the files in its folder: `python -m tools.report runs/tiny`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from absl import app

from deepseek_jax.config import ConfigError
from deepseek_jax.evaluation.report import ReportError, write_report


def main(argv: Sequence[str]) -> int:
    """Writes `report.html` into each folder named on the command line and prints its path."""
    if len(argv) < 2:
        print("usage: python -m tools.report RUN_FOLDER [RUN_FOLDER …]", file=sys.stderr)
        return 2
    try:
        for folder in argv[1:]:
            print(write_report(folder))
    except (ReportError, ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    app.run(main)
