"""What holds for every file: layers, and constructs that cost users of this kind of code dearly."""

import ast
import re
import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from configs.load import CHECKOUT, load_config, presets

# a file imports its own layer and those to its left
LAYERS = ("configs", "utils", "model", "pipeline", "trainer", "server", "client")
CLIENT_PROGRAMS = ("client/record.py", "client/steer.py")  # examples, which import nothing of the rest
ENTRY_POINTS = ("train.py", "inference.py", "demo.py", "serve.py", "setup.py")
REQUIREMENTS = ("requirements.txt", "requirements-dev.txt", "requirements-demo.txt", "requirements-client.txt")
# where the name on the index and the name in Python differ
MODULE_OF = {"pillow": "PIL", "pyyaml": "yaml"}

SOURCES = [
    *(CHECKOUT / name for name in ENTRY_POINTS if (CHECKOUT / name).exists()),
    *sorted(file for layer in (*LAYERS, "scripts") for file in (CHECKOUT / layer).rglob("*.py")),
]
TREES = {file: ast.parse(file.read_text(encoding="utf-8")) for file in SOURCES}


def place(file: Path, node: ast.AST | None = None) -> str:
    return f"{file.relative_to(CHECKOUT)}{f':{node.lineno}' if node else ''}"


def layer_of(file: Path) -> str:
    """The layer's name; `top` for entry points and scripts."""
    first = file.relative_to(CHECKOUT).parts[0]
    return first if first in LAYERS else "top"


def imported(tree: ast.AST) -> list[tuple[ast.AST, str]]:
    """(node, first part of the module's name) of each import, those inside functions included."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node, alias.name.partition(".")[0]) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            found.append((node, node.module.partition(".")[0]))
    return found


def calls(tree: ast.AST) -> list[ast.Call]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


def offenders(test) -> list[str]:
    """Places of the calls, in all sources, of which `test(file, call)` is true."""
    return [place(file, call) for file, tree in TREES.items() for call in calls(tree) if test(file, call)]


def is_method(call: ast.Call, name: str) -> bool:
    return isinstance(call.func, ast.Attribute) and call.func.attr == name


def test_the_walk_finds_the_code():
    assert {layer_of(file) for file in SOURCES} == {*LAYERS, "top"}


def test_a_file_imports_its_own_layer_and_those_to_its_left():
    order = {layer: i for i, layer in enumerate((*LAYERS, "top"))}
    order["scripts"] = order["top"]
    wrong = [
        f"{place(file, node)} imports {module}"
        for file, tree in TREES.items()
        for node, module in imported(tree)
        if order.get(module, -1) > order[layer_of(file)] or f"{module}.py" in ENTRY_POINTS
    ]
    assert not wrong


def test_the_client_stands_alone():
    """It can be copied out of here, and used where there is no torch."""
    alone = {"client", "httpx", "websockets", *sys.stdlib_module_names}
    client = {file: tree for file, tree in TREES.items() if layer_of(file) == "client"}
    assert client and not [place(f, n) for f, tree in client.items() for n, m in imported(tree) if m not in alone]


def test_only_entry_points_and_scripts_print():
    assert not offenders(
        lambda file, call: (
            isinstance(call.func, ast.Name)
            and call.func.id == "print"
            and layer_of(file) != "top"
            and place(file) not in CLIENT_PROGRAMS
        )
    )


def test_no_getattr_hides_a_default():
    assert not offenders(
        lambda file, call: isinstance(call.func, ast.Name) and call.func.id == "getattr" and len(call.args) > 2
    )


def test_progress_bars_are_off_where_there_is_no_terminal():
    """`disable=None`, which `progress_bar` sets: a bar in a file or a pipe is a line for every update."""
    assert not offenders(
        lambda file, call: (
            isinstance(call.func, ast.Name)
            and call.func.id == "tqdm"
            and place(file) != "utils/progress.py"
            and "disable" not in [keyword.arg for keyword in call.keywords]
        )
    )


def test_nothing_between_noise_and_frames_waits_for_the_gpu():
    assert not offenders(lambda file, call: layer_of(file) in ("model", "pipeline") and is_method(call, "item"))


def test_sessions_are_made_in_one_place():
    """By `StreamSession.from_config`, which forgets no setting."""
    assert not offenders(lambda file, call: isinstance(call.func, ast.Name) and call.func.id == "StreamSession")


def test_every_program_is_guarded_before_it_imports_what_may_be_missing_and_while_it_runs():
    """exits.guard and exits.run turn what users and machines do wrong into a sentence, by kind."""
    wrong = []
    for file, tree in TREES.items():
        last = tree.body[-1] if tree.body else ast.Pass()
        if not ast.unparse(last).startswith("if __name__ ==") or place(file) in CLIENT_PROGRAMS:
            continue
        if file.name == "check_requirements.py":
            continue  # that one runs before any package is there, and imports none
        guard = next((i for i, node in enumerate(tree.body) if ast.unparse(node) == "exits.guard(__name__)"), None)
        early = [name for _, name in imported(ast.Module(tree.body[:guard], [])) if name not in sys.stdlib_module_names]
        if guard is None or early != ["utils"] or ast.unparse(last.body[-1]) != "exits.run(main)":
            wrong.append(place(file, last))
    assert not wrong


def test_every_torch_load_refuses_code():
    def unsafe(file: Path, call: ast.Call) -> bool:
        if not (is_method(call, "load") and isinstance(call.func.value, ast.Name) and call.func.value.id == "torch"):
            return False
        given = {keyword.arg: keyword.value for keyword in call.keywords}.get("weights_only")
        return not (isinstance(given, ast.Constant) and given.value is True)

    assert not offenders(unsafe)


ATOMIC = ("atomic_path", "atomic_folder", "temporary_path")
# what writes into a folder that it holds for itself, into memory, or a recording that grows under a partial name
WRITES_DIRECTLY = (
    "model/weights/load.py", "trainer/checkpoint/", "trainer/loop.py",  # folders that are renamed when they are whole
    "pipeline/live.py", "pipeline/video.py", "server/encoding.py", "server/videos_api.py", "scripts/bench/",
    "scripts/benchmark_training.py", "scripts/soak.py", "scripts/quality/clip_folder.py", "scripts/ablate_tiny.py",
)  # fmt: skip


def root(node: ast.expr | None) -> str | None:
    """The name that an expression such as `(a / "b").c` begins with."""
    while node is not None and not isinstance(node, ast.Name):
        node = next((child for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr)), None)
    return node and node.id


def test_files_are_written_under_temporary_names():
    """So that no half of one is left under its name, and no two processes write the same one."""
    targets = {"write_text": None, "write_bytes": None, "save_file": 1, "save": 0}  # None: what the method is of
    wrong = []
    for file, tree in TREES.items():
        items = [item for node in ast.walk(tree) if isinstance(node, ast.With) for item in node.items]
        own = {root(i.optional_vars) for i in items if root(i.context_expr) in ATOMIC}
        for call in calls(tree):
            name = call.func.attr if isinstance(call.func, ast.Attribute) else root(call.func)
            if name not in targets or place(file).startswith(WRITES_DIRECTLY):
                continue
            at = targets[name] if root(call.func) != "torch" else 1
            if at is None or call.args:
                wrong += [place(file, call)] * (root(call.func if at is None else call.args[at]) not in own)
    assert not wrong


def test_no_broad_except_swallows():
    wrong = [
        place(file, node)
        for file, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or (isinstance(node.type, ast.Name) and node.type.id in ("Exception", "BaseException")))
        and not any(isinstance(inner, ast.Raise) for inner in ast.walk(node))
    ]
    assert not wrong


def test_no_text_names_a_machine():
    """No absolute path of somebody's disk, no address of a machine, in anything that is not a picture or weights."""
    machine = re.compile(r"(?<![\w.:/])/(home|root|work|mnt|data|scratch|Users)/\w|\b(10|192\.168)\.\d+\.\d+\.\d+\b")
    kinds = {".py", ".sh", ".yaml", ".json", ".txt", ".md", ".toml", ".html", ".js"}
    folders = (*LAYERS, "scripts", "tests", "assets", "docs", ".ci")
    files = [file for folder in folders for file in (CHECKOUT / folder).rglob("*") if file.suffix in kinds]
    files += [file for file in CHECKOUT.iterdir() if file.is_file() and file.suffix in kinds]
    assert not [
        f"{place(file)}: {found.group()}"
        for file in files
        if (found := machine.search(file.read_text(encoding="utf-8")))
    ]


