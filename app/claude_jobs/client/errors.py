"""What can go wrong for a client: one class a kind of answer that a caller can give to it."""


class ClientError(Exception):
    """Anything that the client raises; its text is one sentence."""


class UnreachableError(ClientError):
    """The API gave no answer for as long as it was tried."""


class ApiError(ClientError):
    """The API refused a request.

    `code` is the word of the error form (`queue_full`, `not_found`, …), `unknown` when something
    other than the API answered. `retry_after` is in seconds. `repeated` says that an earlier try
    of the same request got no answer and may have been served.
    """

    def __init__(
        self,
        status: int,
        code: str,
        sentence: str,
        *,
        retry_after: float | None = None,
        repeated: bool = False,
    ) -> None:
        super().__init__(sentence)
        self.status = status
        self.code = code
        self.sentence = sentence
        self.retry_after = retry_after
        self.repeated = repeated

    def __str__(self) -> str:
        return f"{self.sentence} ({self.status} {self.code})"


class JobFailedError(ClientError):
    """A job ended otherwise than well; `code` is a word of `contract.event.FailureCode`."""

    def __init__(self, job_id: str, code: str, sentence: str, session_id: str | None) -> None:
        super().__init__(sentence)
        self.job_id = job_id
        self.code = code
        self.sentence = sentence
        self.session_id = session_id

    def __str__(self) -> str:
        return f"job {self.job_id} ended with {self.code}: {self.sentence}"
