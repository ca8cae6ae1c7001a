#!/usr/bin/env bash
# Makes .venv from requirements.lock, once: when a stamp inside says that it is up to date, this takes a few milliseconds.
#
# PYTHON names the interpreter to use, such as PYTHON=python3.12. Proxies, mirrors and wheel directories are pip's own
# settings (pip config, PIP_*).
set -euo pipefail
cd "$(dirname "$0")/.."

readonly venv=.venv
readonly oldest=11 newest=14 # Python 3.x with wheels for every locked package

fail() {
    printf 'cannot set up .venv: %s\n' "$1" >&2
    exit 1
}

# Prints the minor version of a Python 3 that can be used, else nothing and the reason in $problem.
check_python() {
    local found major minor
    found=$("$1" -c 'import sys; print(*sys.version_info[:2])' 2>/dev/null) || {
        problem="$1 does not run"
        return 1
    }
    read -r major minor <<<"$found"
    if ((major != 3 || minor < oldest || minor > newest)); then
        problem="$1 is Python $major.$minor, and 3.$oldest to 3.$newest will do"
        return 1
    fi
    if ! "$1" -c 'import ensurepip, venv' 2>/dev/null; then
        problem="$1 comes without venv; install it, for example: apt install python3.$minor-venv"
        return 2
    fi
}

# Sets $python to an interpreter that will do.
choose_python() {
    local candidate problem="" first_problem="" code
    local candidates=(python3 python3.13 python3.12 python3.11 python3.14)
    if [[ -n ${PYTHON:-} ]]; then
        command -v "$PYTHON" >/dev/null || fail "there is no $PYTHON; install it, or leave PYTHON unset"
        candidates=("$PYTHON")
    fi
    for candidate in "${candidates[@]}"; do
        command -v "$candidate" >/dev/null || continue
        code=0
        check_python "$candidate" || code=$?
        if ((code == 0)); then
            python=$candidate
            return
        fi
        # An interpreter that lacks only venv is the one to complain about.
        if [[ -z $first_problem || $code == 2 ]]; then first_problem=$problem; fi
    done
    case $first_problem in
        "") fail "there is no python3; install it, for example: apt install python3 python3-venv" ;;
        *install*) fail "$first_problem" ;;
        *) fail "$first_problem; install one, for example: apt install python3 python3-venv, or name it: PYTHON=python3.12" ;;
    esac
}

# What the environment depends on: its place, since scripts hold it, and the files it is made from.
stamp_of() {
    { pwd -P; cat "$@"; } | sha256sum | cut -d' ' -f1
}

is_wanted_python() {
    [[ -z ${PYTHON:-} ]] || [[ $("$PYTHON" -V 2>/dev/null) == "$("$venv/bin/python" -V 2>/dev/null)" ]]
}

# On a terminal, one line that counts what pip has looked at; elsewhere nothing.
show_progress() {
    if [[ ! -t 2 ]]; then
        cat >/dev/null
        return
    fi
    awk -v wanted="$(grep -c '^[a-z0-9]' requirements.lock)" '
        /^Collecting / { printf "\r  %d of about %d packages", ++count, wanted; fflush() }
        /^Installing / { printf "\r  unpacking ...              "; fflush() }
        END { printf "\r%40s\r", "" }' >&2
}

pip_install() {
    local log=$venv/pip.log
    if ! "$venv/bin/python" -m pip install --disable-pip-version-check --no-input --progress-bar off "$@" 2>&1 |
        tee "$log" | show_progress; then
        grep -v '^Collecting\|^Ignoring\|^Looking\|^  Downloading\|^  Using cached' "$log" | tail -n 15 >&2 || true
        fail "pip could not install the dependencies; a proxy, mirror or wheel directory is pip's own setting (PIP_*)"
    fi
}

lock_stamp=$(stamp_of requirements.lock tools/bootstrap.sh)
project_stamp=$(stamp_of pyproject.toml)
if ! { [[ -x $venv/bin/python && -f $venv/stamp ]] && read -r had_lock had_project <"$venv/stamp"; }; then
    had_lock="" had_project=""
fi
if [[ $had_lock == "$lock_stamp" ]] && is_wanted_python && "$venv/bin/python" -c '' 2>/dev/null; then
    if [[ $had_project == "$project_stamp" ]]; then exit 0; fi
else
    choose_python
    echo "installing dependencies into .venv (once) ..." >&2
    "$python" -m venv --clear "$venv" || fail "$python -m venv failed (see above)"
    pip_install --require-hashes -r requirements.lock
    echo "$lock_stamp" >"$venv/stamp"
fi
pip_install --no-deps --no-build-isolation --no-index --editable .
"$venv/bin/python" -m pip --disable-pip-version-check check >"$venv/pip.log" 2>&1 ||
    fail "requirements.lock does not fit pyproject.toml, run 'make lock': $(head -n 1 "$venv/pip.log")"
printf '%s %s\n' "$lock_stamp" "$project_stamp" >"$venv/stamp"
