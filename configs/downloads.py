"""What `scripts/download.py` can fetch: which files, from where, and where they go. No file here has been seen by us.

Sizes are what the published parameter counts come to in the published precision, for the check of disk space; a file's
own header says exactly how long it must be. Hashes are those that the hub states while a file is fetched: they are kept
beside it, and `--verify` holds the file to them.
"""

from dataclasses import dataclass

TOKENIZER = (
    "google/umt5-xxl/special_tokens_map.json",
    "google/umt5-xxl/spiece.model",
    "google/umt5-xxl/tokenizer.json",
    "google/umt5-xxl/tokenizer_config.json",
)
T5, VAE = "models_t5_umt5-xxl-enc-bf16.pth", "Wan2.1_VAE.pth"
SMALL = "Wan-AI/Wan2.1-T2V-1.3B"


@dataclass(frozen=True)
class Download:
    """One name of the command line."""

    what: str
    source: str  # repository on the hub, or owner/name/path on GitHub where `files` come from there
    folder: str  # where they go, relative to the checkout
    files: tuple[str, ...]  # in the repository, and below `folder`
    gigabytes: float  # about
    optional: tuple[str, ...] = ()  # some repositories lack these
    hub: bool = True


DOWNLOADS = {
    "wan-1.3b": Download(
        "Wan2.1-T2V-1.3B: transformer, VAE, text encoder, tokenizer",
        SMALL,
        "wan_models/Wan2.1-T2V-1.3B",
        ("config.json", "diffusion_pytorch_model.safetensors", VAE, T5, *TOKENIZER),
        17.6,
        optional=TOKENIZER[:1],
    ),
    "wan-14b": Download(
        "Wan2.1-T2V-14B: the transformer, which is the teacher",
        "Wan-AI/Wan2.1-T2V-14B",
        "wan_models/Wan2.1-T2V-14B",
        (
            "config.json",
            "diffusion_pytorch_model.safetensors.index.json",
            *(f"diffusion_pytorch_model-{i:05d}-of-00006.safetensors" for i in range(1, 7)),
        ),
        57.2,
    ),
    "umt5": Download(
        "UMT5-XXL text encoder and its tokenizer",
        SMALL,
        "wan_models/Wan2.1-T2V-1.3B",
        (T5, *TOKENIZER),
        11.4,
        optional=TOKENIZER[:1],
    ),
    "vae": Download("Wan 2.1 VAE", SMALL, "wan_models/Wan2.1-T2V-1.3B", (VAE,), 0.51),
    "taew2.1": Download(
        "the tiny decoder (TAEHV)", "madebyollin/taehv/raw/main", "checkpoints", ("taew2_1.pth",), 0.05, hub=False
    ),
    "self-forcing": Download(
        "Self-Forcing's student and its ODE initialisation",
        "gdhe17/Self-Forcing",
        ".",
        ("checkpoints/self_forcing_dmd.pt", "checkpoints/ode_init.pt"),
        11.4,
        optional=("checkpoints/ode_init.pt",),
    ),
    "longlive": Download(
        "LongLive's base student and its LoRA",
        "Efficient-Large-Model/LongLive-1.3B",
        "longlive_models",
        ("models/longlive_base.pt", "models/lora.pt"),
        12.8,
    ),
    "prompts": Download(
        "VidProM's prompts, filtered and extended, for training",
        "gdhe17/Self-Forcing",
        "prompts",
        ("vidprom_filtered_extended.txt",),
        0.2,
    ),
}
