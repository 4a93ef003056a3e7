import json
import re

import pytest
from tests.support.paths import DOCS

pytestmark = pytest.mark.unit

PAGE = (DOCS / "results.md").read_text(encoding="utf-8")
REPORT = json.loads((DOCS / "results" / "freshness.json").read_text())
HEADER = [
    *("arm", "imputed", "calls a day", "calls before", "in the month", "USD", "items with text", "users with text"),
    *("AUC", "GAUC", "- control", "- no_calls", "- all_calls"),
]


def difference(entry, other):
    if other not in entry["minus"]:
        return ""
    mean, low, high = (f"{entry['minus'][other][name] * 1e4:+.0f}" for name in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def cells(entry):
    """One line of the page's table."""
    return [
        entry["arm"],
        entry["loans"],
        "any" if entry["budget"] is None else str(entry["budget"]),
        f"{entry['calls_before']:,}",
        f"{sum(entry['calls'].values()):,}",
        f"{entry['usd_before'] + entry['usd']:.2f}",
        *(f"{100 * entry['levels'][kind]['full']:.0f} %" for kind in ("item", "user")),
        *(f"{entry[name]:.4f}" for name in ("auc", "gauc")),
        *(difference(entry, other) for other in ("control", "no_calls", "all_calls")),
    ]


def test_the_simulated_month_of_the_page_is_in_the_committed_report():
    table = re.search(r"<!-- freshness -->\n+((?:\|.*\n)+)", PAGE).group(1)
    header, _, *rows = [[cell.strip() for cell in line.strip("\n").split("|")[1:-1]] for line in table.splitlines()]
    assert header == HEADER
    assert rows == [cells(entry) for entry in REPORT["summary"]]
    picture = re.search(r"!\[.*\]\((results/freshness\.png)\)", PAGE).group(1)
    assert (DOCS / picture).is_file()


def test_three_budgets_are_between_none_and_any_number():
    budgets = [entry["budget"] for entry in REPORT["summary"] if (entry["arm"], entry["loans"]) == ("paper", "never")]
    assert len(budgets) == 5
    assert (budgets[0], budgets[-1]) == (0, None)
