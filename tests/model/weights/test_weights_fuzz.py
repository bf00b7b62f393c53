"""More than 200 damaged or hostile weight files: each is refused in one sentence, quickly, in little memory, and runs
nothing."""

import random
import resource
import signal
import time
from pathlib import Path

import pytest
from bad_files import CASES, WHOLE, run_of_shards, written

from configs.errors import UserError
from model.weights import load as weights
from model.weights.inspection import inspect_weights

LOADERS = {
    "student": weights.load_student,
    "teacher": weights.load_score,
    "vae": weights.load_vae,
    "text_encoder": lambda path: weights.load_text_encoder(path, path.parent, 8),
    "tiny_decoder": weights.load_tiny_decoder,
}
LOOKS = ("student", "teacher", "text_encoder")  # as doctor.py does
MOST_SECONDS = 5  # of this process's own time, so that others of a busy machine do not count
HANGS = 120  # seconds of the clock
MOST_MEMORY = 2 << 30  # bytes


def virtual() -> tuple[int, int]:
    """Address space of this process in bytes: now, and at most so far."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return tuple(int(lines[name].split()[0]) << 10 for name in ("VmSize", "VmPeak"))


@pytest.fixture
def watched(tmp_path):
    """Fails what hangs, grows, or leaves a file."""
    before = set(tmp_path.rglob("*"))
    now, peak = virtual()
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10

    def late(*_):
        raise BaseException(f"not refused within {HANGS} s")

    handler = signal.signal(signal.SIGALRM, late)
    signal.alarm(HANGS)
    begin = time.process_time()
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, handler)
    assert time.process_time() - begin < MOST_SECONDS
    assert virtual()[1] <= max(peak, now + MOST_MEMORY)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10 <= resident + MOST_MEMORY
    new = {path.relative_to(tmp_path).parts[0] for path in set(tmp_path.rglob("*")) - before}
    assert new <= {"case", "outside-case.safetensors"}
    assert not (tmp_path / "case" / "executed").exists()


def test_there_are_many():
    assert len(CASES) >= 200


# Only loading tells: values are read, or torch is needed to build what the file asks for.
VALUES = ("nan", "inf", "-inf", "config rope_max_seq_len", "config attention_head_dim", "shape that overflows")
LOOKED_AT = ("config ", "shape (", "missing ", "torch.", "cut ", "pipe ", "call ", "repeated ", "card ", "NaN")


@pytest.mark.parametrize("case", CASES)
def test_refused_by_loading_and_by_looking(tmp_path, watched, case, recwarn):
    folder = tmp_path / "case"
    folder.mkdir()
    role, path = CASES[case](folder)
    if case.startswith((*LOOKED_AT, "infinity")) and not case.startswith(VALUES) and role in LOOKS:
        with pytest.raises(UserError):
            inspect_weights(role, path)
    with pytest.raises(UserError) as caught:
        LOADERS[role](path)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 700 + 2 * len(str(path))
    assert not [str(warning.message) for warning in recwarn], "said beside that sentence"
    assert str(tmp_path) in message or "model." in message


@pytest.mark.parametrize("name", WHOLE)
def test_whole_ones_load(tmp_path, name):
    """What the damaged files were made from is not refused for anything else."""
    role, content = WHOLE[name]
    if role != "text_encoder":  # which needs a tokenizer, too
        LOADERS[role](written(tmp_path, role, name, content)[1])


def test_whole_shards_load(tmp_path):
    weights.load_student(run_of_shards(tmp_path).parent.parent)


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("seed", range(3))
def test_a_flip_among_values_cannot_be_seen_but_does_no_harm(tmp_path, watched, name, seed):
    """No format but zip's has a checksum, and maps are not read through: a hash (download.py --verify) is."""
    role, content = WHOLE[name]
    rng, damaged = random.Random(f"value {name} {seed}"), bytearray(content)
    damaged[rng.randrange(len(content) // 2, len(content) * 3 // 4)] ^= 1 << rng.randrange(8)
    folder = tmp_path / "case"
    folder.mkdir()
    try:
        LOADERS[role](written(folder, role, name, bytes(damaged))[1])
    except UserError:
        pass
