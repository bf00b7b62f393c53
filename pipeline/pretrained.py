"""A pipeline as a folder, complete in itself, in the layout of diffusers' pipelines:

    pipeline.json                  sizes, schedule, stream, precision: a configuration that names no paths
    transformer/                   the student, with its card.json
    vae/ or tiny_decoder.safetensors
    text_encoder/  tokenizer/

`configs.load.load_config` reads the folder, so that it stands wherever a YAML file of settings does. Weights are in the
smallest of float16, bfloat16 and float32 that holds them exactly.
"""

import os
from collections.abc import Mapping
from typing import Any

from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedTokenizerBase

from configs.errors import UserError
from configs.load import PIPELINE, PIPELINE_SETTINGS, to_dict
from configs.schema import Config
from model.schedule import Schedule
from model.weights.load import save_network
from model.weights.plain import exact_dtype
from utils.files import atomic_folder, check_writable, write_json_atomic


def save_folder(
    folder: str | os.PathLike,
    networks: Mapping[str, nn.Module],
    tokenizer: PreTrainedTokenizerBase,
    settings: Mapping[str, Any],
    card: Mapping[str, Any],
) -> None:
    """Write the folder; it appears complete or not at all.

    networks: plain ones, by the names above. UserError where `folder` holds anything, or cannot be written.
    """
    folder = check_writable(folder, "folder")
    if os.path.lexists(folder) and any(os.scandir(folder)):
        raise UserError(f"folder={folder} is not empty, and nothing in it is replaced; choose another folder")
    with atomic_folder(folder) as partial:
        for name, network in networks.items():
            dtype = exact_dtype(network)
            if name == "tiny_decoder":
                state = {key: value.to("cpu", dtype).contiguous() for key, value in network.state_dict().items()}
                save_file(state, partial / f"{name}.safetensors", metadata={"format": "pt"})
            else:
                save_network(network, partial / name, dtype=dtype, card=card if name == "transformer" else None)
        tokenizer.save_pretrained(partial / "tokenizer")
        write_json_atomic(partial / PIPELINE, settings)


def settings_of(config: Config, schedule: Schedule) -> dict[str, Any]:
    """What a folder's pipeline.json says: all settings that decide what a prompt and a seed give."""
    values = to_dict(config)
    if schedule != Schedule.from_config(config.schedule, config.stream):
        values["schedule"] |= {"preset": None, "timesteps": [list(row) for row in schedule.timesteps_by_chunk]}
        values["stream"] |= {"context": schedule.context, "context_timestep": schedule.renoise_timestep}
    kept: dict[str, Any] = {}
    for name in PIPELINE_SETTINGS:
        section, _, key = name.partition(".")
        if key:
            kept.setdefault(section, {})[key] = values[section][key]
        else:
            kept[section] = values[section]
    return kept
