"""What every document of the contract has in common."""

from datetime import UTC, datetime

from pydantic import BaseModel, ConfigDict
from pydantic.alias_generators import to_camel


class Document(BaseModel):
    """A JSON document in camelCase; fields that are not set are left out."""

    model_config = ConfigDict(
        alias_generator=to_camel,
        populate_by_name=True,
        serialize_by_alias=True,
        frozen=True,
    )

    def to_json(self) -> bytes:
        """Return the document as UTF-8 JSON."""
        return self.model_dump_json(exclude_none=True).encode()


def now() -> datetime:
    """Return the present time with its zone (UTC)."""
    return datetime.now(UTC)
