"""The Triton scorer against a gRPC service that records its requests."""

import asyncio
from contextlib import asynccontextmanager

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from kar_sidecar.errors import DeadlineError, InputError, UnavailableError
from kar_sidecar.scoring.triton import TritonScorer

pytestmark = pytest.mark.service

TENSORS = {
    "item_index": np.array([7, 8], dtype=np.int64),
    "item_numeric": np.array([[0.5], [1.5]], dtype=np.float32),
    "item_present": np.array([True, False]),
}


class Triton(service_pb2_grpc.GRPCInferenceServiceServicer):
    """Scores the candidates .25, .5, ...; it can also fail with a status, or hang."""

    def __init__(self):
        self.loaded = {"here"}
        self.loads = []
        self.requests = []
        self.status = None
        self.hanging = False

    async def ModelInfer(self, request, context):
        self.requests.append(request)
        if self.hanging:
            await asyncio.Event().wait()
        if self.status:
            await context.abort(self.status, "for this reason")
        scores = np.arange(1, request.inputs[0].shape[1] + 1, dtype=np.float32) / 4
        return service_pb2.ModelInferResponse(raw_output_contents=[scores.tobytes()])

    async def ModelReady(self, request, context):
        return service_pb2.ModelReadyResponse(ready=request.name in self.loaded)

    async def RepositoryModelLoad(self, request, context):
        self.loads.append(request.model_name)
        if request.model_name == "corrupt":
            await context.abort(grpc.StatusCode.INTERNAL, "model.onnx is corrupt")
        self.loaded.add(request.model_name)
        return service_pb2.RepositoryModelLoadResponse()


@asynccontextmanager
async def connected(triton):
    server = grpc.aio.server()
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(triton, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    scorer = TritonScorer(f"127.0.0.1:{port}")
    try:
        yield scorer, server
    finally:
        await scorer.close()
        await server.stop(None)


def ask(triton, call):
    async def run():
        async with connected(triton) as (scorer, _):
            return await call(scorer)

    return asyncio.run(run())


def test_a_request_is_a_batch_of_one_with_raw_little_endian_tensors():
    triton = Triton()
    scores = ask(triton, lambda scorer: scorer.score("here", TENSORS))
    assert scores.dtype == np.float32
    assert scores.tolist() == [0.25, 0.5]
    [sent] = triton.requests
    assert sent.model_name == "here"
    assert [output.name for output in sent.outputs] == ["score"]
    assert [(tensor.name, tensor.datatype, list(tensor.shape)) for tensor in sent.inputs] == [
        ("item_index", "INT64", [1, 2]),
        ("item_numeric", "FP32", [1, 2, 1]),
        ("item_present", "BOOL", [1, 2]),
    ]
    assert list(sent.raw_input_contents) == [
        bytes([7, *[0] * 7, 8, *[0] * 7]),
        bytes.fromhex("0000003f0000c03f"),
        b"\x01\x00",
    ]


def test_strided_tensors_are_sent_in_order():
    triton = Triton()
    table = np.array([[1, 2], [3, 4]], dtype=np.float32)
    ask(triton, lambda scorer: scorer.score("here", {"item_numeric": table[:, 1]}))
    assert np.frombuffer(triton.requests[0].raw_input_contents[0], "<f4").tolist() == [2, 4]


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, InputError),
        (grpc.StatusCode.DEADLINE_EXCEEDED, DeadlineError),
        (grpc.StatusCode.UNAVAILABLE, UnavailableError),
        (grpc.StatusCode.NOT_FOUND, UnavailableError),
        (grpc.StatusCode.INTERNAL, UnavailableError),
    ],
)
def test_statuses_become_errors_that_name_the_model_and_the_reason(status, error):
    triton = Triton()
    triton.status = status
    with pytest.raises(error, match="here: for this reason") as raised:
        ask(triton, lambda scorer: scorer.score("here", TENSORS))
    assert type(raised.value) is error


def test_no_answer_in_time_is_a_deadline_error():
    triton = Triton()
    triton.hanging = True
    with pytest.raises(DeadlineError):
        ask(triton, lambda scorer: scorer.score("here", TENSORS, timeout_s=0.05))


def test_a_load_sends_one_request():
    triton = Triton()

    async def run(scorer):
        before = await scorer.ready("new")
        await scorer.load("new")
        await scorer.load("new")
        await scorer.load("here")
        return before, await scorer.ready("new")

    assert ask(triton, run) == (False, True)
    assert triton.loads == ["new"]


def test_a_failed_load_says_why():
    with pytest.raises(UnavailableError, match=r"cannot load corrupt: model\.onnx is corrupt"):
        ask(Triton(), lambda scorer: scorer.load("corrupt"))


def test_an_unreachable_server_is_named():
    async def run():
        async with connected(Triton()) as (scorer, server):
            await server.stop(None)
            assert not await scorer.ready("here")
            with pytest.raises(UnavailableError):
                await scorer.score("here", TENSORS, timeout_s=5)
            with pytest.raises(UnavailableError):
                await scorer.load("here")

    asyncio.run(run())
