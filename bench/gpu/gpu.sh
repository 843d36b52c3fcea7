#!/usr/bin/env bash
# Build, tests, sanitizers and benchmarks on a machine with a GPU: one command, eight minutes.
#
#   bench/gpu/gpu.sh [DIRECTORY]     (or OUT=DIRECTORY bench/gpu/gpu.sh; default: bench/results/gpu-...)
#
# Needs no network: python3 with torch, Triton, pytest and matplotlib, nvcc, compute-sanitizer.
# Every stage has a time limit and a log; one that fails stops no other. The directory gets at most
# eight files: gpu.json, gpu.md, two plots and three logs (and gpu.partial, if the run is killed
# while a row is written). They are kept up to date, so that a run that is killed leaves what it
# had. Exit status: 0 if every stage succeeded.
#
# PYTHON: the interpreter (python3). BUDGET: seconds for everything (480).
set -uo pipefail
cd "$(dirname "$0")/../.." || exit 2

python=${PYTHON:-python3}
budget=${BUDGET:-480}
scratch=$(mktemp -d)
mkdir "$scratch/running"
results=$scratch/results
: >"$results"

seen=$("$python" -c '
import os, sys, torch
print(torch.cuda.get_device_name(0))
print("{}.{}".format(*torch.cuda.get_device_capability(0)))
print(os.path.dirname(sys.executable))') || {
  echo "gpu.sh: $python sees no GPU" >&2
  exit 2
}
name=$(sed -n 1p <<<"$seen" | sed 's/^NVIDIA //; s/[^A-Za-z0-9._-]/-/g')
arch=$(sed -n 2p <<<"$seen")
out=${1:-${OUT:-bench/results/gpu-$name-$(date +%Y%m%d-%H%M)}}
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
rm -f "$out"/{gpu.json,gpu.partial,gpu.md,sweeps.png,steps.png,build.log,tests.log,bench.log}

export PYTHONPATH=$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH} # instead of an installation
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export TRITON_CACHE_DIR=$scratch/triton TORCHINDUCTOR_CACHE_DIR=$scratch/inductor
# The interpreter may be a link into an environment that is not on the PATH, and ninja is there.
export PATH=$(sed -n 3p <<<"$seen"):$PATH:${CUDA_HOME:-/usr/local/cuda}/bin
unset TRITON_INTERPRET ZO_FUSED_BACKEND

say() { printf '[%3d s] %s\n' "$SECONDS" "$*"; }

# stage NAME LIMIT LOG COMMAND...: runs a command, notes how it ended. At the limit it gets $stop.
stop=TERM
stage() {
  local name=$1 limit=$2 log=$3 start=$SECONDS code=0 verdict
  shift 3
  ((limit < 5)) && limit=5
  printf '\n==== %s (at most %d s): %s\n' "$name" "$limit" "$*" >>"$log"
  timeout -s "$stop" -k 10 "$limit" "$@" >>"$log" 2>&1 </dev/null &
  local process=$!
  : >"$scratch/running/$process"
  wait $process || code=$? # which a signal ends, unlike a command
  rm -f "$scratch/running/$process"
  case $code in
    0) verdict=ok ;;
    124 | 137) verdict="out of time" ;;
    *) verdict="FAILED ($code)" ;;
  esac
  printf '%s\t%s\t%d s\n' "$name" "$verdict" "$((SECONDS - start))" >>"$results"
  say "$name: $verdict"
  return "$code"
}

# What there is so far, for whoever finds the directory.
gather() {
  local name
  {
    printf 'Stages so far:\n'
    cat "$results"
    cat "$scratch"/tests-*.log "$scratch"/sanitizer-*.log
  } >"$scratch/tests.log" 2>/dev/null
  cat "$scratch"/bench-*.log >"$scratch/bench.log" 2>/dev/null
  for name in tests bench; do cp "$scratch/$name.log" "$out/$name.log"; done
}

(while sleep 2 && kill -0 $$ 2>/dev/null; do gather; done) &
gathering=$!

killed() {
  trap - TERM INT
  kill $gathering $(ls "$scratch/running") 2>/dev/null
  gather
  say "killed; what there is lies in $out"
  rm -rf "$scratch"
  exit 143
}
trap killed TERM INT

# ---- build ---------------------------------------------------------------------------------------

{
  date -u
  nvidia-smi
  nvidia-smi --query-gpu=clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit --format=csv
  nvcc --version
  "$python" --version
  "$python" -m pip list 2>/dev/null |
    grep -iE '^(torch|triton|numpy|pytest|hypothesis|setuptools|ninja) '
  git describe --always --dirty
} >"$out/build.log" 2>&1

export TORCH_CUDA_ARCH_LIST=$arch
say "$name, compute capability $arch; results in $out"
ZO_FUSED_NATIVE=cuda stage "build" 200 "$out/build.log" "$python" setup.py build_ext --inplace ||
  ZO_FUSED_NATIVE=cpu stage "build without CUDA" 60 "$out/build.log" \
    "$python" setup.py build_ext --inplace

# ---- kernels -------------------------------------------------------------------------------------

