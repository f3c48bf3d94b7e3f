"""How long `site.yml` takes on this machine: a cold deployment, one without changes, a teardown.

The stack is the benchmark's own and is gone in the end. The image is as this machine has it; with
--cold-image it is built under a name of its own, with its base where that is made here.
"""

import argparse
import json
import secrets
import socket
import subprocess
import tempfile

from playbook import play


def took(playbook: str, variables: dict[str, object]) -> float:
    """Run a playbook with these variables and return how long it took."""
    taken, _ = play(playbook, "--extra-vars", json.dumps(variables))
    return taken


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--cold-image", action="store_true", help="also build the image")
    options.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a variable of the roles"
    )
    given = options.parse_args()
    name = f"bench-{secrets.token_hex(3)}"
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as directory:
        variables: dict[str, object] = {
            "app_stack_name": name,
            "app_stack_port": port,
            "app_stack_workspace": f"{directory}/workspace",
            "docker_secrets_dir": f"{directory}/secrets",
            **dict(setting.split("=", 1) for setting in given.set),
        }
        if given.cold_image:
            variables["app_image_name"] = name
        else:
            # The image's own time is not part of a deployment that finds it.
            took("site.yml", variables)
            took("playbooks/teardown.yml", variables)
        try:
            kind = "image built" if given.cold_image else "image there"
            print(f"cold deployment, {kind}:  {took('site.yml', variables):6.1f} s", flush=True)
            print(f"no change:                    {took('site.yml', variables):6.1f} s", flush=True)
        finally:
            print(
                f"teardown:                     {took('playbooks/teardown.yml', variables):6.1f} s"
            )
            if given.cold_image:
                # Newest first, so that nothing is removed before what was built on it.
                listing = ["docker", "images", "--format", "{{.Repository}}:{{.Tag}}"]
                found = subprocess.run(listing, stdout=subprocess.PIPE, text=True, check=True)
                own = [image for image in found.stdout.split() if image.startswith(name)]
                subprocess.run(["docker", "rmi", *own], stdout=subprocess.DEVNULL, check=True)


if __name__ == "__main__":
    main()
