"""The error form that every answer but a success has."""

from enum import StrEnum

from claude_jobs.contract.base import Document


class ErrorCode(StrEnum):
    """The words of `code` in an HTTP error, one status each."""

    INVALID_REQUEST = "invalid_request"
    UNAUTHORIZED = "unauthorized"
    FORBIDDEN = "forbidden"
    NOT_FOUND = "not_found"
    METHOD_NOT_ALLOWED = "method_not_allowed"
    CONFLICT = "conflict"
    PRECONDITION_FAILED = "precondition_failed"
    TOO_LARGE = "too_large"
    RANGE_NOT_SATISFIABLE = "range_not_satisfiable"
    QUEUE_FULL = "queue_full"
    INTERNAL = "internal"
    UNAVAILABLE = "unavailable"


HTTP_STATUS: dict[ErrorCode, int] = {
    ErrorCode.INVALID_REQUEST: 400,
    ErrorCode.UNAUTHORIZED: 401,
    ErrorCode.FORBIDDEN: 403,
    ErrorCode.NOT_FOUND: 404,
    ErrorCode.METHOD_NOT_ALLOWED: 405,
    ErrorCode.CONFLICT: 409,
    ErrorCode.PRECONDITION_FAILED: 412,
    ErrorCode.TOO_LARGE: 413,
    ErrorCode.RANGE_NOT_SATISFIABLE: 416,
    ErrorCode.QUEUE_FULL: 429,
    ErrorCode.INTERNAL: 500,
    ErrorCode.UNAVAILABLE: 503,
}


class ErrorBody(Document):
    """The body of an error: a sentence for people and a word for programs."""

    error: str
    code: ErrorCode


class RequestRefusedError(Exception):
    """A request that cannot be served, with the answer that the client gets.

    `retry_after` is in seconds and becomes the header of that name.
    """

    def __init__(self, code: ErrorCode, sentence: str, *, retry_after: int | None = None) -> None:
        super().__init__(sentence)
        self.body = ErrorBody(error=sentence, code=code)
        self.status = HTTP_STATUS[code]
        self.retry_after = retry_after
