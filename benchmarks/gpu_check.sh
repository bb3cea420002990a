#!/usr/bin/env bash
# Build, test and measure everything that needs a GPU, within a budget; run again with the same state, it goes on.
#   benchmarks/gpu_check.sh [--budget 9m] [--state DIR] [--out DIR] [--only STAGE,...] [--despite-failures]
# Results, logs and the state go into OUT/gpu-check.tar.gz, also after a failure. Never asks the network (docs/gpu.md).
# Exit: 0 all done, 1 a stage failed, 2 no GPU or a package is missing, 64 usage, 75 out of time: run it again.
set -euo pipefail
cd "$(dirname "$0")/.."
STAGES=(build test sanitize quick-kernels quick-latency quick-repack kernels latency repack)
usage="usage: benchmarks/gpu_check.sh [--budget 9m] [--state DIR] [--out DIR] [--only STAGE,...] [--despite-failures]"
started=$SECONDS
die() { echo "gpu_check: $1" >&2; exit "${2:-1}"; }

budget=9m state=gpu-check/state out=gpu-check only= despite=
while [ $# -gt 0 ]; do
  case "$1" in
    --budget | --state | --out | --only)
      [ $# -gt 1 ] || die "$usage" 64
      declare "${1#--}=$2"; shift 2 ;;
    --despite-failures) despite=1; shift ;;
    *) die "$usage; stages: ${STAGES[*]}" 64 ;;
  esac
done
[[ "$budget" =~ ^([0-9]+)([sm]?)$ ]] || die "--budget is like 540s or 9m, got $budget" 64
budget_s=${BASH_REMATCH[1]}
[ "${BASH_REMATCH[2]}" != m ] || budget_s=$((budget_s * 60))
for stage in ${only//,/ }; do
  [[ " ${STAGES[*]} " == *" $stage "* ]] || die "--only knows ${STAGES[*]}, got $stage" 64
done
if [ -z "${PYTHON:-}" ]; then
  if [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; else PYTHON=python3; fi
fi
packing_s=15 # kept for the archive
left() { echo $((budget_s - packing_s - SECONDS + started)); }

# One line of facts; what it lacks ends the run before anything is built.
card=$("$PYTHON" -c '
import importlib.util, sys
needed = "torch triton transformers tokenizers safetensors numpy tqdm matplotlib jinja2 pybind11 setuptools pytest".split()
if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
    sys.exit("packages are missing: " + " ".join(missing))
import torch
if not torch.cuda.is_available():
    sys.exit("needs a CUDA device, and this Python sees none")
p = torch.cuda.get_device_properties(0)
print(f"{p.major}.{p.minor}", p.name)' 2>&1) || die "${card##*$'\n'}" 2
commit=$(git rev-parse HEAD 2>/dev/null || echo unknown)
mkdir -p "$state/results" "$out"
about="$commit on ${card#* }"
if [ -e "$state/about" ] && [ "$(cat "$state/about")" != "$about" ]; then
  die "$state is of $(cat "$state/about"), this is $about: name another --state" 64
fi
echo "$about" >"$state/about"

pack() {
  tar -czf "$out/gpu-check.tar.gz.part" -C "$state" --exclude=build.done . && mv "$out/gpu-check.tar.gz.part" "$out/gpu-check.tar.gz"
  echo "gpu_check: $out/gpu-check.tar.gz holds the results and the state"
}
trap pack EXIT

# The caller's command within what is left of the budget, its output kept.
run() { echo "+ $*"; timeout --kill-after=5 "$(($(left) > 1 ? $(left) : 1))" "$@"; }
pytest() { run "${sanitizer[@]}" "$PYTHON" -P -m pytest --import-mode=importlib -p no:cacheprovider "$@"; }
sanitizer=()
gpu_files() { grep -rl --include='*.py' 'mark\.gpu' tests | grep '/test_[^/]*$' | sort; }

stage_build() {
  SINKPRUNE_CUDA=1 TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST:-${card%% *}}" \
    run "$PYTHON" -m pip install --quiet --no-index --no-build-isolation --no-deps -e .
  run "$PYTHON" -c '
import json, sys
from sinkprune.commands import doctor
from sinkprune.ops import native
facts = doctor.diagnose()
json.dump(facts, open(sys.argv[1], "w"), indent=1)
if not native.serves("cuda"):
    sys.exit("gpu_check: the CUDA part of the extension is not there: " + str(facts["native"]))' "$state/results/doctor.json"
}
stage_test() {
  # The kernel tests find the GPU and run there; the tests marked gpu have no CPU form.
  pytest tests/kernels tests/ops -m "not gpu" --junitxml "$state/results/tests.xml"
  # shellcheck disable=SC2046
  pytest $(gpu_files) -m gpu --junitxml "$state/results/gpu-tests.xml"
}
stage_sanitize() {
  if ! command -v compute-sanitizer >/dev/null; then echo "skipped: compute-sanitizer is not installed"; return; fi
  local tool
  for tool in memcheck racecheck; do
    [ ! -e "$state/$tool.done" ] || continue
    sanitizer=(env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 1)
    pytest tests/kernels/test_attention.py tests/kernels/test_column_mass.py tests/kernels/test_sink_update.py -k odd
    touch "$state/$tool.done"
  done
}
stage_quick-kernels() { run "$PYTHON" benchmarks/kernels.py --quick --out "$state/results/quick"; }
stage_quick-latency() { run "$PYTHON" benchmarks/latency.py --device cuda --quick --resume --out "$state/results/quick"; }
stage_quick-repack() { run "$PYTHON" benchmarks/repack.py --device cuda --quick --out "$state/results/quick"; }
stage_kernels() { run "$PYTHON" benchmarks/kernels.py --resume --out "$state/results/full"; }
stage_latency() { run "$PYTHON" benchmarks/latency.py --device cuda --resume --out "$state/results/full"; }
stage_repack() { run "$PYTHON" benchmarks/repack.py --device cuda --out "$state/results/full"; }

failed=
for stage in "${STAGES[@]}"; do
  [ -z "$only" ] || [[ ",$only," == *",$stage,"* ]] || continue
  if [ -e "$state/$stage.done" ]; then echo "gpu_check: $stage is done"; continue; fi
  case "$stage" in
    build | test | sanitize) ;;
    *)
      if [ ! -e "$state/test.done" ] && [ -z "$despite" ]; then
        echo "gpu_check: $stage is left out: no speed is reported while tests have not passed (--despite-failures)"
        failed="$failed $stage"
        continue
      fi ;;
  esac
  if [ "$(left)" -lt 5 ]; then
    [ -z "$failed" ] || die "failed:$failed; out of time at $stage"
    die "out of time before $stage: run it again with --state $state" 75
  fi
  at=$SECONDS
  set +e # in an `||` list the subshell would go on after a failure
  (set -e; "stage_$stage") >"$state/$stage.log" 2>&1
  code=$?
  set -e
  tail -n "$([ $code = 0 ] && echo 3 || echo 40)" "$state/$stage.log"
  if [ $code = 0 ]; then
    touch "$state/$stage.done"
    echo "gpu_check: $stage passed in $((SECONDS - at)) s"
  elif [ $code = 124 ] || [ $code = 137 ]; then
    die "out of time in $stage: run it again with --state $state" 75
  else
    echo "gpu_check: $stage FAILED with code $code ($state/$stage.log)" >&2
    failed="$failed $stage"
    [ "$stage" != build ] || break
  fi
done
[ -z "$failed" ] || die "failed:$failed"
echo "gpu_check: everything passed"
