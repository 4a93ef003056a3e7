"""Owns what happens around every unary call: its request id, its count, and the translation of errors into statuses."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any
from uuid import uuid4

import grpc
from google.protobuf.message import DecodeError

from kar_sidecar.errors import InputError, KarError
from kar_sidecar.telemetry import Telemetry

__all__ = ["CallInterceptor"]

log = logging.getLogger(__name__)


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Answers a KarError with its status and text, any other error with INTERNAL and a request id; it is logged."""

    def __init__(
        self,
        telemetry: Telemetry,
        *,
        clock: Callable[[], float] = time.perf_counter,
        new_id: Callable[[], str] = lambda: uuid4().hex,
    ) -> None:
        """Count calls in `telemetry`; `clock` gives seconds, `new_id` names requests that come without an id."""
        self._telemetry = telemetry
        self._clock = clock
        self._new_id = new_id

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Wrap unary handlers; streams (health's Watch, reflection) pass unchanged."""
        handler = await continuation(handler_call_details)
        if handler is None or handler.unary_unary is None:
            return handler
        rpc = handler_call_details.method.lstrip("/")

        async def call(message: bytes, context: Any) -> Any:
            started_s, response, status = self._clock(), None, grpc.StatusCode.INTERNAL
            request_id = self._new_id()
            try:
                request = _parse(message, handler.request_deserializer)
                if hasattr(request, "request_id"):
                    request.request_id = request_id = request.request_id or request_id
                response = await handler.unary_unary(request, context)
                status = grpc.StatusCode.OK
            except KarError as error:
                status = error.status
                await context.abort(status, str(error))
            except grpc.aio.AbortError:  # raised by the health service for an unknown service name
                status = grpc.StatusCode.NOT_FOUND
                raise
            except asyncio.CancelledError:
                status = grpc.StatusCode.CANCELLED
                raise
            except Exception:
                log.exception("internal_error rpc=%s request_id=%s", rpc, request_id)
                await context.abort(
                    status, f"request {request_id} failed inside the server: its log says why, report it"
                )
            finally:
                self._telemetry.request(rpc, status.name, (self._clock() - started_s) * 1e3, response)
            return response

        # Messages are parsed in `call`: gRPC itself would answer a malformed one with UNKNOWN and a traceback.
        return grpc.unary_unary_rpc_method_handler(call, response_serializer=handler.response_serializer)


def _parse(message: bytes, deserialise: Callable[[bytes], Any]) -> Any:
    try:
        return deserialise(message)
    except DecodeError as error:
        raise InputError(
            "the message does not have the type of this method: send a protobuf made from protos/"
        ) from error
