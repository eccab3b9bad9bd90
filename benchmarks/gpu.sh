#!/usr/bin/env bash
# All that needs a GPU, step by step, each under a time limit of its own; what was measured and printed is in FOLDER.
#
#     bash benchmarks/gpu.sh FOLDER [STEP ...]
#
# PYTHON is the interpreter (.venv/bin/python unless set). A machine without git sets COMMIT. Steps, and minutes they take:
#   tests 6, random 10, half 4     the tests that need a GPU; random cases; 2,000 training steps in half precision
#   tiles 4                        tiles, warps and stages of the kernels around the operator
#   kernels 2, fla 8               the operator beside attention and the copy floor; beside flash-linear-attention
#   deit 6, pyramid 4, mask-rcnn 3, resolution 5   backbones beside their peers
#   profile 2                      where the time of ViG-T and ViG-H-T goes
#   digits 6, r50 5                Mask R-CNN on all digit scenes, with ViG-H-T and with ResNet-50
#   study 35, accuracy 6           the comparison on digit scenes; its detectors for 1536 pixels at other resolutions
#   distributed 5                  two GPUs beside one (needs two)
# Without STEP: tests kernels deit pyramid mask-rcnn profile digits.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(mkdir -p "${1:?name the folder for the results}" && cd "$1" && pwd)
shift
python=${PYTHON:-.venv/bin/python}
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}
began=$(date +%s)
failed=()

# step NAME MINUTES COMMAND ...: runs it, and prints the end of what it printed.
step() {
    local name=$1 limit=$(($2 * 60)) status=0
    shift 2
    timeout "$limit" "$@" > "$out/$name.log" 2>&1 || status=$?
    printf '\n[%d s] %s: %s\n' $(($(date +%s) - began)) "$name" \
        "$([ $status = 0 ] && echo done || { [ $status = 124 ] && echo "stopped after $limit s" || echo "failed, $status"; })"
    tail -n 40 "$out/$name.log"
    [ $status = 0 ] || failed+=("$name")
}

scenes() { [ -d data/digit_scenes ] || "$python" tools/make_digit_scenes.py data/digit_scenes > "$out/scenes.log" 2>&1; }

full=configs/mmdet/digits/mask-rcnn
bench=kernels/benchmarks/bench_bigla.py
for name in ${@:-tests kernels deit pyramid mask-rcnn profile digits}; do
    case $name in
        tests) step tests 10 "$python" -m pytest -q -n 12 --dist worksteal -m 'gpu and not slow' ;;
        random) step random 12 "$python" -m pytest -q -n 12 -m gpu tests/kernels/gpu/test_random_cases_gpu.py ;;
        half) step half 10 "$python" -m pytest -q -n 4 -m gpu tests/engine/test_half_precision.py ;;
        kernels) step kernels 4 "$python" $bench --impls ours copy sdpa --out "$out/results.csv" ;;
        fla) step fla 15 "$python" $bench --timeout 800 --out "$out/results.csv" ;;
        tiles) step tiles 5 "$python" kernels/benchmarks/tune.py --out "$out/tiles.csv" ;;
        deit | pyramid | mask-rcnn | resolution)
            step "$name" 8 "$python" tools/benchmark.py --preset "$name" --seconds 0.3 --out "$out/$name.csv" ;;
        profile)
            for model in vig-gla-tiny vigh-gla-tiny; do
                step "profile-$model" 2 "$python" tools/profile.py $model --size 1024 --batch 8 --compiled \
                    --out "$out/profile-$model.csv"
            done ;;
        digits) scenes; step digits 8 "$python" tools/train.py ${full}_vigh-gla-tiny_fpn_full_digits.py --work-dir "$out/digits" ;;
        r50) scenes; step r50 8 "$python" tools/train.py ${full}_r50_fpn_full_digits.py --work-dir "$out/r50" ;;
        study)
            step study 40 "$python" tools/digits_study.py --minutes 36 --out "$out/digits_study.csv" \
                --picture "$out/digits_study.png" ;;
        accuracy)
            for model in vigh-gla-tiny:vigh-gla-tiny swin-tiny:swin-t-p4-w7 resnet-50:r50; do
                name=mask-rcnn_${model#*:}_fpn_amp-1536px_digits
                step "accuracy-${model%:*}" 5 "$python" tools/resolution_study.py configs/mmdet/digits/$name.py \
                    "$(cat work_dirs/digits_study/$name/last_checkpoint)" --name "${model%:*}" --out "$out/accuracies.csv" \
                    --sizes 256 384 512 768 1024 1536 2048 3072
            done ;;
        distributed) step distributed 8 "$python" benchmarks/distributed.py --out "$out/distributed.csv" ;;
        *) echo "no step $name: see the head of benchmarks/gpu.sh" >&2; exit 2 ;;
    esac
done
[ ${#failed[@]} = 0 ] || { echo "not done: ${failed[*]}"; exit 1; }
