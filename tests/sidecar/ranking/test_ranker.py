import asyncio
import threading

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.support.ranking import Clock, rank, rank_request

from kar.ranking.v1 import ranking_pb2
from kar.ranking.v1.ranking_pb2 import FeatureColumn, History
from kar.records.v1 import records_pb2
from kar_sidecar.entities import ITEM
from kar_sidecar.errors import DeadlineError, InputError, PreconditionError, UnavailableError
from kar_sidecar.ranking.ranker import Ranker
from kar_sidecar.store import FEATURES, EntityKey, vector_part
from kar_sidecar.telemetry import Telemetry

pytestmark = pytest.mark.unit

KNOWLEDGE, BACKBONE, CALLER = ranking_pb2.RUNG_KNOWLEDGE, ranking_pb2.RUNG_BACKBONE, ranking_pb2.RUNG_CALLER


def squash(*logits):
    return pytest.approx([1 / (1 + np.exp(-x)) for x in logits])


def test_the_knowledge_arm_scores_with_knowledge(world):
    answer = rank(world, rank_request())
    # vector products / 10 + standardised year: i2 3 * 2 / 10 - 1, i1 2 * 2 / 10 + 1, i4 (neutral) 1 / 10 + 0
    assert list(answer.scores) == squash(-0.4, 1.4, 0.1)
    assert list(answer.order) == [1, 2, 0]
    assert (answer.rung, answer.arm, answer.reason) == (KNOWLEDGE, "knowledge", "")
    assert (answer.request_id, answer.release_id, answer.backbone) == ("r", world.release_id, "dcnv2")
    assert answer.user_level == records_pb2.KNOWLEDGE_LEVEL_FULL
    assert list(answer.item_levels) == [
        records_pb2.KNOWLEDGE_LEVEL_NEIGHBOUR,
        records_pb2.KNOWLEDGE_LEVEL_FULL,
        records_pb2.KNOWLEDGE_LEVEL_NEUTRAL,
    ]
    assert not answer.HasField("explanation")


def test_the_control_arm_needs_no_vectors(world):
    answer = rank(world, rank_request(arm="control"))
    assert list(answer.scores) == squash(-1 + 0.03, 1 + 0.02, 0.05)
    assert (answer.rung, answer.arm, answer.reason) == (BACKBONE, "control", "")
    assert answer.user_level == 0
    assert list(answer.item_levels) == [0, 0, 0]
    assert [parts for _, parts, _ in world.store.reads] == [(FEATURES,)]


def test_one_batch_reads_everything(world):
    rank(world, rank_request())
    [(keys, parts, _)] = world.store.reads
    assert [key.id for key in keys] == ["u1", "i2", "i1", "i4"]
    assert parts == (FEATURES, vector_part("aaaaaaaaaaaa"))


def test_encoded_mode_calls_the_ensemble(world):
    answer = rank(world, rank_request(), mode="encoded")
    assert [model for model, _ in world.scorer.calls] == [f"encoded_{world.release_id}"]
    assert list(answer.scores) == squash(0.9, 0.6, 0)


def test_without_overrides_the_hash_decides(world):
    users = [f"user-{i}" for i in range(20)]
    answers = rank(world, *(rank_request(user=user, arm="") for user in users))
    experiment = world.settings().experiment.build()
    assert [answer.arm for answer in answers] == [experiment.assign(user).arm for user in users]
    assert {answer.arm for answer in answers} == {"control", "knowledge"}
    assert {answer.experiment for answer in answers} == {"knowledge"}
    assert rank(world, rank_request()).experiment == ""


def test_an_explanation_comes_on_demand(world):
    answer = rank(world, rank_request("i3", "i4", explain=True))
    explanation = answer.explanation
    assert (explanation.model, explanation.space_id) == (f"knowledge_{world.release_id}", "aaaaaaaaaaaa")
    assert (explanation.history_events, explanation.missing_values, explanation.inline_history_used) == (3, 2, False)
    assert explanation.features_written_at.ToMilliseconds() == 1_000_000
    control = rank(world, rank_request(user="stranger", arm="control", explain=True)).explanation
    assert (control.model, control.space_id) == (f"control_{world.release_id}", "")
    assert not control.HasField("features_written_at")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=25)
@given(
    st.lists(st.sampled_from(["i1", "i2", "i3", "i4", "stranger"]), min_size=1, max_size=10),
    st.sampled_from(["control", "knowledge"]),
)
def test_duplicates_score_alike_and_ties_keep_their_order(world, items, arm):
    answer = rank(world, rank_request(*items, arm=arm))
    assert len({(item, score) for item, score in zip(items, answer.scores, strict=True)}) == len(set(items))
    assert list(answer.order) == sorted(range(len(items)), key=lambda i: -answer.scores[i])


