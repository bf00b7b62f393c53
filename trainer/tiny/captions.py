"""Words of the tiny world: what its attributes are called, captions made from them and read back.

A caption states some of five attributes: colour, shape, direction, speed, background. What it leaves out is free.
"""

import re
from collections.abc import Mapping, Sequence

import numpy as np

from configs.errors import UserError

ATTRIBUTES = ("colour", "shape", "direction", "speed", "background")
COLOURS = ("red", "yellow", "green", "cyan", "blue", "magenta")  # evenly spaced in hue: colour i has hue 60 i degrees
SHAPES = ("circle", "square", "triangle", "cross")
# Direction i points along (dx, dy) in pixels, y downwards; the opposite of direction i is i + 4 modulo 8.
DIRECTIONS = ("right", "down-right", "down", "down-left", "left", "up-left", "up", "up-right")
SPEEDS = ("slow", "medium", "fast")
BACKGROUNDS = ("black", "gray", "white", "striped", "checkered", "gradient")
VALUES: dict[str, tuple[str, ...]] = {
    "colour": COLOURS,
    "shape": SHAPES,
    "direction": DIRECTIONS,
    "speed": SPEEDS,
    "background": BACKGROUNDS,
}
DEFAULT_PROMPT = "a red circle moves right"

SYNONYMS: dict[str, dict[str, tuple[str, ...]]] = {
    "colour": {
        "red": ("crimson", "scarlet"),
        "yellow": ("golden", "gold"),
        "green": ("lime",),
        "cyan": ("turquoise", "aqua"),
        "blue": ("navy",),
        "magenta": ("purple", "pink", "violet"),
    },
    "shape": {
        "circle": ("ball", "disc", "disk", "dot"),
        "square": ("box", "block"),
        "triangle": ("pyramid",),
        "cross": ("plus",),
    },
    "speed": {
        "slow": ("slowly", "leisurely"),
        "medium": ("steadily", "moderate", "moderately"),
        "fast": ("quickly", "quick", "rapidly", "swiftly"),
    },
    "background": {
        "black": (),
        "gray": ("grey",),
        "white": (),
        "striped": ("stripes", "stripy"),
        "checkered": ("checkerboard", "chequered", "checked", "checks"),
        "gradient": ("shaded",),
    },
}
HORIZONTAL = {w: s for s in ("left", "right") for w in (s, f"{s}ward", f"{s}wards")}
VERTICAL = {w: s for s in ("up", "down") for w in (s, f"{s}ward", f"{s}wards")}
VERBS = ("moves", "goes", "flies", "travels", "glides", "drifts", "slides", "moving", "going", "flying")
PLAIN_WORDS = ("a", "an", "the", "and", "to", "at", "on", "over", "in", "is", "with", "of", "towards", "speed")
NOUNS = ("shape", "object", "background", "diagonally")
PLURAL = ("stripes", "checks")  # "on stripes", not "on a stripes background"
SPEED_PHRASE = {"slow": "slowly", "medium": "at medium speed", "fast": "quickly"}


def _vocabulary() -> tuple[str, ...]:
    words = {*PLAIN_WORDS, *NOUNS, *VERBS, *HORIZONTAL, *VERTICAL}
    for attribute, table in SYNONYMS.items():
        for value in VALUES[attribute]:
            words |= {value, *table[value]}
    return tuple(sorted(words))


VOCABULARY = _vocabulary()  # every word that a caption or a synonym may hold; a tokenizer is built from it
_VALUE_OF = {
    attribute: {word: value for value in VALUES[attribute] for word in (value, *table[value])}
    for attribute, table in SYNONYMS.items()
}


def words_of(text: str) -> list[str]:
    """Lower-case words of a prompt; hyphens and punctuation separate ("up-right" is two words)."""
    return re.findall(r"[a-z]+", text.lower())


def parse_caption(text: str) -> dict[str, str | None]:
    """What a caption states: {attribute: value or None where not said}.

    Any word order, missing attributes and synonyms are fine. Of two words for one attribute the last counts, but the
    colour and the shape are the first ones said. "black", "gray" and "white" are backgrounds, unless a shape follows.
    """
    words = words_of(text)
    stated: dict[str, str | None] = dict.fromkeys(ATTRIBUTES)
    side = height = None
    for i, word in enumerate(words):
        side = HORIZONTAL.get(word, side)
        height = VERTICAL.get(word, height)
        for attribute, table in _VALUE_OF.items():
            if word not in table:
                continue
            if attribute in ("colour", "shape") and stated[attribute] is not None:
                continue
            following = words[i + 1] if i + 1 < len(words) else ""
            if attribute == "background" and following in _VALUE_OF["shape"]:
                continue
            stated[attribute] = table[word]
    if side or height:
        stated["direction"] = "-".join(part for part in (height, side) if part)
    return stated


