#!/usr/bin/env bash
# All that there is to verify and measure on a GPU, in pieces of under nine minutes each, the most telling first.
#
#   bench/gpu.sh [--within SECONDS] OUT [PIECE...]   pieces that are done already (OUT/PIECE.done) are skipped
#   bench/gpu.sh --dry-run OUT [PIECE...]            the same without a GPU, small and without the sanitizers
#
# --within        no piece begins, and none goes on, after so many seconds: what is left is for the next call
# PYTHON          the interpreter (python3); it has torch
# WHEELS          folder of wheels for a machine without internet
# CEAT_FAST_DATA  folder with cifar-10-batches-py, for the pieces that train or judge on CIFAR-10 (data)
# Each piece writes OUT/PIECE.log, benchmarks their records beside it, which belong in bench/results/ with the GPU's
# name. The exit status is the number of pieces that failed or did not end.
set -uo pipefail
cd "$(dirname "$0")/.."

dry_run=false within=1000000
while [[ ${1:-} == --* ]]; do
  case $1 in
    --dry-run) dry_run=true ;;
    --within) within=$2 && shift ;;
    *) set -- ;;
  esac
  shift
done
if [ $# -lt 1 ]; then
  sed -n '2,12p' "$0" | sed 's/^# \{0,1\}//'
  exit 2
fi
mkdir -p "$1"
out=$(cd "$1" && pwd)
shift
all_pieces=(build tests_ops device_time throughput memcheck racecheck tests_rest loss suites training autoattack peers
  precision reproduction)
pieces=("$@")
[ $# -gt 0 ] || pieces=("${all_pieces[@]}")

venv=.venv-gpu
python=$venv/bin/python
limit=530
data=${CEAT_FAST_DATA:-data}
workers=$(($(nproc) < 12 ? $(nproc) : 12)) # each has a CUDA context of its own
op_tests=(tests/test_cuda.py tests/test_loss.py tests/test_native.py tests/test_noise.py tests/test_member_convolution.py
  tests/test_chain.py tests/test_fused_training.py)

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
  # For this GPU alone, unless asked otherwise: a quarter of the time.
  if ! $dry_run && [ -z "${TORCH_CUDA_ARCH_LIST:-}" ]; then
    TORCH_CUDA_ARCH_LIST=$("$parent" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())') || return
    export TORCH_CUDA_ARCH_LIST
  fi
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
  local size=(--batch 128 --steps 10 --rounds 5)
  ! $dry_run || size=()
  "$python" bench/throughput.py --quick "${size[@]}" --out "$out/throughput"
}

piece_loss() { "$python" bench/loss.py --json "$out/loss.json" --rounds "$($dry_run && echo 3 || echo 21)"; }

piece_suites() {
  local short=()
  ! $dry_run || short=(--benchmark-max-time=0.05 --benchmark-min-rounds=1 -k "not bf16")
  "$python" -m pytest -q bench/suites --benchmark-json "$out/suites.json" "${short[@]}"
}

# Against the loop in torch.compile's best mode, which compiles for minutes.
piece_peers() {
  local size=()
  ! $dry_run || size=(--batch 8 --steps 1 --members 1 --rounds 2)
  "$python" bench/throughput.py --parts pgd step --compile_mode max-autotune "${size[@]}" --out "$out/peers"
}

has_cifar10() { [ -d "$data/cifar-10-batches-py" ]; }

# Three epochs of the paper's training: images a second, data and all.
piece_training() {
  local run=(--config configs/cifar10_ceat_1_5.yaml --data.root "$data" --epochs 3 --precision bf16)
  ! $dry_run && has_cifar10 || run=(--config configs/digits_ceat.yaml --epochs 1)
  "$python" -m ceat_fast train "${run[@]}" --attack.precision auto --out "$out/run" --resume true
  cp "$out/run/metrics.jsonl" "$out/training.jsonl"
}

piece_autoattack() {
  local subject=(--quick)
  $dry_run || ! has_cifar10 || subject=(--ensembles "cifar10, resnet20" --root "$data" --images 1000)
  "$python" bench/autoattack.py "${subject[@]}" --runs "$out/runs" --json "$out/autoattack.json"
}

piece_precision() {
  local subject=(--run "$out/runs/cifar10_resnet20" --root "$data")
  [ -d "$out/runs/cifar10_resnet20" ] || subject=(--seeds 1)
  "$python" bench/precision.py "${subject[@]}" --json "$out/precision.json"
}

# The paper's 120 epochs. Trainings and judgements go on where an earlier call left them.
piece_reproduction() {
  local scale=(--scale paper --data_root "$data" --seeds 1 --only "EAT" "CEAT(1,5)" "CEAT(5,1)")
  ! $dry_run && has_cifar10 || scale=(--scale smoke --seeds 1 --only "CEAT(1,5)")
  "$python" -m ceat_fast reproduce table1 "${scale[@]}" --out "$out/reproduction"
}

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
  left=$((within - SECONDS < limit ? within - SECONDS : limit))
  if [ $left -lt 20 ]; then
    echo "$piece: no time left"
    failed=$((failed + 1))
    continue
  fi
  echo "$piece: running, log in $out/$piece.log"
  began=$SECONDS
  export -f "piece_$piece" sanitize has_gpu has_cifar10
  # A piece runs in a shell of its own, which timeout can end with all that it started.
  if out=$out venv=$venv python=$python dry_run=$dry_run workers=$workers data=$data op_tests_text="${op_tests[*]}" \
    timeout --kill-after=10 $left bash -c "read -ra op_tests <<<\"\$op_tests_text\"; piece_$piece" >"$out/$piece.log" 2>&1; then
    date -u +%FT%TZ >"$out/$piece.done"
    echo "$piece: passed in $((SECONDS - began)) s"
  else
    status=$?
    failed=$((failed + 1))
    ended=$([ $status -eq 124 ] && echo "stopped by the time limit" || echo "FAILED (exit $status)")
    echo "$piece: $ended after $((SECONDS - began)) s; the end of its log:"
    tail -n 15 "$out/$piece.log"
  fi
done
exit $failed
