import asyncio
import base64
import json
import pickle
import random
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest

from kar_offline.encoders.make_encoder import make_encoder
from kar_offline.encoders.openai_embeddings import BATCH_TEXTS, EndpointEncoder
from kar_offline.openai_http.endpoint import Retry
from kar_offline.settings import EncoderOptions
from kar_sidecar.errors import InputError, UnavailableError

pytestmark = pytest.mark.service

KEY = "sk-very-secret"
Answer = Callable[[list[str]], tuple[int, bytes | str]]


def vector(text: str) -> list[float]:
    """How often a text has the letters a, b and c, and 1."""
    return [float(text.count(letter)) for letter in "abc"] + [1.0]


def unit(values: Any) -> np.ndarray:
    return np.array(values) / np.linalg.norm(values)


def embeddings(vectors: list[Any], **more: Any) -> tuple[int, str]:
    data = [{"object": "embedding", "index": index, "embedding": found} for index, found in enumerate(vectors)]
    return 200, json.dumps({"object": "list", "data": data} | more)


def right(texts: list[str]) -> tuple[int, str]:
    return embeddings([vector(text) for text in texts], usage={"prompt_tokens": 10 * len(texts)})


class Server(ThreadingHTTPServer):
    """Gives the next answer of its script, then right ones; remembers what was asked, and how many at once."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script: list[Answer] = []
        self.bodies: list[dict[str, Any]] = []
        self.heads: list[tuple[str, str | None]] = []
        self.lock = threading.Lock()
        self.gate: threading.Barrier | None = None
        self.running = self.most = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    @property
    def texts(self) -> list[str]:
        """All texts asked for, in the order of requests."""
        return [text for body in self.bodies for text in body["input"]]


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with self.server.lock:
            self.server.bodies.append(body)
            self.server.heads.append((self.path, self.headers["authorization"]))
            self.server.running += 1
            self.server.most = max(self.server.most, self.server.running)
            answer = self.server.script.pop(0) if self.server.script else right
        if self.server.gate:
            self.server.gate.wait(10)
        status, text = answer(body["input"])
        content = text.encode() if isinstance(text, str) else text
        with self.server.lock:
            self.server.running -= 1
        self.send_response(status)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


async def no_sleep(seconds: float) -> None:
    await asyncio.sleep(0)


def encoder(server: Server, **options: Any) -> EndpointEncoder:
    options = {"retry": Retry(3), "rng": random.Random(1), "sleep": no_sleep} | options
    return EndpointEncoder(server.url, "tiny", KEY, **options)


def test_vectors_come_in_the_order_of_texts_at_unit_length(server: Server) -> None:
    texts = ["a", "bb and ab", "c"]
    vectors = encoder(server).encode(texts)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, [unit(vector(text)) for text in texts], atol=1e-6)
    # The first request asks how long vectors are.
    assert [set(body) for body in server.bodies] == [{"model", "input"}] * 2
    assert [body["model"] for body in server.bodies] == ["tiny"] * 2
    assert set(server.heads) == {("/v1/embeddings", f"Bearer {KEY}")}


def test_the_length_of_vectors_is_asked_for_once(server: Server) -> None:
    made = encoder(server)
    assert server.bodies == []
    assert (made.dim, made.dim) == (4, 4)
    assert len(server.bodies) == 1


def test_the_id_names_model_endpoint_and_chunks_but_no_password(server: Server) -> None:
    assert encoder(server, chunk_chars=9).encoder_id == f"tiny@127.0.0.1:{server.server_port}/v1/9"
    assert EndpointEncoder("https://me:secret@host/v1", "m").encoder_id == "m@host/v1/1500"


def test_long_texts_are_cut_at_spaces_and_pooled_by_length(server: Server) -> None:
    (found,) = encoder(server, chunk_chars=7).encode(["aaa bbb cc"])
    assert server.texts[1:] == ["aaa bbb", "cc"]
    np.testing.assert_allclose(found, unit(7 * unit([3, 3, 0, 1]) + 2 * unit([0, 0, 2, 1])), atol=1e-6)


def test_a_word_that_is_too_long_is_cut_too_and_nothing_is_lost(server: Server) -> None:
    encoder(server, chunk_chars=4).encode(["ab-abcabc b"])
    assert "".join(server.texts[1:]).replace(" ", "") == "ab-abcabcb"
    assert max(map(len, server.texts)) == 4


def test_batches_hold_so_many_texts_and_tokens_are_what_the_endpoint_counts(server: Server) -> None:
    found = list(encoder(server, concurrency=1).stream([f"a {n}" for n in range(BATCH_TEXTS + 1)]))
    assert [len(body["input"]) for body in server.bodies] == [BATCH_TEXTS, 1]
    assert [encoded.tokens for encoded in found] == [10 * BATCH_TEXTS, 10]
    assert sorted(row for encoded in found for row in encoded.rows) == list(range(BATCH_TEXTS + 1))


def test_long_chunks_share_a_batch_only_as_far_as_it_goes(server: Server) -> None:
    list(encoder(server, chunk_chars=10_000).stream(["a" * 10_000] * 4))
    assert sorted(len(body["input"]) for body in server.bodies) == [1, 3]


def test_without_a_count_tokens_are_estimated_by_characters(server: Server) -> None:
    server.script = [lambda texts: embeddings([vector(text) for text in texts])]
    (found,) = encoder(server).stream(["abcd", "abcde"])
    assert found.tokens == 3


def test_no_more_requests_are_in_flight_than_agreed(server: Server) -> None:
    # The barrier lets requests pass in pairs only, so two are in flight at once.
    server.gate = threading.Barrier(2)
    list(encoder(server, concurrency=2).stream(["a"] * BATCH_TEXTS * 4))
    assert (len(server.bodies), server.most) == (4, 2)


def test_a_stream_may_be_left(server: Server) -> None:
    stream = encoder(server, concurrency=2).stream(["a"] * BATCH_TEXTS * 9)
    next(stream)
    stream.close()
    assert len(server.bodies) <= 3


def shuffled(texts: list[str]) -> tuple[int, str]:
    status, text = right(texts)
    answer = json.loads(text)
    answer["data"].reverse()
    return status, json.dumps(answer)


def packed(texts: list[str]) -> tuple[int, str]:
    return embeddings([base64.b64encode(np.array(vector(text), "<f4").tobytes()).decode() for text in texts])


@pytest.mark.parametrize("answer", [shuffled, packed])
def test_answers_may_come_in_any_order_and_packed(server: Server, answer: Answer) -> None:
    server.script = [right, answer]
    found = encoder(server).encode(["a", "b"])
    np.testing.assert_allclose(found, [unit([1, 0, 0, 1]), unit([0, 1, 0, 1])], atol=1e-6)
    assert len(server.bodies) == 2


NAN = float("nan")
BROKEN: dict[str, Answer] = {
    "429": lambda texts: (429, "slow down"),
    "500": lambda texts: (500, "oops"),
    "html": lambda texts: (200, "<html>"),
    "no bytes": lambda texts: (200, b""),
    "no utf-8": lambda texts: (200, b"\xff\xfe"),
    "an object": lambda texts: (200, "{}"),
    "a list": lambda texts: (200, "[1]"),
    "too few": lambda texts: embeddings([[1.0, 0.0, 0.0, 0.0]]),
    "too many": lambda texts: embeddings([[1.0, 0.0, 0.0, 0.0]] * 3),
    "one index twice": lambda texts: (200, json.dumps({"data": [{"index": 0, "embedding": [1, 0, 0, 0]}] * 2})),
    "no index": lambda texts: (200, json.dumps({"data": [{"embedding": [1, 0, 0, 0]}] * 2})),
    "odd index": lambda texts: (200, json.dumps({"data": [{"index": i, "embedding": [1]} for i in ("0", 1)]})),
    "NaN": lambda texts: embeddings([[1.0, NAN, 0.0, 0.0]] * 2),
    "infinite": lambda texts: embeddings([[1e308, 1e308, 1e308, 0.0]] * 2),
    "huge": lambda texts: embeddings([[10**400, 0, 0, 0]] * 2),
    "null": lambda texts: embeddings([[1.0, None, 0.0, 0.0]] * 2),
    "zero": lambda texts: embeddings([[0.0, 0.0, 0.0, 0.0]] * 2),
    "empty": lambda texts: embeddings([[], []]),
    "ragged": lambda texts: embeddings([[1.0, 0.0, 0.0, 0.0], [1.0]]),
    "a vector for each token": lambda texts: embeddings([[[1.0, 0.0, 0.0, 0.0]] * 2] * 2),
    "words": lambda texts: embeddings([["one", "two", "three", "four"]] * 2),
    "numbers": lambda texts: embeddings([1.0, 2.0]),
    "no base64": lambda texts: embeddings(["?", "?"]),
    "half a number": lambda texts: embeddings([base64.b64encode(b"12345").decode()] * 2),
}


@pytest.mark.parametrize("answer", BROKEN.values(), ids=BROKEN)
def test_a_broken_answer_is_asked_for_again(server: Server, answer: Answer) -> None:
    server.script = [right, answer, answer]
    found = encoder(server).encode(["a", "b"])
    np.testing.assert_allclose(found, [unit([1, 0, 0, 1]), unit([0, 1, 0, 1])], atol=1e-6)
    assert len(server.bodies) == 4


def test_attempts_end(server: Server) -> None:
    server.script = [BROKEN["NaN"]] * 9
    with pytest.raises(UnavailableError, match=r"in 3 attempts \(last: .*zero or not finite\)"):
        list(encoder(server).stream(["a", "b"]))
    assert len(server.bodies) == 3


def test_vectors_that_change_their_length_are_refused_at_once(server: Server) -> None:
    server.script = [right, lambda texts: embeddings([[1.0, 2.0]] * len(texts))]
    with pytest.raises(InputError, match=r"vectors of 4 components, then of 2: .* 'tiny'"):
        encoder(server).encode(["a", "b"])
    assert len(server.bodies) == 2


def test_a_refusal_says_what_may_be_too_long_and_hides_the_key(server: Server) -> None:
    server.script = [lambda texts: (400, f"too many tokens for {KEY}")]
    with pytest.raises(InputError, match=r"status 400: too many tokens for \*\*\*: .* lower --chunk-chars"):
        encoder(server).encode(["a"])
    assert len(server.bodies) == 1


def test_a_wrong_key_is_named(server: Server) -> None:
    server.script = [lambda texts: (401, "who are you?")]
    with pytest.raises(InputError, match=r"status 401: who are you\?; correct the address, model, key"):
        encoder(server).encode(["a"])


def test_no_texts_need_no_request(server: Server) -> None:
    assert list(encoder(server).stream([])) == []
    assert server.bodies == []


def test_an_endpoint_needs_an_address_and_a_model() -> None:
    with pytest.raises(InputError, match="--encoder openai needs an endpoint: give --encoder-url and --encoder-model"):
        make_encoder(EncoderOptions(name="openai", base_url="http://127.0.0.1:1/v1"))


def test_an_encoder_travels_with_what_it_was_given(server: Server) -> None:
    made = pickle.loads(pickle.dumps(encoder(server)))
    np.testing.assert_allclose(made.encode(["a"]), [unit([1, 0, 0, 1])], atol=1e-6)
