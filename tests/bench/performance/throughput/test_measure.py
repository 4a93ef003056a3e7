"""Rates and ratios of hand-made turns."""

from rich.console import Console

from kar_bench.harness import to_json
from kar_bench.performance.throughput.measure import Contender, Seconds, measure_throughput, throughput_table


def test_rates_and_ratios_are_medians_of_turns_and_the_first_round_does_not_count() -> None:
    now = Seconds(0.0, 0.0)

    def contender(implementation: str, wall: list[float], processor_s: float) -> Contender:
        left = iter(wall)

        def turn() -> None:
            nonlocal now
            now = Seconds(now.wall_s + next(left), now.processor_s + processor_s)

        return Contender("encode", "onnx", implementation, 100, turn)

    turns = []
    report = measure_throughput(
        [contender("bare", [99.0, 1.0, 2.0, 4.0], 2.0), contender("ours", [0.1, 2.0, 2.5, 4.0], 2.5)],
        rounds=3,
        on_turn=lambda name, turn, count: turns.append((name, turn, count)),
        now=lambda: now,
        busy_cores=lambda: 0.0,
    )
    assert turns == [(f"encode, onnx, {('bare', 'ours')[turn % 2]}", turn, 8) for turn in range(8)]
    found = to_json(report)
    bare, ours = found["rows"]
    assert (bare["tokens_per_s"], bare["low"], bare["high"], bare["tokens_per_processor_s"]) == (50, 25, 100, 50)
    assert (ours["tokens_per_s"], ours["low"], ours["high"], ours["tokens_per_processor_s"]) == (40, 25, 50, 40)
    # Turn by turn 1 / 2, 2 / 2.5, 4 / 4.
    assert found["ratios"] == [
        {"task": "encode", "runtime": "onnx", "wall": 0.8, "low": 0.5, "high": 1.0, "processor": 0.8}
    ]
    console = Console(width=80, record=True)
    console.print(throughput_table(report))
    assert "ours / bare 0.800 [0.500, 1.000] by the clock" in console.export_text()
