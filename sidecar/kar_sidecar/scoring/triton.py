"""Owns the scorer that calls a Triton server: raw tensors over one gRPC channel, one message per request."""

from typing import Any, Final

import grpc
import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2, service_pb2_grpc

from kar_sidecar.errors import DeadlineError, InputError, KarError, UnavailableError
from kar_sidecar.scoring import SCORE, Tensors

__all__ = ["TritonScorer"]

DTYPES: Final = {"int64": "INT64", "float32": "FP32", "bool": "BOOL"}
READY_TIMEOUT_S: Final = 1.0
OPTIONS: Final = (
    # Reconnects to a restarted server within a second; gRPC's default is up to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
)
STATUSES: Final[dict[grpc.StatusCode, type[KarError]]] = {
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineError,
    grpc.StatusCode.INVALID_ARGUMENT: InputError,
}
"""Errors by Triton's status. Any other status is an UnavailableError: the server or the model is not there."""


class TritonScorer:
    """A `Scorer` over Triton's gRPC interface. Construct it inside the event loop that uses it."""

    def __init__(self, address: str) -> None:
        """Connect at the first call to `address`, host:port of Triton's gRPC endpoint."""
        self._address = address
        self._channel = grpc.aio.insecure_channel(address, options=OPTIONS)
        self._stub: Any = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    async def score(self, model: str, tensors: Tensors, timeout_s: float | None = None) -> NDArray[np.float32]:
        """See `Scorer.score`; the message is a batch of one request, which Triton merges with others.

        Raises:
            InputError: the model refuses the tensors; the text says why.
        """
        request = service_pb2.ModelInferRequest(model_name=model, outputs=[{"name": SCORE}])
        for name, array in tensors.items():
            request.inputs.add(name=name, datatype=DTYPES[array.dtype.name], shape=(1, *array.shape))
            request.raw_input_contents.append(array.tobytes())
        try:
            response = await self._stub.ModelInfer(request, timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            raise self._translate(model, error) from error
        return np.frombuffer(response.raw_output_contents[0], dtype="<f4")

    async def load(self, model: str) -> None:
        """See `Scorer.load`."""
        if await self.ready(model):
            return
        try:
            await self._stub.RepositoryModelLoad(service_pb2.RepositoryModelLoadRequest(model_name=model))
        except grpc.aio.AioRpcError as error:
            raise UnavailableError(f"Triton cannot load {model}: {error.details()}") from error

    async def ready(self, model: str) -> bool:
        """See `Scorer.ready`."""
        request = service_pb2.ModelReadyRequest(name=model)
        try:
            return bool((await self._stub.ModelReady(request, timeout=READY_TIMEOUT_S)).ready)
        except grpc.aio.AioRpcError:
            return False

    async def close(self) -> None:
        """See `Scorer.close`."""
        await self._channel.close()

    def _translate(self, model: str, error: grpc.aio.AioRpcError) -> KarError:
        kind = STATUSES.get(error.code(), UnavailableError)
        return kind(f"Triton at {self._address} gave no scores for {model}: {error.details()}")
