"""Owns what a model reads: its tensors and their sizes.

Input tensors (N candidates of R requests, L or H history events; names as in `kar_sidecar.scoring`):

    history_item      [R, L]     int64    item index, 0 where padded
    history_rating    [R, L]     int64    half-star bucket, 0 where padded
    user_categorical  [R, Uc]    int64
    user_numeric      [R, Un]    float32  standardised
    item_index        [N]        int64
    item_categorical  [N, Ic]    int64
    item_numeric      [N, In]    float32
    request_of_row    [N]        int64    the request that each candidate belongs to, in rising order
    user_knowledge    [R, Ku]    float32  where Ku > 0
    item_knowledge    [N, Ki]    float32  where Ki > 0
    affinity          [N, F]     float32  where F > 0; standardised
    item_vector       [N, V]     float32  where V > 0
    history_vector    [R, H, V]  float32  where V > 0; 0 where padded
    history_weight    [R, H]     float32  where V > 0; ratings less the user's mean, 0 where padded
    -> score          [N]        float32  probability
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from torch import Tensor

from kar_sidecar.scoring import AFFINITY, BASE_INPUTS, KNOWLEDGE_INPUTS, VECTOR_INPUTS

__all__ = ["REQUEST_OF_ROW", "Field", "InputSpec", "Inputs"]

REQUEST_OF_ROW: Final = "request_of_row"
Inputs = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Field:
    """One categorical feature: `size` indices (reserved ones included) and at most `width` values an entity."""

    size: int
    width: int


@dataclass(frozen=True, slots=True)
class InputSpec:
    """Sizes of a model's inputs. `items` counts reserved indices too; the last four are 0 for what is not given."""

    items: int
    user_fields: tuple[Field, ...]
    item_fields: tuple[Field, ...]
    user_numbers: int
    item_numbers: int
    user_knowledge: int = 0
    """Components Ku."""
    item_knowledge: int = 0
    """Components Ki."""
    affinity: int = 0
    """Columns F."""
    vector: int = 0
    """Components V."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors, in the order of the module docstring."""
        sizes = zip(KNOWLEDGE_INPUTS, (self.user_knowledge, self.item_knowledge), strict=True)
        return (
            *BASE_INPUTS,
            REQUEST_OF_ROW,
            *(name for name, size in sizes if size),
            *((AFFINITY,) if self.affinity else ()),
            *(VECTOR_INPUTS if self.vector else ()),
        )

    @property
    def user_columns(self) -> int:
        """Columns Uc of `user_categorical`; a kind without categories has one constant column."""
        return sum(field.width for field in self.user_fields) or 1

    @property
    def item_columns(self) -> int:
        """Columns Ic of `item_categorical`."""
        return sum(field.width for field in self.item_fields) or 1

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> "InputSpec":
        """Read what `to_json` gave."""
        fields = {name: tuple(Field(**field) for field in values[name]) for name in ("user_fields", "item_fields")}
        return InputSpec(**{**values, **fields})
