"""All implementations of encoding encode the same tokens."""

from pathlib import Path

from tests.support.letters import write_encoder

from kar_bench.performance.throughput.encoding import encoding_contenders
from kar_offline.encoders.huggingface import HuggingFaceEncoder


def test_all_implementations_of_encoding_run_on_the_same_tokens(tmp_path: Path) -> None:
    folder = write_encoder(tmp_path / "letters")
    texts = ["a b c", "d", "e d c b a"] * 40
    contenders = encoding_contenders(
        lambda runtime, threads: HuggingFaceEncoder(folder, runtime=runtime, threads=threads, cache=tmp_path),
        texts,
        threads=2,
    )
    assert [(made.runtime, made.implementation) for made in contenders] == [
        ("torch", "bare"),
        ("torch", "ours"),
        ("onnx", "bare"),
        ("onnx", "ours"),
        ("torch", "unsorted"),
    ]
    # Nine tokens of letters, and two special ones for each text.
    assert {made.tokens for made in contenders} == {(9 + 3 * 2) * 40}
    for made in contenders:
        made.turn()