def test_a_broken_request_is_refused_and_reads_nothing(world):
    for broken in (rank_request(user=""), rank_request(arm="other"), rank_request(caller_scores=[1])):
        with pytest.raises(InputError):
            rank(world, broken)
    with pytest.raises(PreconditionError, match="'elsewhere' is not loaded"):
        rank(world, rank_request(release_id="elsewhere"))
    assert world.store.reads == []


def fail_store(world, fault):
    world.store.fault = fault


@pytest.mark.parametrize("arm", ["knowledge", "control"])
@pytest.mark.parametrize("fault", [UnavailableError("it is gone: start it"), DeadlineError("too late: allow more")])
def test_a_failed_read_means_neutral_knowledge_and_no_features(world, arm, fault):
    telemetry = Telemetry()
    answer = rank(world, rank_request(arm=arm), before=lambda: fail_store(world, fault), telemetry=telemetry)
    if arm == "knowledge":
        assert answer.rung == KNOWLEDGE
        assert list(answer.scores) == squash(*[0.05] * 3)  # neutral user times neutral item, over ten
        assert {answer.user_level, *answer.item_levels} == {records_pb2.KNOWLEDGE_LEVEL_NEUTRAL}
    else:
        assert answer.rung == BACKBONE
        assert list(answer.scores) == squash(0.03, 0.02, 0.05)
    assert answer.reason == f"store: {fault}"
    assert telemetry.registry.get_sample_value("kar_backend_failures_total", {"backend": "store"}) == 1


def test_the_text_of_an_unexpected_fault_is_only_logged(world, caplog):
    answer = rank(world, rank_request(), before=lambda: fail_store(world, RuntimeError("password is swordfish")))
    assert answer.rung == KNOWLEDGE
    assert "swordfish" not in answer.reason
    assert "swordfish" in caplog.text


def test_an_unreadable_record_changes_the_score_of_its_item_alone(world):
    def damage():
        world.store.write(FEATURES, [(EntityKey(ITEM, "i1"), b"rubbish")])

    whole = rank(world, rank_request())
    answer = rank(world, rank_request(), before=damage)
    assert answer.rung == KNOWLEDGE
    damaged = list(rank_request().candidates.ids).index("i1")
    for row, (ours, theirs) in enumerate(zip(answer.scores, whole.scores, strict=True)):
        assert (ours == theirs) == (row != damaged)
    assert answer.reason.startswith("store: ")


def test_rated_items_are_read_in_the_first_batch_or_in_a_second(affine):
    part = vector_part("cccccccccccc")
    answer = rank(affine, rank_request())
    assert answer.rung == KNOWLEDGE
    first, second = affine.store.reads[-2:]
    assert [key.id for key in first[0]] == ["u1", "i2", "i1", "i4"]
    assert first[1] == (FEATURES, vector_part("aaaaaaaaaaaa"), part)
    assert ([key.id for key in second[0]], second[1]) == (["gone", "i3"], (part,))  # the last two of the history

    inline = rank_request()
    inline.user.history.CopyFrom(History(item_ids=["i1", "i2"], ratings=[5, 1]))
    affine.store.reads.clear()
    rank(affine, inline)
    [only] = affine.store.reads
    assert [key.id for key in only[0]] == ["u1", "i2", "i1", "i4", "i1", "i2"]


def test_a_slow_blocking_store_is_abandoned(world):
    gate = threading.Event()

    def open_gate(tensors, original=world.scorer.models[f"knowledge_{world.release_id}"]):
        gate.set()  # by now the ranker has given up reading; lets the executor's thread end
        return original(tensors)

    world.scorer.models[f"knowledge_{world.release_id}"] = open_gate

    def close_gate():  # the warm-up opened it
        gate.clear()
        world.store.gate = gate.wait

    answer = rank(world, rank_request(), before=close_gate, store_timeout_ms=5)
    assert answer.rung == KNOWLEDGE
    assert answer.reason == "store: no answer within 5.0 ms"


def test_a_blocking_store_is_read_from_a_thread(world):
    threads = []
    world.store.gate = lambda: threads.append(threading.current_thread())
    assert rank(world, rank_request()).reason == ""
    assert threading.main_thread() not in threads
    world.store.gate = None


def fault(world, *kinds):
    """Make models answer with rubbish, hang, or be down, as `kind=failure`."""

    def apply():
        for kind, failure in kinds:
            model = f"{kind}_{world.release_id}"
            if failure == "nan":
                world.scorer.models[model] = lambda tensors: np.full(len(tensors["item_index"]), np.nan, np.float32)
            elif failure == "short":
                world.scorer.models[model] = lambda tensors: np.zeros(1, np.float32)
            elif failure == "raises":
                world.scorer.models[model] = lambda tensors: 1 / 0
            else:
                getattr(world.scorer, failure).add(model)

    return apply


