"""Stage `world_text`: teach the small text encoder what captions of the moving world say.

Linear heads read each attribute, or that it is not said, off a softmax-weighted mean of the output, each with weights
of its own; so what every word means in its place is in the output that other networks attend to. Afterwards the
encoder is frozen, as UMT5-XXL is at full size.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from configs.schema import Config
from model.text import TextEncoder
from model.weights.load import save_network
from trainer.build import seeded, trained_text_encoder
from trainer.stage import Supervised
from trainer.world.captions import VALUES, VOCABULARY, parse_caption
from trainer.world.scene import World, training_caption
from utils.distributed import Ranks
from utils.seeds import stable_hash


class AttributeHeads(nn.Module):
    """Hidden states [B, L, D] and mask [B, L] -> logits [B, values + 1] of each attribute; the last is "not said"."""

    def __init__(self, width: int):
        super().__init__()
        self.attend = nn.Linear(width, len(VALUES))
        self.read = nn.ModuleDict({name: nn.Linear(width, len(values) + 1) for name, values in VALUES.items()})

    def forward(self, hidden: Tensor, mask: Tensor) -> dict[str, Tensor]:
        weight = self.attend(hidden).masked_fill(~mask.bool()[..., None], -1e4).softmax(1)  # [B, L, attributes]
        seen = torch.einsum("bla,bld->bad", weight, hidden)
        return {name: read(seen[:, i]) for i, (name, read) in enumerate(self.read.items())}


class WorldText(Supervised):
    """Cross-entropy of every attribute, "not said" being one of its values."""

    name = "world_text"

    def __init__(self, config: Config, device: torch.device, ranks: Ranks):
        self.encoder: TextEncoder = trained_text_encoder(config, VOCABULARY)
        with seeded(config, "heads"):
            heads = AttributeHeads(self.encoder.encoder.config.d_model)
        module = nn.ModuleDict({"encoder": self.encoder.encoder, "heads": heads})
        super().__init__(config, device, ranks, module)
        scenes = World().scenes(stable_hash(config.seed, "captions"), config.training.bank_clips)
        self.captions = [training_caption(scene) for scene in scenes]

    def batch(self, step: int, micro: int) -> dict[str, Tensor]:
        size = self.config.training.micro_batch
        start = self.part(step, micro) * size
        return self._encoded([self.captions[(start + i) % len(self.captions)] for i in range(size)])

    def _encoded(self, said: list[str]) -> dict[str, Tensor]:
        """Token ids and mask [B, L], and the index of each attribute's value [B]."""
        ids, mask = self.encoder.tokenize(said)
        parsed = [parse_caption(text) for text in said]
        rows = {
            name: torch.tensor([len(values) if p[name] is None else values.index(p[name]) for p in parsed])
            for name, values in VALUES.items()
        }
        return {name: value.to(self.device) for name, value in ({"ids": ids, "mask": mask} | rows).items()}

    def _logits(self, module: nn.ModuleDict, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        return module["heads"](module["encoder"](input_ids=ids, attention_mask=mask).last_hidden_state, mask)

    def loss(self, ids: Tensor, mask: Tensor, **labels: Tensor) -> dict[str, Tensor]:
        logits = self._logits(self.module, ids, mask)
        terms = {name: F.cross_entropy(logits[name].float(), labels[name]) for name in logits}
        return {"loss": torch.stack(list(terms.values())).sum()} | terms

    @torch.no_grad()
    def validate(self, step: int, folder: Path) -> dict[str, float]:
        """Share of captions of unseen scenes in which each attribute is read right."""
        scenes = World().scenes(stable_hash(self.config.seed, "validation"), 512)
        batch = self._encoded([training_caption(scene) for scene in scenes])
        logits = self._logits(self.averaged, batch["ids"], batch["mask"])
        return {name: (logits[name].argmax(-1) == batch[name]).float().mean().item() for name in logits}

    @torch.no_grad()
    def export(self, folder: Path, step: int) -> None:
        card = {"stage": self.name, "step": step}
        save_network(self.averaged["encoder"], folder, card=card, tokenizer=self.encoder.tokenizer)
