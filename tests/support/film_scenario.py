"""The text of a small film scenario, as a scenario file holds it."""

__all__ = ["film_scenario"]


def film_scenario(most_words: int, *, limits: str = "") -> str:
    """A scenario whose texts have 15 to `most_words` words; `limits` is the content of its table of that name."""
    return f"""
name = "films"
[words]
item = "film"
items = "films"
user = "viewer"
ratings = "stars from 1 to 5"
[item]
template = "factual/2"
allowed = ["title", "genres"]
factors = ["plot"]
words = [15, {most_words}]
[user]
template = "reasoning/2"
allowed = ["age"]
factors = ["mood"]
words = [15, {most_words}]
expires_after_days = 30
[[seasons]]
name = "christmas"
begins = "12-01"
ends = "12-26"
about = "the weeks before Christmas"
[limits]
{limits}
"""
