# shellcheck shell=bash
# Sourced, not run: install_engine [EXTRA ...] makes .venv in the project's root, installs the tested set of versions
# into it, and activates it. A second call finds a stamp in .venv and only activates. Non-zero means that it failed.
#
#   source launch/install.sh
#   install_engine test
#
# PYTHON names the interpreter that .venv is made from (default: python3). CXX names the C++ compiler. pip reads its own
# settings.

PROJECT_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"

install_engine() {
    if [[ "$PROJECT_ROOT" == *[[:space:]]* ]]; then
        echo "install: there is a space in $PROJECT_ROOT; DeepSpeed's commands do not run from such a path." >&2
        return 1
    fi
    check_compiler || return 1
    # A subshell, so that the lock is let go on every way out. It lies outside .venv, which may be made anew.
    (
        if command -v flock >/dev/null; then
            exec 9>"$PROJECT_ROOT/.venv.lock"
            if ! flock --nonblock 9; then
                echo "install: another install is running in $PROJECT_ROOT; waiting for it"
                flock 9
            fi
        fi
        install_into_venv "$@"
    ) || return 1
    # shellcheck source=/dev/null
    source "$PROJECT_ROOT/.venv/bin/activate"
}

# DeepSpeed compiles its operators when they are first used: without a compiler a run fails late and obscurely.
check_compiler() {
    local candidate
    if [[ -n "${CXX:-}" ]]; then
        # CXX may hold a launcher or flags, as in "ccache g++"; its first word is the command.
        command -v "${CXX%% *}" >/dev/null && return 0
        echo "install: CXX is \"$CXX\", and there is no such command. Correct it, or unset it." >&2
        return 1
    fi
    for candidate in c++ g++ clang++; do
        if command -v "$candidate" >/dev/null; then
            # torch calls "c++" unless CXX says otherwise.
            [[ "$candidate" == c++ ]] || export CXX="$candidate"
            return 0
        fi
    done
    echo "install: no C++ compiler (c++, g++ or clang++) found; DeepSpeed needs one. Install it, for example with" >&2
    echo "  apt install g++      or      dnf install gcc-c++      or      conda install gxx" >&2
    return 1
}

# Called in a subshell under a lock. Every step says `|| return 1`: `set -e` is off inside `( ... ) || ...`.
install_into_venv() {
    cd "$PROJECT_ROOT" || return 1
    local python=.venv/bin/python stamp=.venv/.install_stamp started=$SECONDS
    local fingerprint="" installed="" extras torch

    if venv_is_usable; then
        fingerprint="$(install_fingerprint)" || return 1
        if [[ -f "$stamp" ]]; then
            installed="$(sed -n 2p "$stamp")"
            if [[ "$(sed -n 1p "$stamp")" == "$fingerprint" && "$installed" == "$(union "$installed" "$@")" ]]; then
                return 0
            fi
        fi
    else
        make_venv || return 1
        fingerprint="$(install_fingerprint)" || return 1
    fi

    # From here until the end there is no stamp, so an install that was cut short is done again. Extras installed
    # earlier are kept: quickstart.sh and tests/run.sh may take turns.
    rm -f "$stamp" || return 1
    extras="$(union "$installed" "$@")"
    torch="$(grep '^torch==' constraints.txt)" || { echo "install: constraints.txt pins no torch" >&2; return 1; }

    # torch comes first and by itself: its build (CPU, CUDA) is then settled, and the second step leaves it alone.
    echo "install: $torch"
    pip_install "$torch" || return 1
    echo "install: rlhf-engine${extras:+[$extras]} and its dependencies"
    pip_install --editable ".${extras:+[$extras]}" || return 1

    printf '%s\n%s\n' "$fingerprint" "$extras" >"$stamp.new" && mv "$stamp.new" "$stamp" || return 1
    echo "install: done in $((SECONDS - started)) s"
}

# A .venv that was copied or moved here still points to where it was made; one that was cut short may have no pip.
venv_is_usable() {
    [[ -f .venv/bin/activate ]] && grep -qF "$PROJECT_ROOT/.venv" .venv/bin/activate &&
        .venv/bin/python -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

make_venv() {
    local base="${PYTHON:-python3}" version
    if ! version="$("$base" -c 'import platform; print(platform.python_version())' 2>/dev/null)"; then
        echo "install: $base does not run. Install Python 3.11 or newer, or name one: PYTHON=/path/to/python3.12" >&2
        return 1
    fi
    if ! "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        echo "install: Python 3.11 or newer is needed, $base is $version ($(command -v "$base"))." >&2
        echo "  Install a newer one, or name one: PYTHON=python3.12" >&2
        return 1
    fi
    # DeepSpeed's operators are Python extensions. Debian and others keep the headers in a package of their own.
    if [[ ! -f "$("$base" -c 'import sysconfig; print(sysconfig.get_paths()["include"])')/Python.h" ]]; then
        echo "install: the headers of Python $version (Python.h) are missing; DeepSpeed's operators need them." >&2
        echo "  Install them, for example with      apt install python3-dev      or      dnf install python3-devel" >&2
        return 1
    fi
    echo "install: .venv with Python $version"
    if ! "$base" -m venv --clear .venv; then
        echo "install: $base could not make .venv. On Debian and Ubuntu: apt install python3-venv" >&2
        return 1
    fi
}

# What the installed set depends on, extras aside.
install_fingerprint() {
    .venv/bin/python - constraints.txt setup.py <<'PYTHON'
import hashlib, platform, sys

digest = hashlib.sha256(platform.python_version().encode())
for path in sys.argv[1:]:
    digest.update(open(path, "rb").read())
print(digest.hexdigest())
PYTHON
}

# union "bench,test" test -> bench,test
union() {
    printf '%s\n' "$@" | tr ', ' '\n\n' | sed '/^$/d' | LC_ALL=C sort -u | paste -s -d , -
}

# --use-pep517: older pips install an editable with `setup.py develop`, which setuptools has dropped.
pip_install() {
    local log=.venv/install.log
    if ! .venv/bin/python -m pip install --quiet --no-input --disable-pip-version-check --use-pep517 \
        --constraint constraints.txt "$@" >"$log" 2>&1; then
        echo "install: pip failed; its last lines ($PROJECT_ROOT/$log has all):" >&2
        tail -n 20 "$log" | sed 's/^/  /' >&2
        return 1
    fi
}
