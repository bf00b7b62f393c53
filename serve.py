"""The server: `bash serve.sh [--port 8000]`; docs/server.md has the rest."""

from utils import exits

exits.guard(__name__)


def main() -> int:
    from server.command import Program, run

    description = "Videos over HTTP: jobs as OpenAI's videos API has them, live streams, and the demo's page."
    return run(Program("serve.py", description, port=8000, workers=0, jobs_folder="videos/jobs"))


if __name__ == "__main__":
    exits.run(main)
