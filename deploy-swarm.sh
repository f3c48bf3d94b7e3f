#!/usr/bin/env bash
# Deploys the pool: makes .venv with Ansible in it, then runs site.yml. Every argument goes to ansible-playbook.
#
#   ./deploy-swarm.sh                                  on this machine
#   ./deploy-swarm.sh -i inventory/other               on the machines of another inventory
#   ./deploy-swarm.sh -e app_stack_replicas=10         with another setting
#   ./deploy-swarm.sh --check                          only say what would change
set -euo pipefail

cd -- "$(dirname -- "${BASH_SOURCE[0]}")"

# shellcheck source=tools/venv.sh
source tools/venv.sh

# Ansible wants a UTF-8 locale that exists; this one is part of every Debian.
export LC_ALL=C.UTF-8

# Says whether one of the arguments after the first is an option that is named in the first, a regular expression.
has_option() {
    local options=$1 argument
    shift
    for argument in "$@"; do
        [[ $argument =~ ^($options)$ ]] && return 0
    done
    return 1
}

main() {
    local -a become=()
    # On this machine roles act as root; elsewhere it is the other machine that is asked.
    if [[ $EUID -ne 0 ]] && ! has_option '-i.*|--inventory.*|--version|-h|--help' "$@"; then
        command -v sudo >/dev/null ||
            die 'You are not root and there is no sudo. Run this as root, or install sudo and let this user use it.'
        if ! sudo --non-interactive true 2>/dev/null &&
            ! has_option '-K|--ask-become-pass|--become-password-file.*|--become-pass-file.*' "$@"; then
            [[ -t 0 ]] ||
                die "sudo wants a password and there is no terminal to ask on. Give it with --become-password-file."
            become=(--ask-become-pass)
        fi
    fi
    prepare_venv requirements-ansible.txt
    say "Running site.yml"
    exec "$venv/bin/ansible-playbook" site.yml "${become[@]}" "$@"
}

main "$@"
