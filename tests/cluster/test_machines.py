"""The cluster is made of real machines: what is found there would be found on servers."""

from conftest import Node


def test_each_machine_runs_a_kernel_of_its_own(nodes: list[Node]) -> None:
    boots = {node.output("cat /proc/sys/kernel/random/boot_id") for node in nodes}
    assert len(boots) == len(nodes)


def test_each_machine_has_its_own_id(nodes: list[Node]) -> None:
    ids = {node.output("cat /etc/machine-id") for node in nodes}
    assert len(ids) == len(nodes)


def test_each_machine_has_the_name_that_the_inventory_gives_it(nodes: list[Node]) -> None:
    names = [node.output("hostname") for node in nodes]
    assert names == [node.name for node in nodes]