def test_presets_hold_values_only():
    """Each YAML file states settings that exist, and a base where it has one; nothing else is in it."""
    for path in presets():
        load_config(path)
        assert isinstance(yaml.safe_load((CHECKOUT / path).read_text(encoding="utf-8")), dict)


def test_pages_that_say_python_say_which():
    for page in (CHECKOUT / "docs").rglob("*.md"):
        blocks = "".join(re.findall(r"^```bash\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL))
        if first := re.search(r"^python ", blocks, re.MULTILINE):
            assert "source .venv/bin/activate\n" in blocks[: first.start()], page.name


@pytest.mark.parametrize("name", REQUIREMENTS)
def test_every_dependency_is_used_and_explained(name):
    lines = (line.partition("#")[0].strip() for line in (CHECKOUT / name).read_text(encoding="utf-8").splitlines())
    wanted = [Requirement(line).name for line in lines if line]
    rows = re.findall(r"^\|([^|]+)\|", (CHECKOUT / "docs" / "development.md").read_text(encoding="utf-8"), re.MULTILINE)
    table = [package for row in rows for package in re.findall(r"`([\w.-]+)`", row)]
    assert not [package for package in wanted if package not in table], "not in the table of docs/development.md"
    if name == "requirements.txt":
        used = {module for tree in TREES.values() for _, module in imported(tree)}
        modules = {package: MODULE_OF.get(package, package.replace("-", "_")) for package in wanted}
        assert not [p for p, module in modules.items() if module not in used], "not imported"


def test_every_import_is_a_stated_dependency():
    """Nothing works only because another package happens to bring it."""
    stated = {"flash_attn", "triton", "wandb", "setuptools", "packaging", "pip"}  # extras, and the installer's own
    for name in REQUIREMENTS:
        for line in (CHECKOUT / name).read_text(encoding="utf-8").splitlines():
            if line := line.partition("#")[0].strip():
                package = Requirement(line).name
                stated.add(MODULE_OF.get(package, package.replace("-", "_")))
    known = {*sys.stdlib_module_names, *LAYERS, "scripts", *stated}
    wrong = [f"{place(f, n)} {m}" for f, tree in TREES.items() for n, m in imported(tree) if m not in known]
    assert not wrong
