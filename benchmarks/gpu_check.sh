#!/usr/bin/env bash
# Tutti on a GPU in one call of under 8 minutes: tests/gpu, ceilings, throughput and MFU at 224 px, attention and block
# micro-benchmarks, a kernel profile. Results lie under $OUT (default: gpu_out). Without a GPU it runs toy sizes.
#
#   OUT=results bash benchmarks/gpu_check.sh
#   SKIP_TESTS=1  leaves tests/gpu out;   CELLS="base,224,256,bf16+compile+adamw ..."  chooses the cells
#   SECTIONS="attention"  chooses the micro-benchmarks (attention blocks; none: empty)
#   LIMIT=465     seconds after which no new section starts
#
# On a machine with torch and CUDA but without Tutti's other packages and without network, put their wheels into .gpu/
# first (40 MB for Python 3.12):
#   python3 -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
#     --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux_2_17_x86_64 \
#     --platform manylinux2014_x86_64 --platform manylinux1_x86_64 -d .gpu -c constraints.txt \
#     av pydantic pydantic-core annotated-types typing-inspection typing-extensions torchjd beartype lazy-loader
set -u -o pipefail
cd "$(dirname "$0")/.."
BEGAN=$(date +%s)
export BEGAN PYTHONUNBUFFERED=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
export OUT; OUT=$(realpath -m "${OUT:-gpu_out}"); mkdir -p "$OUT"
PYTHON=${PYTHON:-python3}
SITE=$(mktemp -d); trap 'rm -rf "$SITE"' EXIT

if ls .gpu/*.whl >/dev/null 2>&1 && ! "$PYTHON" -c 'import av, pydantic, torchjd, beartype, lazy_loader' 2>/dev/null; then
  "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$SITE/packages" .gpu/*.whl || exit 1
  export PYTHONPATH=$SITE/packages${PYTHONPATH:+:$PYTHONPATH}
fi
export PYTHONPATH=$PWD/src:$PWD/benchmarks${PYTHONPATH:+:$PYTHONPATH}
export TORCHINDUCTOR_CACHE_DIR=$SITE/inductor TORCHINDUCTOR_FX_GRAPH_CACHE=1

elapsed() { echo $(($(date +%s) - BEGAN)); }

{ date; command -v nvidia-smi >/dev/null && nvidia-smi; "$PYTHON" - <<'PY'
import platform
from importlib import metadata

import torch

print("python", platform.python_version(), "torch", torch.__version__, "cuda", torch.version.cuda)
for name in ("av", "pydantic", "beartype", "jaxtyping", "numpy", "pyarrow", "torchjd"):
    print(name, metadata.version(name))
PY
} >"$OUT/env.txt" 2>&1 || { cat "$OUT/env.txt"; exit 1; }

STATUS=0
if [ -z "${SKIP_TESTS:-}" ]; then
  echo "== tests/gpu ($(elapsed) s)"
  timeout 190 "$PYTHON" -m pytest tests/gpu -q -n "${WORKERS:-$(( ($(nproc) + 1) / 2 ))}" -p no:cacheprovider --timeout 180 --durations 8 \
    >"$OUT/pytest.txt" 2>&1 || STATUS=1
  grep -E '^(FAILED|ERROR)|passed|failed' "$OUT/pytest.txt" | tail -15
fi
echo "== throughput ($(elapsed) s)"
timeout $((500 - $(elapsed))) "$PYTHON" benchmarks/gpu_check.py 2>&1 | tee "$OUT/gpu_check.log" || STATUS=1
echo "== done ($(elapsed) s); results in $OUT"
exit $STATUS
