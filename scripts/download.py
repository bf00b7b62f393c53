"""Download published weights and prompts, or verify existing ones.

    python scripts/download.py wan-1.3b self-forcing         # everything for configs/wan2.1_t2v_1.3b.yaml
    python scripts/download.py wan-14b --dest some/folder
    python scripts/download.py --verify wan-1.3b             # compare existing files with their hashes
    python scripts/download.py --list

An interrupted download from the hub resumes. HF_ENDPOINT names a mirror of the hub, GITHUB_ENDPOINT a mirror of GitHub,
and HF_TOKEN an account for repositories that need one.
"""

import argparse
import hashlib
import http.client
import json
import os
import socket
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import exits

exits.guard(__name__)

from huggingface_hub import constants, errors, hf_hub_download

from configs.downloads import DOWNLOADS, SHARDS, Download
from configs.errors import UserError
from utils.files import atomic_path, sha256_of
from utils.machine import free_space
from utils.prompts import read_prompts
from utils.tables import aligned

CHECKOUT = Path(__file__).resolve().parent.parent
KEPT = "downloaded parts are kept, and the same command resumes"


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = exits.Parser(prog="scripts/download.py", description=__doc__, formatter_class=form)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"any of {', '.join(DOWNLOADS)}")
    parser.add_argument("--dest", type=Path, help="folder, instead of the default of each name (see --list)")
    parser.add_argument("--verify", action="store_true", help="download nothing; check existing files")
    parser.add_argument("--list", action="store_true", help="print names, sizes and folders")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if args.list:
        print(table())
        return 0
    unknown = [name for name in args.names if name not in DOWNLOADS]
    if unknown or not args.names:
        given = f"NAME={unknown[0]} is unknown" if unknown else "no NAME was given"
        raise UserError(f"{given}; use any of {', '.join(DOWNLOADS)}")
    faults = exits.Faults()
    for name in args.names:
        wanted = DOWNLOADS[name]
        folder = args.dest or CHECKOUT / wanted.folder
        with faults.noted():
            if args.verify:
                verify(name, wanted, folder, faults)
            else:
                fetch(name, wanted, folder)
                print(f"{name}: complete in {folder}")
    return faults.code


def table() -> str:
    """One line for each download."""
    return aligned([(name, f"{d.gigabytes:5.2f} GB", d.folder, d.what) for name, d in DOWNLOADS.items()], left=4)


# --- fetching ---------------------------------------------------------------------------------------------------------


def fetch(name: str, wanted: Download, folder: Path) -> None:
    """Download the files of `wanted` that `folder` lacks."""
    files = listed(name, wanted, folder)
    absent = [file for file in files if not (folder / file).is_file()]
    if not absent:
        return check_all(name, wanted, folder)
    free, need = free_space(folder) / 1e9, sum(files[file] for file in absent)
    if free < need:
        raise UserError(f"{name} needs some {need:.1f} GB and {folder} has {free:.1f} GB free; use --dest")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        while absent:
            for file in absent:
                if wanted.hub:
                    from_hub(name, wanted, file, folder)
                else:
                    from_github(name, wanted.source, file, folder)
            known, files = files, listed(name, wanted, folder)
            absent = [file for file in files.keys() - known.keys() if not (folder / file).is_file()]
    except OSError as error:  # of the disk; network errors have become UserErrors
        raise UserError(f"{name}: {folder} cannot be written to ({error.strerror or error}); {KEPT}") from error
    check_all(name, wanted, folder)


def listed(name: str, wanted: Download, folder: Path) -> dict[str, float]:
    """The files of `wanted` and their GB, with those in an index if it exists."""
    files = dict(wanted.files)
    for file in wanted.files:
        if file.endswith(SHARDS) and (folder / file).is_file():
            from model.weights.files import indexed_files

            shards = [str(PurePosixPath(file).with_name(shard)) for shard in indexed_files(name, folder / file)]
            files |= dict.fromkeys(shards, files[file] / len(shards)) | {file: 0.0}
    return files


def from_hub(name: str, wanted: Download, file: str, folder: Path) -> None:
    """Download a file of a repository on the hub; resumes."""
    where = f"{wanted.source} at {constants.ENDPOINT}"
    check_reachable(name, constants.ENDPOINT)
    try:
        hf_hub_download(wanted.source, file, local_dir=folder)
    except errors.GatedRepoError as error:
        raise UserError(f"{name}: {where} wants its terms accepted; do so there, then set HF_TOKEN") from error
    except errors.RepositoryNotFoundError as error:
        where = f"there is no {where}, or it is private"
        raise UserError(f"{name}: {where}; see docs/weights.md for its present name") from error
    except errors.LocalEntryNotFoundError as error:  # not found, and there is no network to look further
        raise unreachable(name, constants.ENDPOINT) from error
    except errors.EntryNotFoundError as error:
        if file in wanted.optional:
            print(f"{name}: {wanted.source} has no {file}, which is optional")
            return
        raise UserError(f"{name}: {where} has no {file}; it may have been renamed, so download it by hand") from error
    except (errors.OfflineModeIsEnabled, errors.HfHubHTTPError, ConnectionError, TimeoutError) as error:
        raise unreachable(name, constants.ENDPOINT, error) from error
    except OSError:  # the disk
        raise
    except Exception as error:  # errors of its HTTP library
        raise unreachable(name, constants.ENDPOINT, error) from error


