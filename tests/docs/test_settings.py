import pytest
from tests.support.paths import DOCS

from kar_offline.settings_page import settings_page

pytestmark = pytest.mark.unit


def test_the_page_lists_every_setting_as_the_code_has_it():
    again = "make it again: python -m kar_offline.settings_page > docs/settings.md"
    assert (DOCS / "settings.md").read_text(encoding="utf-8") == settings_page(), again
