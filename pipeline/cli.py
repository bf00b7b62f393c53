"""Flags of `inference.py`. Each of them sets one key of the configuration."""

import argparse
import json
from collections.abc import Sequence

from utils.exits import Parser, set_by_flags

# flag -> (key, metavar, help); names as in Self-Forcing and its forks
VALUES = {
    "--data_path": ("inference.prompts", "FILE", "UTF-8 text file with one prompt a line, or story.jsonl"),
    "--output_folder": ("inference.output_folder", "FOLDER", "where videos go"),
    "--checkpoint_path": ("model.student", "PATH", "weights of the student: a folder or a file"),
    "--seed": ("seed", "N", "seed of sample 0 of every prompt"),
    "--num_output_frames": ("video.num_latent_frames", "N", "latent frames of a clip; 21 make 81 frames, 0: no end"),
    "--switch_frame_indices": ("inference.switch_frame_indices", "N,...", "latent frames of a story's later prompts"),
    "--image": ("inference.image", "FILE", "picture that the video begins with: JPEG, PNG or WebP"),
    "--video": ("inference.video", "FILE", "clip whose end the video begins with"),
    "--num_samples": ("inference.num_samples", "N", "videos of one prompt, each with its own seed"),
}
SWITCHES = {
    "--use_ema": ("model.use_ema", "of a training checkpoint, use the averaged weights"),
    "--save_with_index": ("inference.save_with_index", "name files by the prompt's index"),
    "--overwrite": ("inference.overwrite", "make videos again that are already there"),
    "--profile": ("inference.profile", "print where the time went"),
}
LOW_MEMORY = ("inference.student=stream", "inference.text_encoder=stream", "inference.decode_frames=1")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Arguments with `config_path`, `prompt` (a list or None), `print_schedule`, `dry_run`, `endless`, and `overrides`:
    all flags that set a key, as `key=value` in the order of precedence, those written out by the user last."""
    parser = Parser(prog="inference.py", description="Text to video with a diagonal schedule.", allow_abbrev=False)
    parser.add_argument("--config_path", default="configs/tiny.yaml", metavar="FILE", help="(default: %(default)s)")
    parser.add_argument("--prompt", action="append", help="instead of a file; repeat it for several videos")
    for flag, (key, metavar, text) in VALUES.items():
        parser.add_argument(flag, metavar=metavar, help=f"{text} ({key})")
    for flag, (key, text) in SWITCHES.items():
        parser.add_argument(flag, action="store_true", help=f"{text} ({key})")
    parser.add_argument("--output", metavar="FILE", help="the file of one video; - is standard output")
    parser.add_argument("--format", choices=("fmp4", "y4m", "raw"), help="of --output (default: by its ending, fmp4)")
    parser.add_argument("--low_memory", action="store_true", help=f"slower, in less memory ({', '.join(LOW_MEMORY)})")
    parser.add_argument("--print_schedule", action="store_true", help="print the schedule and stop")
    parser.add_argument("--dry_run", action="store_true", help="check and print everything, load nothing, and stop")
    parser.add_argument("settings", nargs="*", metavar="key.sub=value", help="any value of configs/schema.py")
    args = parser.parse_intermixed_args(argv)
    given = vars(args)
    if args.prompt is not None and args.data_path is not None:
        parser.error("--prompt and --data_path were both given; a run takes its prompts from one of them")
    args.endless = args.num_output_frames == "0"
    if args.endless:
        args.num_output_frames = None
    values = [(key, given[flag[2:]]) for flag, (key, *_) in VALUES.items() if given[flag[2:]] is not None]
    switches = [f"{key}=true" for flag, (key, _) in SWITCHES.items() if given[flag[2:]]]
    low_memory = list(LOW_MEMORY) if args.low_memory else []
    args.overrides = [f"{key}={_yaml(value)}" for key, value in values] + switches + low_memory + args.settings
    typed = {key: flag for flag, (key, *_) in VALUES.items() if given[flag[2:]] is not None}
    set_by_flags({key: flag for key, flag in typed.items() if not any(s.startswith(f"{key}=") for s in args.settings)})
    if (args.output or args.endless) and any(s.startswith("inference.output_folder=") for s in args.overrides):
        why = "beside --output" if args.output else "on a video without end, which goes to --output FILE or into a pipe"
        parser.error(f"inference.output_folder has no effect {why}; leave it out")
    return args


def _yaml(value: str) -> str:
    """A flag's value as a quoted YAML string, so that YAML does not parse it; the setting's type does."""
    return json.dumps(value, ensure_ascii=False)
