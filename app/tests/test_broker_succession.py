"""When the servers of a broker count one another as whole."""

from claude_jobs.broker.succession import Member, is_counted, is_settled, peer_of


def test_a_new_server_is_not_taken_for_settled_while_only_those_of_before_are_counted() -> None:
    before = [Member(f"nats-{name}", name, present=True) for name in ("a", "b", "c")]
    assert is_settled(before, "nats-c", 3)
    assert not is_settled(before, "nats-new", 3)
    assert not is_settled([*before, Member("nats-new", "new", present=True)], "nats-new", 3)


def test_a_server_that_the_others_have_not_met_since_they_started_is_counted() -> None:
    """What nats-server 2.9 says of one that is not there, on a node called `node-1`."""
    unknown = Member(
        "Server name unknown at this time (peerID: wTT3x6c5)", "wTT3x6c5", present=False
    )
    assert peer_of("nats-node-1") == "wTT3x6c5"
    assert is_counted("nats-node-1", [unknown])
    assert not is_counted("nats-node-2", [unknown])
