import json

import pytest
from tests.support.training import (
    DIM,
    USERS,
    write_work,
)

from kar_offline.train.vectors import load_text_vectors
from kar_offline.work_folder import WorkFolder
from kar_sidecar.errors import IntegrityError, PreconditionError

pytestmark = pytest.mark.unit


def test_vectors_are_checked_against_the_dataset(tmp_path):
    dataset = write_work(WorkFolder(tmp_path))
    vectors = load_text_vectors(tmp_path / "encoding", "raw", dataset)
    assert vectors.dim == DIM
    assert vectors.user_present.tolist() == [True, False] + [True] * (USERS - 2)
    header = tmp_path / "encoding" / "raw_item.json"
    values = json.loads(header.read_text())
    header.write_text(json.dumps({**values, "ids": values["ids"][::-1]}))
    with pytest.raises(IntegrityError, match="raw_item"):
        load_text_vectors(tmp_path / "encoding", "raw", dataset)
    header.write_text(json.dumps({**values, "encoder_id": "e2"}))
    with pytest.raises(IntegrityError, match="two encoders"):
        load_text_vectors(tmp_path / "encoding", "raw", dataset)
    header.unlink()
    with pytest.raises(PreconditionError, match="kar encode"):
        load_text_vectors(tmp_path / "encoding", "raw", dataset)
