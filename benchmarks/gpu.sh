#!/usr/bin/env bash
# What a GPU makes of the models: parity, training and inference against timm, attention's cost, profiles. One command,
# under eight minutes, on a bare machine with one NVIDIA GPU, Python 3.12, PyTorch, JAX with its CUDA plugin and timm:
#
#     bash benchmarks/gpu.sh                    appends its rows to benchmarks/results/gpu.jsonl, or to $OUT/gpu.jsonl
#     GPU_DRY_RUN=1 bash benchmarks/gpu.sh --record /tmp/rows.jsonl      small sizes, on a CPU: does it run?
#
# Such a machine has no Keras and may have no network: Keras and the packages that it needs beside JAX's travel as
# wheels, in benchmarks/wheels or in the folder that $WHEELS names. They come from
#
#     python3 -m pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
#         --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux_2_17_x86_64 \
#         --platform manylinux2014_x86_64 --platform manylinux1_x86_64 -d benchmarks/wheels \
#         keras==3.15.1 namex optree rich
#
# Rows are JSON lines with the fields of results/train.jsonl and some more; gpu.py says which parts there are. Each is
# printed and written as its measurement ends, so that a run that is cut keeps what it has. What fails is a row whose
# `error` says why. $COMMIT is recorded as the commit, where the checkout is no clone.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
wheels=${WHEELS:-$here/wheels}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${PYTHON:-python3}
path=$here/..
if compgen -G "$wheels/*.whl" >/dev/null; then
    "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$work/site" "$wheels"/*.whl
    path=$path:$work/site
elif ! "$python" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("keras") is None)'; then
    echo "Keras is not installed, and $wheels has no wheels: download them as this file says at its top." >&2
    exit 1
fi
export PYTHONPATH=$path${PYTHONPATH:+:$PYTHONPATH}
export PYTHONDONTWRITEBYTECODE= KERAS_HOME=$work/keras MPLCONFIGDIR=$work HF_HUB_OFFLINE=1
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$work/jax} TORCHINDUCTOR_CACHE_DIR=$work/inductor
export TRITON_CACHE_DIR=$work/triton TORCHINDUCTOR_COMPILE_THREADS=${TORCHINDUCTOR_COMPILE_THREADS:-4}
[[ ${GPU_DRY_RUN:-} ]] || nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
"$python" -P "$here/gpu.py" "$@"
