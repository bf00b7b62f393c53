"""The documents: links lead somewhere, contents lists are complete, and commands, flags, settings and files exist."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from configs.load import CHECKOUT, load_config, to_dict

PAGES = sorted([*CHECKOUT.glob("*.md"), *(CHECKOUT / "docs").rglob("*.md"), CHECKOUT / "scripts" / "README.md",
                *(CHECKOUT / "assets").glob("*/README.md")])  # fmt: skip
CURRENT = [page for page in PAGES if page.name != "CHANGELOG.md"]  # the changelog names what is gone
# what is started, the file that has its flags, and the configuration that it reads by default
PROGRAMS = {
    "inference.sh": ("pipeline/cli.py", "configs/tiny.yaml"),
    "training.sh": ("trainer/cli.py", "configs/train_tiny.yaml"),
    "demo.sh": ("server/command.py", "configs/world/world.yaml"),
    "serve.sh": ("server/command.py", "configs/tiny.yaml"),
    "scripts/ablate_tiny.sh": ("scripts/ablate_tiny.py", "configs/train_tiny_ablation.yaml"),
    "scripts/encode_prompts.py": ("scripts/encode_prompts.py", "configs/train_tiny.yaml"),
}
OVERRIDE = re.compile(r"[a-z_]+(\.[a-z_0-9]+)*=")


def ids(page: Path) -> str:
    return str(page.relative_to(CHECKOUT))


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def headings(page: Path) -> list[str]:
    return re.findall(r"^##+ (.+)$", prose(page), re.MULTILINE)


def anchor(heading: str) -> str:
    """As GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def spans(page: Path) -> list[str]:
    """Code within sentences."""
    return re.findall(r"`([^`]+)`", prose(page).replace("\n", " "))


def commands(page: Path) -> Iterator[list[str]]:
    """Words of each command of ours in blocks of bash, from the program's file on."""
    for block in re.findall(r"^```bash\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            for part in re.split(r"[;|]| && ", line):
                words = shlex.split(part, comments=True)
                at = next((i for i, word in enumerate(words) if re.fullmatch(r"(\w+/)?\w+\.(py|sh)", word)), None)
                if at is not None and "wget" not in words:
                    yield words[at:]


def settings() -> set[str]:
    """Every setting and section, by its dotted name."""

    def walk(values: dict, prefix: str) -> Iterator[str]:
        for key, value in values.items():
            yield prefix + key
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{key}.")

    return {*walk(to_dict(load_config("configs/train_tiny.yaml")), "")}


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_links_lead_somewhere(page):
    wrong = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" in target:
            continue
        path, _, place = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (place and place not in map(anchor, headings(file))):
            wrong.append(target)
    assert not wrong


@pytest.mark.parametrize("page", [p for p in PAGES if p.parent not in (CHECKOUT, CHECKOUT / "assets/tiny")], ids=ids)
def test_contents_lists_are_complete(page):
    text = prose(page)
    wanted = [f"- [{name}](#{anchor(name)})" for name in re.findall(r"^## (.+)$", text, re.MULTILINE)]
    assert re.findall(r"^- \[.*\]\(#.*\)$", text.partition("\n## ")[0], re.MULTILINE) == wanted


@pytest.mark.parametrize("page", CURRENT, ids=ids)
def test_commands_can_be_pasted(page):
    """Programs exist and have the flags; settings load, together with the file that the command names."""
    for program, *words in commands(page):
        source, config = PROGRAMS.get(program, (program, "configs/tiny.yaml"))
        if program == "other.py":
            continue
        assert (CHECKOUT / program).is_file(), program
        flags = {word.partition("=")[0] for word in words if re.match("--[a-z]", word)}
        text = (CHECKOUT / source).read_text(encoding="utf-8")
        assert not [flag for flag in flags if f'"{flag}"' not in text], program
        if "--config_path" in words:
            config = words[words.index("--config_path") + 1].replace("$n", "1")
        named = {words[i + 1] for i, word in enumerate(words) if word == "--lora"}  # NAME=FILE
        overrides = [w for w in words if OVERRIDE.match(w) and not w.startswith("none") and w not in named]
        if not config.isupper():
            load_config(config, overrides)


@pytest.mark.parametrize("page", CURRENT, ids=ids)
def test_settings_and_files_exist(page):
    known, text = settings(), prose(page)
    named = [part for span in spans(page) for part in span.split()]
    for head, *rows in (block.splitlines() for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)):
        if prefix := re.match(r"\| `([a-z.]+\.)` \|", head):  # a table of settings of one section
            cells = (row.split("|")[1] for row in rows[1:])
            named += [prefix[1] + key for cell in cells for key in re.findall(r"`([^`]+)`", cell)]
    sections = "|".join(name for name in known if "." not in name)
    keys = [found[1] for word in named if (found := re.match(rf"((?:{sections})\.[\w.]+)(=|$)", word))]
    folders = "configs|utils|model|pipeline|trainer|server|scripts|tests|docs|assets"
    path = re.compile(rf"(?:{folders})/[\w./]+\.(?:py|sh|yaml|html|md|txt)\b")
    files = [found[0] for word in named if (found := path.match(word))]
    unknown = {key for key in keys if key.rstrip(".") not in known and not (CHECKOUT / key).is_file()}
    assert not {key for key in unknown if not key.startswith("training.init.")}
    assert not [file for file in files if not (CHECKOUT / file).exists()]
