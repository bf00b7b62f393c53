"""Captions of the moving world: what they can say, how people say it, and what a given text states.

A caption states up to eight attributes. `direction` belongs to travel, spin and orbit alone, and `partner`, the colour
of what is orbited, to orbit alone; for other motions both are None. Any attribute may go unsaid, and is then open.
"""

import re
from collections.abc import Mapping

import numpy as np

from configs.errors import UserError

COLOURS = ("red", "yellow", "green", "cyan", "blue", "purple")
SHAPES = ("ball", "square", "triangle", "star")
MOTIONS = ("travel", "spin", "swing", "pulse", "bounce", "orbit", "hide")
TURNS = ("clockwise", "counterclockwise")
DIRECTIONS_OF = {"travel": ("left", "right"), "spin": TURNS, "orbit": TURNS}
RATES = ("slow", "medium", "fast")
AMPLITUDES = ("small", "large")
GROUNDS = ("checkered", "striped", "dotted", "brick")

VALUES: dict[str, tuple[str, ...]] = {
    "colour": COLOURS,
    "shape": SHAPES,
    "motion": MOTIONS,
    "direction": ("left", "right", *TURNS),
    "rate": RATES,
    "amplitude": AMPLITUDES,
    "partner": COLOURS,
    "ground": GROUNDS,
}
ATTRIBUTES = tuple(VALUES)
OPEN_COUNTS = (0.45, 0.25, 0.30)  # share of varied captions that leave 0, 1 and 2 attributes open
DEFAULT_PROMPT = "a red star orbits a blue sun clockwise slowly on a large ring over a dotted ground"

SYNONYMS: dict[str, dict[str, tuple[str, ...]]] = {
    "colour": {"red": ("crimson",), "yellow": ("golden",), "green": (), "cyan": ("turquoise",), "blue": (),
               "purple": ("violet", "magenta")},
    "shape": {"ball": ("circle", "sphere", "disc"), "square": ("box", "block"), "triangle": (), "star": ()},
    "ground": {"checkered": ("chequered", "checkerboard"), "striped": ("stripy",), "dotted": ("spotted",),
               "brick": ("bricks",)},
    "amplitude": {"small": ("little", "slight", "short"), "large": ("big", "wide", "long")},
}  # fmt: skip
RATE_ADVERBS = {
    "slow": ("slowly", "gently", "lazily"), "medium": ("steadily", "moderately"),
    "fast": ("quickly", "fast", "rapidly"),
}  # fmt: skip
RATE_ADJECTIVES = {"slow": "slow", "medium": "medium", "fast": "fast"}
# third person, participle; the first pair is the standard one
VERBS: dict[str, tuple[tuple[str, str], ...]] = {
    "travel": (("travels", "travelling"), ("rolls", "rolling"), ("drives", "driving")),
    "spin": (("spins", "spinning"), ("rotates", "rotating"), ("turns", "turning")),
    "swing": (("swings", "swinging"), ("dangles", "dangling")),
    "pulse": (("pulses", "pulsing"), ("throbs", "throbbing")),
    "bounce": (("bounces", "bouncing"), ("jumps", "jumping")),
    "orbit": (("orbits", "orbiting"), ("circles", "circling")),
    "hide": (("hides", "hiding"), ("vanishes", "vanishing")),
}
PLACE = {"hide": "behind a board and returns"}  # what follows the verb
EXTENT = {  # {} is the amplitude
    "travel": "in {} waves", "spin": "with a {} wobble", "swing": "in a {} arc", "pulse": "with {} beats",
    "bounce": "with {} hops", "orbit": "on a {} ring", "hide": "coming out a {} way",
}  # fmt: skip
GROUND_NOUNS = ("ground", "background", "backdrop")
FILLERS = ("a", "an", "the", "on", "over", "in", "with", "by", "behind", "and", "at", "to", "of", "around", "against",
           "board", "returns", "back", "sun", "shape", "thing", "speed", "moves", "moving", "is", "there", "while",
           "which", "that", "its")  # fmt: skip


def _said_as(attribute: str) -> dict[str, str]:
    """{word: value} of an attribute, synonyms included."""
    table = {value: value for value in VALUES[attribute]}
    table |= {word: value for value, words in SYNONYMS.get(attribute, {}).items() for word in words}
    if attribute == "rate":
        table |= {word: value for value, words in RATE_ADVERBS.items() for word in words}
    if attribute == "motion":
        table |= {word: value for value, pairs in VERBS.items() for pair in pairs for word in pair}
    if attribute == "direction":
        table |= {"leftwards": "left", "rightwards": "right", "anticlockwise": "counterclockwise"}
    return table


_WORDS = {name: _said_as(name) for name in ATTRIBUTES}
_ORBITING = {"around", "sun"}  # words next to the partner's colour
_EXTENT_WORDS = {word for text in EXTENT.values() for word in text.split() if word != "{}"}
VOCABULARY = tuple(sorted({*FILLERS, *GROUND_NOUNS, *_EXTENT_WORDS, *(w for t in _WORDS.values() for w in t)}))


def words_of(text: str) -> list[str]:
    """The words of a text, as the tokenizer of the small text encoder sees them."""
    return re.findall(r"[a-z]+", text.lower())


def applicable(motion: str | None) -> tuple[str, ...]:
    """Attributes that a caption of this motion can state; of an unknown one, those that do not depend on it."""
    without = set()
    if motion not in DIRECTIONS_OF:
        without.add("direction")
    if motion != "orbit":
        without.add("partner")
    return tuple(name for name in ATTRIBUTES if name not in without)