# Triton compiles a kernel for every form of a sweep, 170 in all: once, on all cores, for all tests.
workers=$(($(nproc) < 14 ? $(nproc) : 14))
compiling=()
for ((part = 0; part < workers; part++)); do
  OMP_NUM_THREADS=1 stage "kernels $part" 100 "$scratch/tests-0-kernels-$part.log" \
    "$python" -m bench.gpu.sanitize --backend triton --run-only --part $part $workers &
  compiling+=($!)
done
wait "${compiling[@]}"

# ---- checks, side by side: nothing here is timed -------------------------------------------------

# pytest FILES...: warnings are shown, and fail nothing.
tests() {
  local name=$1 stop=INT # pytest then still tells what failed
  shift
  stage "$name" "$checks" "$scratch/tests-$name.log" "$python" -m pytest --require-gpu -v \
    --tb=short -rs -W default -p no:cacheprovider --timeout="$checks" "$@"
}

# sanitize TOOL OPTIONS...
sanitize() {
  local tool=$1
  shift
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 stage "$tool" "$checks" "$scratch/sanitizer-$tool.log" \
    compute-sanitizer --tool "$tool" --error-exitcode 86 --print-limit 20 "$@" \
    "$python" -m bench.gpu.sanitize --backend cuda --guard 0
}

checks=$((budget - 215 - SECONDS)) # the benchmarks take about two minutes, and may take more
((checks > 170)) && checks=170
((checks < 60)) && checks=60
compiles=(tests/sweeps/test_triton_compile.py) # needs no GPU, but takes this machine's Triton
marked=()
for file in $(grep -rlE 'mark\.gpu\b' tests --include='test_*.py'); do
  case $file in
    *test_triton*.py | *test_cuda.py) ;;
    *) marked+=("$file") ;;
  esac
done
(
  export OMP_NUM_THREADS=2
  export CUDA_MODULE_LOADING=EAGER # a kernel that loads while a graph is captured ends the capture
  tests gpu -m gpu -k "not every_operator" "${marked[@]}" &
  tests gpu-sweeps -m gpu -k "every_operator and not moments" tests/sweeps/test_gpu.py &
  tests gpu-moments -m gpu -k "every_operator and moments" tests/sweeps/test_gpu.py &
  for file in tests/sweeps/test_triton*.py tests/sweeps/test_cuda.py; do
    [[ -e $file && $file != "${compiles[0]}" ]] && tests "$(basename "$file" .py)" "$file" &
  done
  for some in "triton and lowrank" "triton and moments" "triton and not (lowrank or moments)" cuda; do
    tests "parity of $some" -m "not slow" -k "$some" tests/sweeps/test_parity.py &
  done
  [[ -e ${compiles[0]} ]] && tests "triton-compile" "${compiles[@]}" &
  sanitize memcheck --report-api-errors no &
  sanitize racecheck &
  # Tiny benchmarks: whether they run, and their kernels into the caches.
  for dtype in fp16 bf16 fp32; do
    stage "rehearsal $dtype" "$checks" "$scratch/bench-$dtype.log" \
      "$python" -m bench.gpu.main --quick --dtypes "$dtype" --budget "$checks" \
      --out "$scratch/rehearsal-$dtype" &
  done
  # What the instructions promise, to be laid beside what is measured.
  timeout "$checks" "$python" -m bench.gpu.sass --json "sm_${arch/./}" \
    >"$scratch/sass.json" 2>"$scratch/bench-sass.log" &
  wait
) &
wait $!
# ---- benchmarks, alone ---------------------------------------------------------------------------

left=$((budget - SECONDS - 5))
((left > 290)) && left=290
((left < 60)) && left=60
predictions=()
[[ -s $scratch/sass.json ]] && predictions=(--sass "$scratch/sass.json")
stage "benchmarks" "$left" "$scratch/bench-z.log" \
  "$python" -m bench.gpu.main --out "$out" --budget "$((left - 20))" "${predictions[@]}"
# Killed, it left rows but no page.
[[ -e $out/gpu.json && ! -e $out/gpu.md ]] &&
  stage "report" 30 "$scratch/bench-z.log" "$python" -m bench.gpu.report "$out"

kill $gathering
gather

# ---- summary -------------------------------------------------------------------------------------

counts() { # the last line of each pytest run
  grep -hE '^=+ .*(passed|failed|error|skipped|deselected|no tests ran).* =+$' "$out/tests.log" |
    sed 's/^=* //; s/ =*$//'
}
{
  printf '\n## Stages\n\n| stage | result | time |\n|---|---|---|\n'
  sed 's/\t/ | /g; s/^/| /; s/$/ |/' "$results"
  printf '\nTests: %s.\n' "$(counts | paste -sd ';' | sed 's/;/; /g')"
} >>"$out/gpu.md"

echo
sed -n '/^## Goals/,/^## /{/^|/p}' "$out/gpu.md"
echo
grep -hE '^(FAILED|ERROR) ' "$out/tests.log" | head -20
counts
column -t -s $'\t' "$results" 2>/dev/null || cat "$results"
failures=$(grep -cv $'\tok\t' "$results")
rm -rf "$out/gpu.partial" "$scratch"
trap - TERM INT
say "done, $failures stages failed: $out"
exit "$((failures > 0))"
