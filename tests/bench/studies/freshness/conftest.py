import pytest
from tests.support.event_logs import event_log


@pytest.fixture
def small_log():
    """Two users and four items on days 0 to 4; item 3 comes after the month of days 2 and 3."""
    return event_log(
        user=[0, 0, 1, 0, 1, 1, 0, 1],
        item=[0, 1, 0, 2, 1, 2, 1, 3],
        rating=[5, 1, 4, 5, 2, 3, 4, 5],
        day=[0, 0, 1, 1, 2, 2, 3, 4],
    )
