"""Text to video: `python inference.py --prompt "a red circle moves right"`. All flags: --help."""

import sys
from dataclasses import replace

from utils import exits

exits.guard(__name__)


def main() -> int:
    # imported here, so that --help and wrong flags answer at once and Ctrl-C while torch loads is one line, too
    from pipeline.cli import parse

    args = parse()

    from configs.geometry import Geometry
    from configs.load import load_config
    from model.schedule import Schedule
    from pipeline.diagonal import DiagonalPipeline
    from pipeline.outputs import profile_table, render
    from pipeline.plan import make_plan
    from utils.distributed import Ranks
    from utils.logs import console
    from utils.seeds import resolve_seed

    given, ranks = load_config(args.config_path, args.overrides), Ranks.from_env()
    degree = given.inference.sequence_parallel
    if ranks.world > 1:
        if ranks.rank % degree:
            return 0  # its GPU is for a process that the first of its group starts
        ranks = ranks.groups(degree, "inference.sequence_parallel")
    config = replace(given, seed=resolve_seed(given.seed, ranks))
    if config.seed != given.seed and ranks.first:
        print(f"seed={given.seed}: drawn was {config.seed}, --seed {config.seed} makes the same", file=sys.stderr)
    console(quiet=not ranks.first or args.output == "-" or args.endless)
    geometry = Geometry.from_config(config)
    num_chunks = geometry.num_chunks(config.video.num_latent_frames)
    schedule = Schedule.from_config(config.schedule, config.stream).table(num_chunks, geometry)
    if args.print_schedule:
        print(schedule)
        return 0

    plan = make_plan(config, args.prompt, ranks, endless=args.endless, output=args.output, kind=args.format)
    if args.dry_run:
        print(f"{plan.describe()}\n\n{schedule}")
        return 0

    log_file = sys.stderr if plan.piped else sys.stdout
    if ranks.first:
        print(plan.summary(), file=log_file)
    if not plan.jobs:
        return 0
    pipe = DiagonalPipeline.from_config(config, local_rank=ranks.local_rank)
    conditioning, clips = None if plan.conditioning is None else pipe.encode(plan.conditioning), []
    for job in plan.jobs:
        clips.append(render(pipe, job, plan.weights, position=ranks.local_rank, conditioning=conditioning))
        print(clips[-1].line(), file=log_file)
    if config.inference.profile:
        print(profile_table(clips), file=log_file)
    if ranks.first and not args.endless:
        print(schedule, file=log_file)
    return max(clip.code for clip in clips)


if __name__ == "__main__":
    exits.run(main)
