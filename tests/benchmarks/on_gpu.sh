#!/usr/bin/env bash
# What is measured on a lent GPU machine, which starts bare and has neither network nor much time: stages, in the order given.
#
#     OUT=folder bash tests/benchmarks/on_gpu.sh STAGE...
#
# Stage (about so many seconds on one H100; of features to job and extras by reckoning)   what
#   gate (350, 500 on a slow host)  the correctness gate; its verdict is kept for the sources as they are
#   cells (320)     the twelve cells of `make bench`, the largest model's once and others' twice; after `gate`, in one JSON file
#   extras (100)    1b shape: eos, the same with lengths told, 32 prefixes, long prompts; drawn tokens; no looking for prefixes
#   features (70)   what log-probabilities, penalties, JSON schemas and adapters cost
#   long (45)       8b shape: log-probabilities of prompts of 32,768 tokens
#   invariant (60)  the price of `batch_invariant`
#   start (30)      process start to first tokens, caches cold and warm
#   kernels (60)    each kernel alone
#   many (165)      20,000 rows in one call
#   load (150)      a 16 GB checkpoint from the local disk
#   job (90)        a whole Ray job beside its engine
#
# What the machine lacks is carried, 64 MiB a call: in .whl/ wheels (pytest, pytest-timeout, pytest-xdist, execnet, hypothesis,
# sortedcontainers, pluggy, iniconfig, gguf, llguidance; for `features` mistral-common; for `job` a trimmed ray, jsonschema,
# pydantic and what they need), in .part/ a piece of the demo's model a call (`split -b 50000000 -d ... part`).
set -uo pipefail
cd "$(dirname "$0")/../.."
out=${OUT:?a folder for results}
commit=${COMMIT:-$(git rev-parse --short HEAD 2>/dev/null || echo unknown)}
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 RAYDATA_LLM_DEMO_DIR=${RAYDATA_LLM_DEMO_DIR:-/root/demo}
model=$RAYDATA_LLM_DEMO_DIR/SmolLM2-135M-Instruct.Q4_1.gguf

take_what_was_carried() {
    if compgen -G '.whl/*.whl' >/dev/null; then
        python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site .whl/*.whl
        export PYTHONPATH=/tmp/site
    fi
    mkdir -p "$RAYDATA_LLM_DEMO_DIR"
    if compgen -G '.part/*' >/dev/null; then cp .part/* "$RAYDATA_LLM_DEMO_DIR"; fi
    # split -d's names; the digest is checked when the model is asked for.
    if [ ! -e "$model" ] && [ -e "$RAYDATA_LLM_DEMO_DIR/part01" ]; then cat "$RAYDATA_LLM_DEMO_DIR"/part?? >"$model"; fi
}

run() {
    local ended=0
    python3 -m "tests.benchmarks.$1" "${@:2}" >>"$out/$stage.log" 2>&1 || ended=$?
    [ "$ended" = 0 ] || failed=$ended
    echo "$stage: $1 ended with $ended"
    tail -n 16 "$out/$stage.log"
}

take_what_was_carried
failed=0
for stage in "$@"; do
    case $stage in
    gate) run bench --gate only ;;
    cells) run bench --runs 2 2 1 --commit "$commit" --out "$out/cells.json" ;;
    extras)
        run bench_engine --commit "$commit" --model llama-3.2-1b --workload eos eos-told prefixes long --runs 1 --out "$out/extras.json"
        run bench_engine --commit "$commit" --model llama-3.2-1b --workload decode --runs 2 --out "$out/drawn.json" \
            --sampling-params '{"temperature": 0.8, "top_p": 0.95, "top_k": 50}'
        run bench_engine --commit "$commit" --model llama-3.2-1b --workload decode classify --runs 2 --out "$out/no-looking.json" \
            --engine-kwargs '{"disable_cascade_attn": true}'
        ;;
    features) run bench_features --runs 1 --out "$out/features.json" ;;
    long) run bench_features --model llama-3.1-8b --case prompt-logprobs --runs 1 --out "$out/long.json" ;;
    invariant) run bench_invariant --model llama-3.2-1b --workload decode --runs 1 --out "$out/invariant.json" ;;
    start) run bench_start --model llama-3.2-1b --out "$out/start.json" ;;
    kernels) run bench_kernels --chosen --out "$out/kernels.json" ;;
    many) run bench_many --out "$out/many.json" ;;
    load) run bench_load --folder /tmp --out "$out/load.json" ;;
    job) run bench_job --out "$out/job.json" ;;
    *) echo "unknown stage $stage" >&2; exit 2 ;;
    esac
done
exit "$failed"
