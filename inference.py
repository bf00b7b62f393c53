"""Text to video: `python inference.py --prompt "a red circle moves right"`. All flags: --help."""

from utils import exits


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
    from utils.device import set_threads
    from utils.distributed import Ranks
    from utils.logs import console

    config, ranks = load_config(args.config_path, args.overrides), Ranks.from_env()
    console(quiet=not ranks.first)
    geometry = Geometry.from_config(config)
    num_chunks = geometry.num_chunks(config.video.num_latent_frames)
    schedule = Schedule.from_config(config.schedule, config.stream).table(num_chunks, geometry)
    if args.print_schedule:
        print(schedule)
        return 0

    plan = make_plan(config, args.prompt, ranks)
    if args.dry_run:
        print(f"{plan.describe()}\n\n{schedule}")
        return 0

    if ranks.first:
        print(plan.summary())
    if not plan.jobs:
        return 0
    set_threads(config.inference.cpu_threads)
    pipe = DiagonalPipeline.from_config(config, local_rank=ranks.local_rank)
    clips = []
    for job in plan.jobs:
        clips.append(render(pipe, job, plan.weights, position=ranks.local_rank))
        print(clips[-1].line())
    if config.inference.profile:
        print(profile_table(clips))
    if ranks.first:
        print(schedule)
    return 0


if __name__ == "__main__":
    exits.run(main)
