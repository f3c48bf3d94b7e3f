"""What went wrong, in a sentence for the person who started the program."""


class MachineError(Exception):
    """The work cannot be done; the message says why."""