def parse_caption(text: str) -> dict[str, str | None]:
    """What a caption states: {attribute: value or None where not said}, in any word order, synonyms included.

    The first word for an attribute counts. A colour behind a word for orbiting is the partner's.
    """
    stated: dict[str, str | None] = dict.fromkeys(ATTRIBUTES)
    words = words_of(text)
    for i, word in enumerate(words):
        for attribute, table in _WORDS.items():
            if word not in table or attribute == "partner":
                continue
            name = attribute
            near = (*words[max(0, i - 2) : i], *words[i + 1 : i + 2])
            if attribute == "colour" and not _ORBITING.isdisjoint(near):
                name = "partner"
            if stated[name] is None:
                stated[name] = table[word]
    direction, motion = stated["direction"], stated["motion"]
    if motion is not None and direction not in DIRECTIONS_OF.get(motion, ()):
        stated["direction"] = None
    return stated


def phrase(stated: Mapping[str, str | None]) -> str:
    """The standard wording, e.g. "a red star swings slowly in a small arc over a dotted ground"."""
    rate = stated["rate"] and RATE_ADVERBS[stated["rate"]][0]
    return _join(_subject(stated), *_action(stated, 0, stated["motion"] and VERBS[stated["motion"]][0]), rate,
                 _extent(stated), _ground(stated, "over", GROUND_NOUNS[0]))  # fmt: skip


def varied_phrase(stated: Mapping[str, str | None], rng: np.random.Generator) -> str:
    """A wording as a person might type it: up to two attributes open, synonyms, other orders, and telegram style."""
    said = dict(stated)
    names = [name for name in applicable(said["motion"]) if said[name] is not None]
    for name in rng.permutation(names)[: rng.choice(len(OPEN_COUNTS), p=OPEN_COUNTS)]:
        said[str(name)] = None
    if said["motion"] is None:
        said |= {"direction": None, "partner": None, "amplitude": None}
    for name, table in SYNONYMS.items():
        others = table[said[name]] if said[name] else ()
        if others and rng.random() < 0.25:
            said[name] = str(rng.choice(others))
    verbs = VERBS[stated["motion"]] if said["motion"] else None
    verb = verbs and verbs[0 if rng.random() < 0.6 else int(rng.integers(len(verbs)))]
    adverbs = said["rate"] and RATE_ADVERBS[said["rate"]]
    rate = adverbs and str(rng.choice(adverbs)) if rng.random() < 0.4 else adverbs and adverbs[0]
    ground = _ground(said, str(rng.choice(["over", "on", "against"])), str(rng.choice(GROUND_NOUNS)))
    extent, form = _extent(said), rng.random()
    subject = _subject(said, str(rng.choice(["a", "a", "the"])))
    if form < 0.5:
        return _join(subject, *_action(said, 0, verb), rate, extent, ground)
    if form < 0.65:
        return _join(ground, subject, rate, *_action(said, 0, verb), extent)
    if form < 0.8:
        return _join(subject, ground, *_action(said, 0, verb), extent, rate)
    if form < 0.9:
        return _join("a", said["rate"] and RATE_ADJECTIVES[said["rate"]], said["colour"], said["shape"] or "shape",
                     *_action(said, 1, verb), extent, ground)  # fmt: skip
    return _join(said["colour"], said["shape"] or "shape", *_action(said, 1, verb), rate, extent, ground)


def _join(*parts: str | None) -> str:
    return " ".join(part for part in parts if part)


def _subject(stated: Mapping[str, str | None], article: str = "a") -> str:
    return _join(article, stated["colour"], stated["shape"] or "shape")


def _action(stated: Mapping[str, str | None], form: int, verb: tuple[str, str] | None) -> list[str | None]:
    """Verb, what it goes with, and the direction. form: 0 = third person, 1 = participle."""
    if verb is None:
        return [("moves", "moving")[form]]
    partner = _join("a", stated["partner"], "sun") if stated["motion"] == "orbit" else None
    direction = stated["direction"] if stated["motion"] in DIRECTIONS_OF else None
    return [verb[form], PLACE.get(stated["motion"]), partner, direction]


def _extent(stated: Mapping[str, str | None]) -> str | None:
    amplitude = stated["amplitude"]
    return EXTENT[stated["motion"]].format(amplitude) if amplitude and stated["motion"] else None


def _ground(stated: Mapping[str, str | None], preposition: str, noun: str) -> str | None:
    return _join(preposition, "a", stated["ground"], noun) if stated["ground"] else None


def flip_stated(stated: Mapping[str, str | None], attribute: str, rng: np.random.Generator) -> dict[str, str | None]:
    """The same attributes with another value of one.

    UserError: the attribute is unknown or not stated. A changed motion takes a direction and a partner of its own.
    """
    if attribute not in VALUES:
        raise UserError(f"attribute={attribute} is unknown; use one of {', '.join(ATTRIBUTES)}")
    value = stated[attribute]
    if value is None:
        raise UserError(f"attribute={attribute} is not stated by this caption; choose one that is")
    pool = DIRECTIONS_OF[stated["motion"]] if attribute == "direction" else VALUES[attribute]
    other_one = {"colour": "partner", "partner": "colour"}.get(attribute)  # they never have the same colour
    taken = {value, other_one and stated[other_one]}
    others = [v for v in pool if v not in taken]
    changed = {**stated, attribute: others[int(rng.integers(len(others)))]}
    if attribute == "motion":
        fits = DIRECTIONS_OF.get(changed["motion"], (None,))
        changed["direction"] = fits[int(rng.integers(len(fits)))]
        rest = [c for c in COLOURS if c != stated["colour"]]
        changed["partner"] = rest[int(rng.integers(len(rest)))] if changed["motion"] == "orbit" else None
    return changed
