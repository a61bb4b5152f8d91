"""Ends with an error where the coverage of the last run is below the floor, or so far above it that the floor rises.

    python -m slipcover --threshold 1000000000 --source keras_vits,edge --json --out out/coverage.json -m pytest
    python tools/coverage_floor.py

The floor, in percent of the lines of keras_vits and edge, only rises. `make test` asks after the run that has all
tests. SlipCover counts at little cost, where others double the time; lines that only other processes run are missed.
"""

import json
import pathlib
import sys

FLOOR = 95.0
SLACK = 2.0  # points above the floor: what a machine without a browser or an emulator may lack
RESULT = pathlib.Path(__file__).parents[1] / "out" / "coverage.json"


def main() -> int:
    total = json.loads(RESULT.read_text(encoding="utf-8"))["summary"]["percent_covered"]
    print(f"Coverage: {total:.1f} % of the lines; the floor is {FLOOR:g} %.")
    if total < FLOOR:
        print(f"Test what was added: {RESULT} names the lines that no test runs.", file=sys.stderr)
    elif total >= FLOOR + SLACK:
        print(f"Raise FLOOR in tools/coverage_floor.py to {total - SLACK / 2:.0f}.", file=sys.stderr)
    return not FLOOR <= total < FLOOR + SLACK


if __name__ == "__main__":
    sys.exit(main())
