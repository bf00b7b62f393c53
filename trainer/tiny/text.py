"""Stage `text`: train the tiny text encoder on captions of the tiny world.

The encoder is trained to let five linear heads read shape, colour, direction, speed and background (or that the
caption does not say) off the mean of its output. After that it is frozen, as UMT5-XXL is at full size.
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
from trainer.tiny.captions import VALUES, VOCABULARY, parse_caption
from trainer.tiny.world import TinyWorld, training_caption
from utils.distributed import Ranks
from utils.seeds import stable_hash


class TextStage(Supervised):
    """Cross-entropy of every attribute, "not said" being one of its values."""

    name = "text"

    def __init__(self, config: Config, device: torch.device, ranks: Ranks):
        self.encoder: TextEncoder = trained_text_encoder(config, VOCABULARY)
        width = self.encoder.encoder.config.d_model
        with seeded(config, "heads"):
            heads = {name: nn.Linear(width, len(values) + 1) for name, values in VALUES.items()}
        module = nn.ModuleDict({"encoder": self.encoder.encoder, "heads": nn.ModuleDict(heads)})
        super().__init__(config, device, ranks, module)
        self.world = TinyWorld(config.video.height, config.video.width)
        scenes = self.world.scenes(stable_hash(config.seed, "captions"), config.training.bank_clips)
        self.captions = [training_caption(scene) for scene in scenes]

    def _labels(self, prompts: list[str]) -> dict[str, Tensor]:
        """Index of each attribute's value [B]; the last index is "not said"."""
        parsed = [parse_caption(text) for text in prompts]
        return {
            name: torch.tensor([values.index(p[name]) if p[name] is not None else len(values) for p in parsed])
            for name, values in VALUES.items()
        }

    def batch(self, step: int, micro: int) -> dict[str, Tensor]:
        size = self.config.training.micro_batch
        start = self.part(step, micro) * size
        prompts = [self.captions[(start + i) % len(self.captions)] for i in range(size)]
        ids, mask = self.encoder.tokenize(prompts)
        batch = {"ids": ids, "mask": mask} | self._labels(prompts)
        return {name: value.to(self.device) for name, value in batch.items()}

    def _logits(self, module: nn.ModuleDict, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        hidden = module["encoder"](input_ids=ids, attention_mask=mask).last_hidden_state
        weight = mask[..., None].to(hidden.dtype)
        mean = (hidden * weight).sum(1) / weight.sum(1)
        return {name: head(mean) for name, head in module["heads"].items()}

    def loss(self, ids: Tensor, mask: Tensor, **labels: Tensor) -> dict[str, Tensor]:
        logits = self._logits(self.module, ids, mask)
        terms = {name: F.cross_entropy(logits[name].float(), labels[name]) for name in logits}
        return {"loss": torch.stack(list(terms.values())).sum()} | terms

    @torch.no_grad()
    def validate(self, step: int, folder: Path) -> dict[str, float]:
        """Accuracy of each head on captions of unseen scenes."""
        scenes = self.world.scenes(stable_hash(self.config.seed, "validation"), 512)
        prompts = [training_caption(scene) for scene in scenes]
        ids, mask = (x.to(self.device) for x in self.encoder.tokenize(prompts))
        logits, labels = self._logits(self.averaged, ids, mask), self._labels(prompts)
        return {name: (logits[name].argmax(-1).cpu() == labels[name]).float().mean().item() for name in logits}

    def export(self, folder: Path, step: int) -> None:
        card = {"stage": self.name, "step": step}
        save_network(self.averaged["encoder"], folder, card=card, tokenizer=self.encoder.tokenizer)