def check_reachable(name: str, endpoint: str) -> None:
    """Raise a UserError if there is no network; the library would retry for half a minute. Skipped with proxies."""
    if urllib.request.getproxies().keys() - {"no"} or os.environ.get("HF_HUB_OFFLINE"):
        return
    parts = urllib.parse.urlsplit(endpoint)
    try:
        port = parts.port or (80 if parts.scheme == "http" else 443)
        socket.create_connection((parts.hostname or "", port), timeout=10).close()
    except (OSError, ValueError) as error:
        raise unreachable(name, endpoint, error) from error


def unreachable(name: str, host: str, error: Exception | None = None) -> UserError:
    """A UserError about the network."""
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
        return UserError(f"{name} cannot be fetched while HF_HUB_OFFLINE is set; unset it, or copy the files by hand")
    reason = f" ({str(error).splitlines()[0][:100]})" if error is not None and str(error) else ""
    return UserError(f"{name}: {host} cannot be reached{reason}; go online or set HF_ENDPOINT to a mirror; {KEPT}")


def from_github(name: str, source: str, file: str, folder: Path) -> None:
    """Download a small file by its public address."""
    owner, project, rest = source.split("/", 2)
    host = os.environ.get("GITHUB_ENDPOINT", "https://github.com").rstrip("/")
    url = f"{host}/{owner}/{project}/{rest}/{file}"
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            content = answer.read()
    except urllib.error.HTTPError as error:
        raise UserError(f"{name}: {url} returned {error.code} {error.reason}; download it by hand") from error
    except http.client.IncompleteRead as error:
        raise UserError(f"{name}: {url} was interrupted; run the same command again") from error
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        fix = "go online or set GITHUB_ENDPOINT to a mirror"
        raise UserError(f"{name}: {host} cannot be reached ({str(error)[:100]}); {fix}") from error
    with atomic_path(folder / file) as temporary:
        temporary.write_bytes(content)


# --- checking ---------------------------------------------------------------------------------------------------------


def check_all(name: str, wanted: Download, folder: Path) -> None:
    """Check that every file exists and is of the type of its suffix, by headers only."""
    for file in listed(name, wanted, folder):
        if (folder / file).is_file() or file not in wanted.optional:
            check(name, wanted, folder, file)


def check(name: str, wanted: Download, folder: Path, file: str) -> None:
    """Raise a UserError if a file is missing, truncated or of another type."""
    if not (folder / file).is_file():
        place = "" if folder == CHECKOUT / wanted.folder else f" --dest {folder}"
        again = f"python scripts/download.py {name}{place}"
        raise UserError(f"{name}: {folder / file} is missing; fetch it with `{again}`")
    check_structure(name, folder / file)


def check_structure(name: str, path: Path) -> None:
    """Raise a UserError if a file is truncated or of another type."""
    if path.suffix in (".safetensors", ".pt", ".pth"):
        from model.weights.files import open_file

        open_file(name, path)
    elif path.suffix == ".json":
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{name}: {path} is not valid JSON; remove it and fetch it again") from error
    elif path.suffix == ".txt":
        read_prompts(path, name)
    elif not path.stat().st_size:
        raise UserError(f"{name}: {path} is empty; remove it and fetch it again")


def verify(name: str, wanted: Download, folder: Path, faults: exits.Faults) -> None:
    """Compare each file with its published hash, if known; those that differ go to `faults`."""
    for file in listed(name, wanted, folder):
        path = folder / file
        if not path.is_file() and file in wanted.optional:
            print(f"{path}  missing, but optional")
            continue
        with faults.noted():
            check(name, wanted, folder, file)
            stated = stated_hash(folder, file)
            if stated is not None and hash_of(path, len(stated)) != stated:
                raise UserError(f"{name}: {path} is not what was published (hash); remove it and fetch it again")
            how = "as published" if stated is not None else "complete by its header; no hash is known"
            print(f"{path}  {path.stat().st_size:,} bytes, {how}")


def stated_hash(folder: Path, file: str) -> str | None:
    """The hash that the hub stated for the file: SHA-256 of a large file, git's SHA-1 of a small one."""
    record = folder / ".cache" / "huggingface" / "download" / f"{file}.metadata"
    lines = record.read_text(encoding="utf-8").splitlines() if record.is_file() else []
    etag = lines[1].strip().lower() if len(lines) > 1 else ""
    return etag if len(etag) in (40, 64) and all(c in "0123456789abcdef" for c in etag) else None


def hash_of(path: Path, digits: int) -> str:
    """SHA-256 of a file (64 digits), or git's SHA-1 (40 digits)."""
    if digits == 64:
        return sha256_of(path)
    content = path.read_bytes()
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content, usedforsecurity=False).hexdigest()


if __name__ == "__main__":
    exits.run(main)
