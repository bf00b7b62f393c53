"""What `scripts/download.py` can fetch: which files, from where, and where they go. No file here has been seen by us.

Sizes are GB, what the published parameter counts come to in the published precision, for the check of disk space; a
file's own header says exactly how long it must be. Hashes are those that the hub states while a file is fetched: they
are kept beside it, and `--verify` holds the file to them.
"""

from dataclasses import dataclass

TOKENIZER = {
    "google/umt5-xxl/special_tokens_map.json": 0.0,
    "google/umt5-xxl/spiece.model": 0.005,
    "google/umt5-xxl/tokenizer.json": 0.02,
    "google/umt5-xxl/tokenizer_config.json": 0.0,
}
T5, VAE = "models_t5_umt5-xxl-enc-bf16.pth", "Wan2.1_VAE.pth"
T5_SIZE, VAE_SIZE = 11.36, 0.51
SMALL = "Wan-AI/Wan2.1-T2V-1.3B"
LIGHTX2V = "lightx2v/Wan2.1-T2V-14B-StepDistill-CfgDistill-Lightx2v"
SHARDS = "diffusion_pytorch_model.safetensors.index.json"
MAY_LACK = ("google/umt5-xxl/special_tokens_map.json",)


@dataclass(frozen=True)
class Download:
    """One name of the command line."""

    what: str
    source: str  # repository on the hub, or owner/name/path on GitHub where `files` come from there
    folder: str  # where they go, relative to the checkout
    # in the repository, and below `folder`: GB of each, about; an index (SHARDS) stands for itself and what it lists
    files: dict[str, float]
    optional: tuple[str, ...] = ()  # some repositories lack these
    hub: bool = True

    @property
    def gigabytes(self) -> float:
        return sum(self.files.values())


DOWNLOADS = {
    "wan-1.3b": Download(
        "Wan2.1-T2V-1.3B: transformer, VAE, text encoder, tokenizer",
        SMALL,
        "wan_models/Wan2.1-T2V-1.3B",
        {"config.json": 0.0, "diffusion_pytorch_model.safetensors": 5.68, VAE: VAE_SIZE, T5: T5_SIZE} | TOKENIZER,
        optional=MAY_LACK,
    ),
    "wan-14b": Download(
        "Wan2.1-T2V-14B: the transformer, which is the teacher",
        "Wan-AI/Wan2.1-T2V-14B",
        "wan_models/Wan2.1-T2V-14B",
        {"config.json": 0.0, SHARDS: 57.2},
    ),
    "wan-14b-hf": Download(
        "the same in the layout of Diffusers",
        "Wan-AI/Wan2.1-T2V-14B-Diffusers",
        "wan_models/Wan2.1-T2V-14B-Diffusers",
        {"transformer/config.json": 0.0, f"transformer/{SHARDS}": 57.2},
    ),
    "krea-14b": Download(
        "krea-realtime-video: a causal student of 14B, trained with Self-Forcing",
        "krea/krea-realtime-video",
        "checkpoints",
        {"krea-realtime-video-14b.safetensors": 28.6},
    ),
    "lightx2v-14b": Download(
        "LightX2V's bidirectional 14B of four steps: a start for training",
        LIGHTX2V,
        "wan_models/Wan2.1-T2V-14B-lightx2v",
        {"distill_models/distill_model.safetensors": 28.6},
    ),
    "lightx2v-lora": Download(
        "the same as a LoRA for Wan2.1-T2V-14B",
        LIGHTX2V,
        "wan_models/Wan2.1-T2V-14B-lightx2v",
        {"loras/Wan21_T2V_14B_lightx2v_cfg_step_distill_lora_rank64.safetensors": 0.63},
    ),
    "umt5": Download(
        "UMT5-XXL text encoder and its tokenizer",
        SMALL,
        "wan_models/Wan2.1-T2V-1.3B",
        {T5: T5_SIZE} | TOKENIZER,
        optional=MAY_LACK,
    ),
    "vae": Download("Wan 2.1 VAE", SMALL, "wan_models/Wan2.1-T2V-1.3B", {VAE: VAE_SIZE}),
    "taew2.1": Download(
        "the tiny decoder (TAEHV)", "madebyollin/taehv/raw/main", "checkpoints", {"taew2_1.pth": 0.05}, hub=False
    ),
    "self-forcing": Download(
        "Self-Forcing's student and its ODE initialisation",
        "gdhe17/Self-Forcing",
        ".",
        {"checkpoints/self_forcing_dmd.pt": 5.68, "checkpoints/ode_init.pt": 5.68},
        optional=("checkpoints/ode_init.pt",),
    ),
    "causal-forcing": Download(
        "Causal-Forcing's chunk-wise student, a start for training",
        "zhuhz22/Causal-Forcing",
        "checkpoints",
        {"chunkwise/causal_forcing.pt": 5.68},
    ),
    "longlive": Download(
        "LongLive's base student and its LoRA",
        "Efficient-Large-Model/LongLive-1.3B",
        "longlive_models",
        {"models/longlive_base.pt": 11.4, "models/lora.pt": 1.4},
    ),
    "prompts": Download(
        "VidProM's prompts, filtered and extended, for training",
        "gdhe17/Self-Forcing",
        "prompts",
        {"vidprom_filtered_extended.txt": 0.2},
    ),
}
