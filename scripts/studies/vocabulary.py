"""Which world a model is of: its tokenizer has the words."""

import sys
from collections.abc import Sequence

from configs.errors import UserError
from configs.schema import Config
from model.weights.load import load_tokenizer
from trainer.tiny.captions import BACKGROUNDS, SHAPES
from trainer.world.captions import DEFAULT_PROMPT

WORLDS: dict[str, tuple[Sequence[str], str]] = {  # words that the other world lacks among them, and an example
    "tiny": ((*SHAPES, *BACKGROUNDS), "configs/tiny.yaml"),
    "moving": (DEFAULT_PROMPT.split(), "configs/world/world.yaml"),
}


def check_world(config: Config, world: str) -> None:
    """UserError unless the model is of the `world`, tiny or moving; none of its networks is read."""
    words, example = WORLDS[world]
    known = load_tokenizer(config.model.tokenizer, sys.maxsize).get_vocab()
    if unknown := [word for word in dict.fromkeys(words) if word not in known]:
        raise UserError(
            f"model.tokenizer={config.model.tokenizer} lacks {', '.join(unknown)}: this model is not of the {world} "
            f"world; give a configuration of one that is, such as {example}"
        )