def direction_phrase(direction: str, rng: np.random.Generator | None = None) -> str:
    """"up-right" -> "up and to the right"; with `rng`, now and then another wording."""
    height, _, side = direction.rpartition("-")
    other = rng is not None and rng.random() < 0.4
    if height:
        if other:
            wordings = (f"{height} and {side}", f"{height} {side}", f"diagonally {height} and to the {side}")
            return str(rng.choice(wordings))
        return f"{height} and to the {side}"
    if other:
        return f"to the {side}" if side in ("left", "right") and rng.random() < 0.7 else f"{side}wards"
    return side


def phrase(stated: Mapping[str, str | None]) -> str:
    """The standard wording of some attributes, e.g. "a red circle moves quickly right on a striped background"."""
    return _sentence(stated, "a", "moves", stated["direction"] and direction_phrase(stated["direction"]), False)


def _sentence(stated: Mapping[str, str | None], article: str, verb: str, direction: str | None, early: bool) -> str:
    """One sentence; `early` puts the background behind the subject instead of at the end."""
    subject = [article, stated["colour"], stated["shape"] or "shape"]
    ground = stated["background"]
    background = f"on {ground}" if ground in PLURAL else f"on a {ground} background" if ground else None
    speed = stated["speed"] and SPEED_PHRASE.get(stated["speed"], stated["speed"])
    late_speed = speed if speed and " " in speed else None
    motion = [verb, None if late_speed else speed, direction, late_speed]
    parts = [*subject, background, *motion] if early else [*subject, *motion, background]
    return " ".join(part for part in parts if part)


def varied_phrase(stated: Mapping[str, str | None], rng: np.random.Generator) -> str:
    """A wording as a person might type it: attributes are left out at times, synonyms and other orders come up.

    About two in five captions state everything; one in five is of the short form "a red circle moves right".
    """
    said: dict[str, str | None] = dict(stated)
    form = rng.random()
    if form < 0.2:
        said["speed"] = said["background"] = None
    elif form < 0.6:
        for attribute, share in (("speed", 0.5), ("background", 0.5), ("colour", 0.12), ("shape", 0.12)):
            if rng.random() < share:
                said[attribute] = None
        if rng.random() < 0.08:
            said["direction"] = None
    for attribute in ("colour", "shape", "speed", "background"):
        value = said[attribute]
        others = SYNONYMS[attribute][value] if value else ()
        if others and rng.random() < 0.12:
            # Only adverbs fit where the speed stands.
            fitting = [w for w in others if attribute != "speed" or w.endswith("ly")]
            said[attribute] = str(rng.choice(fitting))
    direction = direction_phrase(said["direction"], rng) if said["direction"] else None
    verb = str(rng.choice(VERBS)) if rng.random() < 0.3 else "moves"
    article = ("the", "")[int(rng.integers(2))] if rng.random() < 0.15 else "a"
    return _sentence(said, article, verb, direction, early=rng.random() < 0.15)


def opposite(direction: str) -> str:
    """"up-right" -> "down-left"."""
    return DIRECTIONS[(DIRECTIONS.index(direction) + 4) % 8]


def flip_value(attribute: str, value: str, rng: np.random.Generator) -> str:
    """Another value of an attribute. `sign` and `axis` stand for the direction reversed, and turned by 90 degrees."""
    if attribute == "sign":
        return opposite(value)
    if attribute == "axis":
        return DIRECTIONS[(DIRECTIONS.index(value) + (2, 6)[int(rng.integers(2))]) % 8]
    if attribute not in VALUES:
        raise UserError(f"attribute={attribute} is unknown; use one of {', '.join((*ATTRIBUTES, 'sign', 'axis'))}")
    others: Sequence[str] = [v for v in VALUES[attribute] if v != value]
    return others[int(rng.integers(len(others)))]


def flip_stated(stated: Mapping[str, str | None], attribute: str, rng: np.random.Generator) -> str:
    """The standard wording with one attribute changed; raises UserError where the caption does not state it."""
    key = "direction" if attribute in ("sign", "axis") else attribute
    if key in stated and stated[key] is None:
        raise UserError(f"attribute={attribute} is not stated by this caption; choose one that is")
    value = flip_value(attribute, stated[key] if key in stated else "", rng)
    return phrase({**stated, key: value})
