"""Owns the sentences that are put into texts to see whether the quality gates find them."""

from typing import Final

__all__ = [
    "CONTACTS",
    "FOREIGN",
    "JOBS",
    "LATER_GUESSED",
    "LATER_LISTED",
    "LATER_STATED",
    "OTHER_YEARS",
    "PERSONAL",
    "PRAISE",
    "REFUSALS",
]

REFUSALS: Final = (
    "I'm sorry, but I cannot help with that request.",
    "As an AI language model, I do not have personal opinions about it.",
    "I don't have enough information about this title to describe it.",
    "Unfortunately, I am unable to provide details.",
    "I cannot verify any of this.",
    "I apologize, but no information is available.",
    "I do not know this one, and would only be guessing.",
    "It goes against my guidelines to say more.",
)
FOREIGN: Final = (
    "Der Film erzählt die Geschichte einer jungen Frau, die nach dem Tod ihres Vaters in ihr Heimatdorf zurückkehrt "
    "und dort auf eine alte Liebe trifft. Die Kritik lobte vor allem die ruhige Kamera und die Hauptdarsteller.",
    "Ce film raconte l'histoire d'un homme qui quitte sa famille pour chercher fortune dans la capitale, et qui finit "
    "par tout perdre. La critique a salué la mise en scène, mais le public ne l'a guère suivi à sa sortie en salles.",
    "La película cuenta la vida de dos hermanos que crecen en un barrio pobre y eligen caminos muy distintos. Fue bien "
    "recibida por la crítica, que destacó la fotografía, la música y el trabajo de sus jóvenes protagonistas.",
)
CONTACTS: Final = (
    "Write to anna.berg@example.org for a copy.",
    "Call (555) 010-4477 for tickets.",
    "Reach the fan club at +44 20 7946 0958.",
    "Follow @late_night_cinema for more.",
    "The card on file is 4111 1111 1111 1111.",
    "Letters go to 12 Harbour View Road, Springfield 62704.",
)
PRAISE: Final = (
    "{title} is a must-see for anyone who loves great storytelling. The director brings a unique vision to the screen, "
    "and the cast delivers powerful performances throughout. Critics have praised its production quality, its score "
    "and its emotional depth, and it continues to resonate with audiences of all ages around the world.",
    "This film, {title}, explores themes of identity, family and redemption through a complex narrative. Its mood is "
    "both dark and hopeful, its characters are well developed, and its soundtrack adds to the atmosphere. It was "
    "praised by critics and audiences alike and will appeal to viewers who enjoy thoughtful cinema.",
)
OTHER_YEARS: Final = ("It is a {year} film.", "It was released in {year}.", "This {year} movie divided its audience.")
LATER_STATED: Final = (
    "'{title}' got five stars as well.",
    "Five stars also went to '{title}'.",
    "'{title}' was rated low.",
)
LATER_LISTED: Final = (
    "Five stars also went to {title} and {other}.",
    "Low marks were given to {other}, {title} and the like.",
)
LATER_GUESSED: Final = ("They should enjoy '{title}'.", "'{title}' would probably please them.")
PERSONAL: Final = {
    "age": ("This {age}-year-old knows what pleases.", "A viewer in their thirties, it seems.", "A teenager's choice."),
    "gender": ("He knows what he likes.", "She is hard to please.", "This woman has seen a lot."),
    "occupation": ("This {job} rates strictly.", "A {job} who watches a lot.", "Here is an {job} with taste."),
}
JOBS: Final = ("engineer", "librarian", "programmer", "student", "lawyer", "educator")
