#!/bin/bash
# The whole GPU queue in one command, for a short lease on an offline machine:
#   tools/gpu.sh [section ...]     default: install tests bench sanitizer
# install takes the core out of dist/*.whl when one fits this Python (make wheel), else builds it here with all
# cores. Each section has its own time limit (seconds in <SECTION>_LIMIT) and is skipped when its
# stamp stands in $OUT, so that a second call goes on where the first was cut off. Logs and JSON go to
# $OUT (default build/gpu); a short table comes last. Rivals come from dist/rivals.tar.xz (python -m
# bench.carry). Benches run in order of worth, one file each, so that what was measured stays.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-build/gpu}
PYTHON=${PYTHON:-python3}
mkdir -p "$OUT"
export PYTHONPATH=. PYTHONUNBUFFERED=1

install() {
    local tag wheel
    tag=$($PYTHON -c 'import sys; print(f"cp{sys.version_info[0]}{sys.version_info[1]}")')
    wheel=$(ls dist/vlmkernels-*-"$tag"-"$tag"-*.whl 2>/dev/null | tail -1)
    if [ -n "$wheel" ]; then
        $PYTHON -m zipfile -e "$wheel" "$OUT/wheel" && cp "$OUT"/wheel/vlmkernels/_C.*.so vlmkernels/
    else
        CMAKE_BUILD_PARALLEL_LEVEL=$(nproc) make core PYTHON="$(command -v "$PYTHON")" PTXEMU=none
    fi && $PYTHON -m vlmkernels.info
    if [ -e dist/rivals.tar.xz ]; then
        $PYTHON -m bench.carry --unpack "$OUT/rivals" >"$OUT/rivals.path"
    fi
}
tests() { $PYTHON -m pytest tests/ops tests/nn tests/models -p no:cacheprovider -k cuda -n 4 -o faulthandler_timeout=60; }
bench() {
    [ -e "$OUT/rivals.path" ] && PYTHONPATH="$PYTHONPATH:$(cat "$OUT/rivals.path")"
    local failed=0
    for op in ${BENCH_OPS:-attention patch_embed vq_lookup contrastive_loss qformer_attention qwen_vl qwen2_vl qwen2_5_vl norm rope qk_norm_rope activation ring_attention clip llava vit null}; do
        [ -e "$OUT/bench_$op.done" ] && continue
        timeout 120 $PYTHON -m bench.run "$op" --device cuda --json "$OUT/bench_$op.json" && touch "$OUT/bench_$op.done" || failed=1
    done
    return $failed
}
sanitizer() {
    # torch's allocator would hide what a kernel writes past a tensor
    local tool failed=0
    for tool in memcheck synccheck; do
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $tool --error-exitcode 1 \
            --kernel-regex kns=vlmkernels $PYTHON -m pytest tests/ops -p no:cacheprovider -k "cuda and exact" || failed=1
    done
    return $failed
}

declare -A limit=([install]=240 [tests]=240 [bench]=540 [sanitizer]=300)
failed=0
for section in "${@:-install tests bench sanitizer}"; do
    for name in $section; do
        [ -e "$OUT/$name.done" ] && echo "$name: done before" && continue
        variable="${name^^}_LIMIT"
        export -f "$name"
        export OUT PYTHON
        start=$SECONDS
        if timeout "${!variable:-${limit[$name]}}" bash -c "set -o pipefail; $name" >"$OUT/$name.log" 2>&1; then
            touch "$OUT/$name.done" && state=ok
        else
            state="FAILED ($?)" && failed=1 && tail -30 "$OUT/$name.log"
        fi
        printf '%-10s %-12s %4d s  %s\n' "$name" "$state" $((SECONDS - start)) \
            "$(tail -1 "$OUT/$name.log" | cut -c1-100)" | tee -a "$OUT/summary.txt"
    done
done
[ -e "$OUT/bench.log" ] && tail -60 "$OUT/bench.log"
cat "$OUT/summary.txt"
exit $failed
