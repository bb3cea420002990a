#!/usr/bin/env bash
# Everything that needs a GPU, in stages of under nine minutes, each resumable:
#   benchmarks/gpu_check.sh build|test|bench|sanitize [OUT]
# A stage leaves OUT/STAGE.done when it has passed and is then skipped; FORCE=1 runs it again. OUT defaults to
# ${OUT:-gpu-check}. PYTHON names the interpreter, by default .venv/bin/python where there is one.
set -euo pipefail
cd "$(dirname "$0")/.."

stage="${1:-}"
out="${2:-${OUT:-gpu-check}}"
limit="${LIMIT_S:-530}"
if [ -z "${PYTHON:-}" ]; then
  if [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; else PYTHON=python3; fi
fi

die() { echo "gpu_check: $1" >&2; exit "${2:-1}"; }

case "$stage" in
  build | test | bench | sanitize) ;;
  *) die "usage: benchmarks/gpu_check.sh build|test|bench|sanitize [OUT]" 64 ;;
esac
"$PYTHON" -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else 1)' 2>/dev/null ||
  die "needs a CUDA device, and $PYTHON sees none" 2
mkdir -p "$out"
if [ -e "$out/$stage.done" ] && [ -z "${FORCE:-}" ]; then
  echo "gpu_check: $stage is done ($out/$stage.done); FORCE=1 runs it again"
  exit 0
fi
run() { echo "+ $*"; timeout "$limit" "$@"; }
# The runner is on PATH where the interpreter is; `python -m pytest` would take kernels/ for a top-level package.
pytest() { run "$PYTHON" -P -m pytest --import-mode=importlib "$@"; }

case "$stage" in
  build)
    run "$PYTHON" -m pip install --quiet --no-build-isolation --no-deps -e .
    run "$PYTHON" -c 'import json; from sinkprune import doctor; print(json.dumps(doctor.diagnose(), indent=1))' \
      | tee "$out/doctor.json"
    ;;
  test)
    # The kernel tests find the GPU and run there; the tests marked gpu have no CPU form.
    pytest tests/kernels tests/test_ops.py tests/test_sinks.py -m "not gpu" --junitxml "$out/tests.xml"
    pytest tests -m gpu --junitxml "$out/gpu-tests.xml"
    ;;
  bench)
    [ -e "$out/test.done" ] || die "no speed is reported while tests have not passed: run the test stage first"
    run "$PYTHON" benchmarks/kernels.py --out "$out" ${QUICK:+--quick} ${ONLY:+--only "$ONLY"}
    ;;
  sanitize)
    command -v compute-sanitizer >/dev/null || die "compute-sanitizer is not installed" 3
    for tool in memcheck racecheck; do
      if [ -e "$out/$tool.done" ] && [ -z "${FORCE:-}" ]; then continue; fi
      run compute-sanitizer --tool "$tool" --error-exitcode 1 "$PYTHON" -P -m pytest --import-mode=importlib \
        tests/kernels/test_attention.py tests/kernels/test_column_mass.py tests/kernels/test_sink_update.py \
        -k "odd or kept or shares or keys" -p no:cacheprovider
      touch "$out/$tool.done"
    done
    ;;
esac
touch "$out/$stage.done"
echo "gpu_check: $stage passed"