@pytest.mark.parametrize("failure", ["down", "hanging", "nan", "short", "raises"])
def test_a_failed_knowledge_model_falls_back_to_the_control_model(world, failure):
    telemetry = Telemetry()
    answer = rank(
        world,
        rank_request(explain=True),
        before=fault(world, ("knowledge", failure)),
        telemetry=telemetry,
        score_timeout_ms=20,
    )
    assert list(answer.scores) == squash(-0.97, 1.02, 0.05)
    assert (answer.rung, answer.arm) == (BACKBONE, "knowledge")
    assert answer.reason.startswith("knowledge model: ")
    assert (answer.user_level, list(answer.item_levels)) == (0, [0, 0, 0])
    assert answer.explanation.model == f"control_{world.release_id}"
    assert telemetry.registry.get_sample_value("kar_backend_failures_total", {"backend": "knowledge model"}) == 1


def test_in_encoded_mode_the_control_model_gets_its_own_tensors_only(world):
    answer = rank(world, rank_request(), mode="encoded", before=fault(world, ("encoded", "down")))
    assert list(answer.scores) == squash(-0.97, 1.02, 0.05)
    assert "item_encoding" not in world.scorer.calls[-1][1]


def test_when_all_models_fail_the_caller_gets_its_own_order(world):
    broken = fault(world, ("knowledge", "down"), ("control", "raises"))
    bare = rank(world, rank_request(), before=broken)
    assert (bare.rung, list(bare.scores), list(bare.order), bare.backbone) == (CALLER, [], [0, 1, 2], "")
    assert "knowledge model: " in bare.reason
    assert "control model: " in bare.reason
    scored = rank(world, rank_request(caller_scores=[0.25, np.nan, 0.5]), before=broken)
    np.testing.assert_array_equal(scored.scores, [0.25, np.nan, 0.5])
    assert list(scored.order) == [2, 0, 1]


def test_no_time_left_answers_at_once(world):
    answer = rank(world, rank_request(caller_scores=[1, 3, 2]), left_s=0.002, deadline_margin_ms=2)
    assert (answer.rung, list(answer.order)) == (CALLER, [1, 2, 0])
    assert answer.reason == "no time was left before the deadline"
    assert world.store.reads == world.scorer.calls == []


@pytest.mark.parametrize(("left_s", "expected_ms"), [(None, 20), (1.0, 20), (0.015, 10)])
def test_a_backend_gets_its_cap_or_the_remaining_time_minus_the_margin(world, left_s, expected_ms):
    rank(world, rank_request(), left_s=left_s, store_timeout_ms=20, deadline_margin_ms=5)
    assert world.store.reads[-1][2] * 1e3 == pytest.approx(0.8 * expected_ms)  # the rest is for its answer's way


def test_after_a_slow_store_no_time_is_left_to_score(world):
    clock = Clock()
    world.store.gate = lambda: setattr(clock, "now", clock.now + 1)
    answer = rank(world, rank_request(), left_s=0.5, clock=clock)
    world.store.gate = None
    assert answer.rung == CALLER
    assert answer.reason == "no time was left for the knowledge model"
    assert answer.timings.fetch_ms == pytest.approx(1000)


def test_the_control_model_gets_the_time_that_the_knowledge_model_left(world):
    clock = Clock()
    before = fault(world, ("control", "hanging"))

    def slow_and_wrong(tensors):
        clock.now += 0.4
        raise UnavailableError("no")

    def apply():
        before()
        world.scorer.models[f"knowledge_{world.release_id}"] = slow_and_wrong

    answer = rank(world, rank_request(), left_s=0.412, clock=clock, before=apply, deadline_margin_ms=2)
    assert answer.rung == CALLER
    assert answer.reason.startswith("knowledge model: no; control model: ")


def test_stages_add_up_to_the_total(world):
    timings = rank(world, rank_request(), clock=Clock(tick=0.001)).timings
    stages = [timings.assign_ms, timings.fetch_ms, timings.assemble_ms, timings.score_ms, timings.respond_ms]
    assert all(stage >= 1 for stage in stages)
    assert sum(stages) == pytest.approx(timings.total_ms)


def test_levels_and_missing_values_are_counted(world):
    telemetry = Telemetry()
    column = FeatureColumn(name="year", numbers=[np.nan, np.inf, 1990])
    inline = rank_request()
    inline.candidates.features.append(column)
    rank(world, inline, telemetry=telemetry)
    value = telemetry.registry.get_sample_value
    assert value("kar_missing_values_total") == 2
    assert value("kar_knowledge_levels_total", {"entity": "user", "level": "full"}) == 1
    assert value("kar_knowledge_levels_total", {"entity": "item", "level": "neutral"}) == 1
    assert value("kar_stage_milliseconds_count", {"stage": "score"}) == 1


def test_a_request_may_name_any_loaded_release(world):
    other = world.add_release(backbone="din", created_s=2)

    async def run():
        releases = world.releases()
        await releases.open()
        await releases.restore()
        await releases.activate(other)
        ranker = Ranker(releases, world.store, world.scorer, world.settings(), Telemetry())
        return [(await ranker.rank(rank_request(release_id=id_))).backbone for id_ in ("", world.release_id, other)]

    assert asyncio.run(run()) == ["din", "dcnv2", "din"]
