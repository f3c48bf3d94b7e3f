"""What an idle pool takes of the machine's memory, container by container (`docker stats`)."""

from collections import defaultdict

from target import docker, parser, show, target

MIB = {"B": 2**-20, "KiB": 2**-10, "MiB": 1.0, "GiB": 2.0**10}


def used(text: str) -> float:
    """Read what `docker stats` prints, such as `36.35MiB / 2GiB`; return MiB."""
    amount = text.split("/", maxsplit=1)[0].strip()
    unit = amount.lstrip("0123456789.")
    return float(amount.removesuffix(unit)) * MIB[unit]


def main() -> None:
    options = parser(__doc__)
    given = options.parse_args()
    pool = target(given)
    with pool.client() as client:
        pool.wait_idle(client)
    rows: dict[str, list[float]] = defaultdict(list)
    label = f"label=com.docker.stack.namespace={pool.stack}"
    containers = docker("ps", "--quiet", "--filter", label).split()
    stats = docker("stats", "--no-stream", "--format", "{{.Name}}\t{{.MemUsage}}", *containers)
    for line in sorted(stats.splitlines()):
        name, usage = line.split("\t")
        rows[name.removeprefix(f"{pool.stack}_").split(".")[0]].append(used(usage))
    show(rows, unit="MiB")
    worst = max(rows["claude-api"]) * 2**20 / 1e6
    verdict = "met" if worst < 80 else "MISSED"
    print(f"target: an idle replica under 80 MB: {worst:.0f} MB, {verdict}")


if __name__ == "__main__":
    main()
