# shellcheck shell=bash
# Makes .venv and keeps it in line with a requirements file. Sourced by deploy-swarm.sh and
# tools/test-environment, which run in the project's root.

readonly venv=.venv
readonly oldest_python=3.11

say() { printf '==> %s\n' "$*" >&2; }

die() {
    printf '%s: %s\n' "${0##*/}" "$*" >&2
    exit 1
}

# Runs a command as root.
as_root() {
    if [[ $EUID -eq 0 ]]; then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo -- "$@"
    else
        die "'$*' needs root, but you are not root and there is no sudo. Run this as root, or install sudo."
    fi
}

# Installs Debian packages.
install_packages() {
    command -v apt-get >/dev/null || die "$* must be installed, and there is no apt-get to do it."
    say "Installing $*"
    as_root apt-get update --quiet=2
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install --yes --quiet=2 --no-install-recommends "$@"
}

# Says whether a Python runs and is new enough. One that is only named (a shim) does not run.
is_new_enough() {
    "$1" -c "import sys; sys.exit(sys.version_info < (${oldest_python/./, }))" 2>/dev/null
}

# Prints the newest Python that is new enough.
find_python() {
    local candidate
    for candidate in python3.14 python3.13 python3.12 python3.11 python3 /usr/bin/python3; do
        if is_new_enough "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    return 1
}

# Makes a venv. Debian's Python cannot until its package python3-venv is there.
make_venv() {
    local python=$1
    if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        command -v apt-get >/dev/null ||
            die "$python cannot make a virtual environment (no ensurepip). Install the venv package of your Python."
        install_packages "python$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')-venv"
    fi
    rm -rf -- "$venv"
    "$python" -m venv "$venv"
}

# Brings .venv to what a requirements file says, files that it names included. The stamp is their
# content: a second run finds it and is done.
prepare_venv() {
    local requirements=$1 stamp python content
    stamp=$venv/.${requirements%.txt}
    content=$(cat requirements*.txt)
    if [[ -e $stamp ]] && [[ $content == "$(<"$stamp")" ]] && "$venv/bin/python" -c 'import ansible' 2>/dev/null; then
        return
    fi
    if ! is_new_enough "$venv/bin/python" || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        python=$(find_python) ||
            die "Python $oldest_python or newer is needed, and no python3 here is. Found: $(python3 --version 2>&1 || true)."
        say "Making $venv with $("$python" --version) ($python)"
        make_venv "$python"
    fi
    say "Installing $requirements into $venv (once, about a minute)"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --requirement "$requirements"
    printf '%s\n' "$content" >"$stamp"
}
