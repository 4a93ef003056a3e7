"""Owns the phase `publish` of a refresh: fresh texts, vectors and features into the store and the index."""

from collections.abc import Mapping
from contextlib import closing

from kar_offline.publish.knowledge_update import publish_knowledge
from kar_offline.publish.release_target import ReleaseTarget
from kar_offline.refresh.context import RefreshContext
from kar_offline.refresh.encode import EncodedKnowledge
from kar_offline.refresh.ingest import Arrivals
from kar_offline.refresh.rewrite import RewrittenKnowledge

__all__ = ["publish_fresh"]


def publish_fresh(
    context: RefreshContext,
    target: ReleaseTarget,
    arrivals: Arrivals,
    rewritten: RewrittenKnowledge,
    encoded: EncodedKnowledge,
) -> Mapping[str, int]:
    """Write the records that the store lacks; returns the number of written records by part.

    Args:
        context: The work folder, the store and the clock.
        target: The release.
        arrivals: The entities whose features changed.
        rewritten: The dataset and the texts.
        encoded: The vectors.

    Raises:
        IntegrityError: the vectors do not fit the dataset.
        UnavailableError: the store does not answer; a refresh that is started again continues.
    """
    with closing(context.open_store()) as store:
        return publish_knowledge(
            target,
            store,
            context.work.index / target.release.release_id,
            dataset=rewritten.dataset,
            knowledge=rewritten.knowledge,
            encoding=encoded.encoding,
            changed_entities=arrivals.entities,
            clock=context.now_ms,
        )
