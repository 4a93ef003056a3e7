"""Owns made-up texts for tests: English that passes the quality gates, each one different."""

import random

ADJECTIVES = (
    "quiet bright dark gentle clever strange honest lonely restless slow tense warm cold proud careful noisy "
    "brave modern early grand small bitter sweet sudden"
)
NOUNS = (
    "village winter journey stranger secret letter garden storm river promise shadow memory train station island "
    "mountain wedding market window kitchen bridge harbour forest prison lantern theatre hotel desert"
)
VERBS = (
    "finds loses leaves follows remembers rebuilds questions defends discovers abandons paints sells protects hides "
    "repairs visits imagines betrays forgives watches"
)


def prose(title: str, seed: object) -> str:
    """Four sentences about `title`, different ones for each seed."""
    draw = random.Random(str(seed))

    adjectives, nouns, verbs = ADJECTIVES.split(), NOUNS.split(), VERBS.split()

    def someone() -> str:
        return f"{draw.choice(adjectives)} {draw.choice(nouns)}"

    def sentence() -> str:
        return f"The {someone()} {draw.choice(verbs)} a {someone()} and {draw.choice(verbs)} the {someone()}."

    rest = " ".join(sentence() for _ in range(3))
    return f"{title} tells how a {someone()} {draw.choice(verbs)} the {someone()}. {rest}"
