"""When the servers of a broker count one another as whole."""

from claude_jobs.broker.succession import Member, is_settled


def test_a_new_server_is_not_taken_for_settled_while_only_those_of_before_are_counted() -> None:
    before = [Member(f"nats-{name}", name, present=True) for name in ("a", "b", "c")]
    assert is_settled(before, "nats-c", 3)
    assert not is_settled(before, "nats-new", 3)
    assert not is_settled([*before, Member("nats-new", "new", present=True)], "nats-new", 3)
