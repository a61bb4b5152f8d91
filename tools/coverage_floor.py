"""Ends with an error where the coverage of the last run is below the floor, or so far above it that the floor rises.

The floor is `fail_under` of [tool.coverage.report] in pyproject.toml, in percent of the lines of keras_vits and edge. It
only rises. `make test` asks after the run that has all tests; lines that only other processes run are not counted.
"""

import io
import sys

import coverage

SLACK = 2.0  # points above the floor: what a machine without a browser or an emulator may lack


def main() -> int:
    data = coverage.Coverage()
    data.load()
    floor = float(data.get_option("report:fail_under"))
    total = data.report(file=io.StringIO())
    print(f"Coverage: {total:.1f} % of the lines; the floor is {floor:g} %.")
    if total < floor:
        print("Test what was added: `coverage report --show-missing` names the lines.", file=sys.stderr)
    elif total >= floor + SLACK:
        print(f"Raise fail_under in pyproject.toml to {int(total - SLACK / 2)}.", file=sys.stderr)
    return not floor <= total < floor + SLACK


if __name__ == "__main__":
    sys.exit(main())
