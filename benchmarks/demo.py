"""Records runs of the demo: takes over the report of each as results/demo_<backend>.json.

keras-vits demo --backend jax --out out
python benchmarks/demo.py out [out2 ...]
"""

import json
import pathlib
import sys

import recording

if __name__ == "__main__":
    for folder in sys.argv[1:] or sys.exit(__doc__):
        record = json.loads((pathlib.Path(folder) / "report.json").read_text(encoding="utf-8"))
        recording.write_json(recording.RESULTS / f"demo_{record['backend']}.json", record)
