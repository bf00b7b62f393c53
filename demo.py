"""The demo in a browser: `bash demo.sh [--port 7860]`, then open the address that it prints."""

from utils import exits

exits.guard(__name__)


def main() -> int:
    from server.command import Program, run

    description = "A page that plays streams while they are made: serve.py with one worker and another port."
    config = "configs/world/world.yaml"  # whose streams have no end
    return run(Program("demo.py", description, port=7860, workers=1, jobs_folder="videos/demo", config=config))


if __name__ == "__main__":
    exits.run(main)
