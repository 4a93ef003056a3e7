"""Owns the two kinds of entity that knowledge is about: users and items."""

from enum import StrEnum
from typing import Final

from kar.records.v1 import records_pb2

__all__ = ["ITEM", "USER", "EntityKind"]


class EntityKind(StrEnum):
    """A kind of entity. Its value ("item", "user") names it in files and reports, `number` on the wire and in stores.

    Example:
        >>> EntityKind("user").number, EntityKind.of_number(2)
        (1, <EntityKind.ITEM: 'item'>)
    """

    ITEM = "item"
    USER = "user"

    # Enum's own hash is a Python function; a store read would call it for every key.
    __hash__ = str.__hash__

    @property
    def number(self) -> records_pb2.EntityKind:
        """The value of `kar.records.v1.EntityKind`."""
        return _NUMBERS[self]

    @classmethod
    def of_number(cls, number: int) -> "EntityKind":
        """The kind with this number on the wire.

        Raises:
            ValueError: no kind has this number, such as 0 (unspecified).
        """
        for kind in cls:
            if _NUMBERS[kind] == number:
                return kind
        raise ValueError(f"no kind of entity has the number {number}")


ITEM: Final = EntityKind.ITEM
USER: Final = EntityKind.USER
_NUMBERS: Final = {ITEM: records_pb2.ENTITY_KIND_ITEM, USER: records_pb2.ENTITY_KIND_USER}
