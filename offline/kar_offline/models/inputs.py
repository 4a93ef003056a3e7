"""Owns the input tensors of a model: their names, shapes and sizes.

A batch has N candidates of R requests; a history has L events for the embeddings and H events for the affinity. The
sidecar uses the same names (`kar_sidecar.scoring`).

    history_item      (R, L)     int64    item index, 0 where padded
    history_rating    (R, L)     int64    half-star bucket, 0 where padded
    user_categorical  (R, Uc)    int64    category indices, 0 where missing
    user_numeric      (R, Un)    float32  standardised
    item_index        (N,)       int64    item index
    item_categorical  (N, Ic)    int64    category indices, 0 where missing
    item_numeric      (N, In)    float32  standardised
    request_of_row    (N,)       int64    the request of each candidate, in rising order
    user_knowledge    (R, Ku)    float32  present if Ku > 0
    item_knowledge    (N, Ki)    float32  present if Ki > 0
    affinity          (N, F)     float32  present if F > 0; standardised
    item_vector       (N, V)     float32  present if V > 0
    history_vector    (R, H, V)  float32  present if V > 0; 0 where padded
    history_weight    (R, H)     float32  present if V > 0; rating minus the user's mean, 0 where padded
    -> score          (N,)       float32  probability of a positive label
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

import torch
from torch import Tensor

from kar_sidecar.scoring import AFFINITY, BASE_INPUTS, KNOWLEDGE_INPUTS, VECTOR_INPUTS

__all__ = ["REQUEST_OF_ROW", "Field", "InputSpec", "Inputs", "example_inputs"]

REQUEST_OF_ROW: Final = "request_of_row"
Inputs = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Field:
    """One categorical feature: `size` indices (reserved ones included) and at most `width` values per entity."""

    size: int
    width: int


@dataclass(frozen=True, slots=True)
class InputSpec:
    """Sizes of a model's inputs. A size of 0 means that the model does not read that input.

    Example:
        >>> spec = InputSpec(items=10, user_fields=(), item_fields=(Field(6, 2),), user_numbers=1, item_numbers=0)
        >>> spec.item_columns, spec.user_columns
        (2, 1)
    """

    items: int
    """Item indices, reserved ones included."""
    user_fields: tuple[Field, ...]
    item_fields: tuple[Field, ...]
    user_numbers: int
    """Numeric features of a user."""
    item_numbers: int
    """Numeric features of an item."""
    user_knowledge: int = 0
    """Components Ku of a user's knowledge vector."""
    item_knowledge: int = 0
    """Components Ki of an item's knowledge vector."""
    affinity: int = 0
    """Columns F."""
    vector: int = 0
    """Components V of an affinity vector."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors that the model reads, in the order of the module docstring."""
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
        """Columns Uc of `user_categorical`; without categorical features there is one constant column."""
        return sum(field.width for field in self.user_fields) or 1

    @property
    def item_columns(self) -> int:
        """Columns Ic of `item_categorical`; without categorical features there is one constant column."""
        return sum(field.width for field in self.item_fields) or 1

    def to_json(self) -> dict[str, Any]:
        """The sizes as plain JSON values."""
        return asdict(self)

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> "InputSpec":
        """Read the output of `to_json`."""
        fields = {name: tuple(Field(**field) for field in values[name]) for name in ("user_fields", "item_fields")}
        return InputSpec(**{**values, **fields})


def example_inputs(
    spec: InputSpec, *, candidates: int, requests: int, events: int = 3, rated: int = 4
) -> dict[str, Tensor]:
    """Inputs of the right names, shapes and dtypes: every index is 1, every number 0.

    Args:
        spec: Sizes of the inputs.
        candidates: N, divided evenly among the requests.
        requests: R.
        events: L.
        rated: H.

    Example:
        >>> spec = InputSpec(items=10, user_fields=(), item_fields=(), user_numbers=1, item_numbers=0)
        >>> inputs = example_inputs(spec, candidates=4, requests=2)
        >>> inputs["history_item"].shape, inputs["request_of_row"].tolist()
        (torch.Size([2, 3]), [0, 0, 1, 1])
    """
    indices = {
        "history_item": (requests, events),
        "history_rating": (requests, events),
        "user_categorical": (requests, spec.user_columns),
        "item_index": (candidates,),
        "item_categorical": (candidates, spec.item_columns),
    }
    numbers = {
        "user_numeric": (requests, max(spec.user_numbers, 1)),
        "item_numeric": (candidates, max(spec.item_numbers, 1)),
        "user_knowledge": (requests, spec.user_knowledge),
        "item_knowledge": (candidates, spec.item_knowledge),
        "affinity": (candidates, spec.affinity),
        "item_vector": (candidates, spec.vector),
        "history_vector": (requests, rated, spec.vector),
        "history_weight": (requests, rated),
    }
    tensors = {
        **{name: torch.ones(shape, dtype=torch.int64) for name, shape in indices.items()},
        **{name: torch.zeros(shape) for name, shape in numbers.items()},
        REQUEST_OF_ROW: torch.arange(candidates) * requests // candidates,
    }
    return {name: tensors[name] for name in spec.names}
