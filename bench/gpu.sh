#!/usr/bin/env bash
# All that there is to verify and measure on a GPU, in pieces of under nine minutes each.
#
#   bench/gpu.sh OUT [PIECE...]             pieces that are done already (OUT/PIECE.done) are skipped
#   bench/gpu.sh --dry-run OUT [PIECE...]   the same on a machine without a GPU, small and without the sanitizers
#
# PYTHON (python3)    the interpreter; it has torch
# WHEELS              folder of wheels for a machine without internet
# Each piece writes OUT/PIECE.log, benchmarks their results beside it. The exit status is the number of failed pieces.
set -uo pipefail
cd "$(dirname "$0")/.."

dry_run=false
if [ "${1:-}" = --dry-run ]; then
  dry_run=true
  shift
fi
if [ $# -lt 1 ]; then
  sed -n '2,10s/^# \{0,1\}//p' "$0"
  exit 2
fi
mkdir -p "$1"
out=$(cd "$1" && pwd)
shift
all_pieces=(build tests_ops tests_rest memcheck racecheck device_time throughput loss suites autoattack)
pieces=("$@")
[ $# -gt 0 ] || pieces=("${all_pieces[@]}")

venv=.venv-gpu
python=$venv/bin/python
limit=530
workers=$(($(nproc) < 12 ? $(nproc) : 12)) # each has a CUDA context of its own
op_tests=(tests/test_cuda.py tests/test_loss.py tests/test_native.py tests/test_noise.py tests/test_member_convolution.py tests/test_chain.py tests/test_fused_training.py)

has_gpu() { "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; }

sanitize() {
  if $dry_run; then
    "$python" -m py_compile bench/every_kernel.py
  else
    compute-sanitizer --tool "$1" --error-exitcode 1 "$python" bench/every_kernel.py "${@:2}"
  fi
}

piece_build() {
  # The machine's own torch is used, not another copy; it may lie in a virtual environment itself.
  local parent=${PYTHON:-python3}
  "$parent" -m venv "$venv" || return
  "$parent" -c 'import site; print("\n".join(site.getsitepackages()))' >"$(echo "$venv"/lib/python*/site-packages)/parent.pth"
  local offline=()
  [ -z "${WHEELS:-}" ] || offline=(--no-index --find-links "$WHEELS")
  "$python" -m pip install --quiet "${offline[@]}" "setuptools>=77" cmake ninja pybind11 || return
  "$python" -m pip install --quiet "${offline[@]}" --no-build-isolation --editable '.[test,bench]' || return
  "$python" -m ceat_fast info
  $dry_run || has_gpu || { echo "no GPU: use --dry-run"; return 1; }
}

piece_tests_ops() { OMP_NUM_THREADS=1 "$python" -m pytest -q -n "$workers" "${op_tests[@]}"; }

piece_tests_rest() {
  local ignored=()
  for file in "${op_tests[@]}"; do ignored+=(--ignore "$file"); done
  OMP_NUM_THREADS=1 "$python" -m pytest -q -n "$workers" --dist loadfile "${ignored[@]}"
}

piece_memcheck() { sanitize memcheck; }
# Triton threads that hold copies of an element all write it: no race that matters, but one that is reported.
piece_racecheck() { sanitize racecheck native; }

piece_device_time() {
  local size=()
  ! $dry_run || size=(--batch 8 --steps 1)
  "$python" bench/device_time.py "${size[@]}" --json "$out/device_time.json"
}

piece_throughput() {
  local size=()
  ! $dry_run || size=(--quick)
  "$python" bench/throughput.py "${size[@]}" --out "$out/throughput"
}

piece_loss() { "$python" bench/loss.py --json "$out/loss.json" --rounds "$($dry_run && echo 3 || echo 21)"; }

piece_suites() {
  local short=()
  ! $dry_run || short=(--benchmark-max-time=0.05 --benchmark-min-rounds=1 -k "not bf16")
  "$python" -m pytest -q bench/suites --benchmark-json "$out/suites.json" "${short[@]}"
}

piece_autoattack() { "$python" bench/autoattack.py --quick --json "$out/autoattack.json"; }

failed=0
for piece in "${pieces[@]}"; do
  if ! declare -F "piece_$piece" >/dev/null; then
    echo "unknown piece '$piece'; allowed: ${all_pieces[*]}" >&2
    exit 2
  fi
  if [ -e "$out/$piece.done" ]; then
    echo "$piece: done before"
    continue
  fi
  echo "$piece: running, log in $out/$piece.log"
  began=$SECONDS
  export -f "piece_$piece" sanitize has_gpu
  # A piece runs in a shell of its own, which timeout can end with all that it started.
  if out=$out venv=$venv python=$python dry_run=$dry_run workers=$workers op_tests_text="${op_tests[*]}" \
    timeout --kill-after=10 $limit bash -c "read -ra op_tests <<<\"\$op_tests_text\"; piece_$piece" >"$out/$piece.log" 2>&1; then
    date -u +%FT%TZ >"$out/$piece.done"
    echo "$piece: passed in $((SECONDS - began)) s"
  else
    status=$?
    failed=$((failed + 1))
    echo "$piece: FAILED (exit $status) after $((SECONDS - began)) s; the end of its log:"
    tail -n 15 "$out/$piece.log"
  fi
done
exit $failed
