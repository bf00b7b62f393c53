# Sourced by the .sh entry points.
#   set_up requirements.txt [requirements-dev.txt ...]
# leaves the Python to use in $PYTHON: the first of these that has what is asked for.
#   DIAGONAL_NO_VENV=1    python3 as it is ($PYTHON if set): nothing is looked at, nothing is installed
#   an active environment, of venv (VIRTUAL_ENV) or conda (CONDA_PREFIX)
#   .venv in the checkout, looked at on each start, and made, filled or repaired where it lacks something
# PYTHON=/path/to/python3.12 chooses what .venv is made from. Variables and settings from outside that put other modules
# before those of .venv, or packages elsewhere (PYTHONPATH, PIP_TARGET ...), do not reach it.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="$ROOT/.venv"
if [ -L "$VENV" ]; then VENV="$(readlink -f "$VENV" || echo "$VENV")"; fi # checkouts that share one share its lock, too

say() { printf '%s\n' "$*" >&2; }
stop() { say "error: $*"; exit 2; }

# "3.12 /usr/bin/python3.12": the version of a Python, and where it is, or where the environment that it is of comes from.
describe_python() {
  "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2], getattr(sys, "_base_executable", 0) or sys.executable)' 2>/dev/null
}

# The interpreter that .venv is made from: 3.11 to 3.14.
find_python() {
  local candidate found seen="" candidates=(python3 python3.12 python3.11 python3.13 python3.14 python)
  if [ -n "${PYTHON:-}" ]; then candidates=("$PYTHON"); fi
  for candidate in "${candidates[@]}"; do
    found="$(describe_python "$candidate")" || continue
    case "${found%% *}" in
      3.11 | 3.12 | 3.13 | 3.14) printf '%s\n' "${found#* }"; return ;;
    esac
    seen="$seen $candidate=${found%% *}"
  done
  stop "Python 3.11 to 3.14 is needed and was not found (found:${seen:- none}); install one, or name it: PYTHON=/path/to/python3.12"
}

# Whether a Python has what these requirements files ask for; if not, prints what is wrong.
has() {
  local python="$1" faults
  shift
  faults="$("$python" "$ROOT/scripts/check_requirements.py" "$@" 2>/dev/null)" && return
  if [ "$(wc -l <<<"$faults")" -gt 3 ]; then faults="$(head -n 3 <<<"$faults")"$'\n'"..."; fi
  faults="${faults//$'\n'/, }"
  printf '%s\n' "${faults:-its Python does not run}"
  return 1
}

# Whether .venv is of the version of $PYTHON, if that was named.
is_named_python() {
  local named own
  if [ -z "${PYTHON:-}" ]; then return; fi
  named="$(describe_python "$PYTHON")" && own="$(describe_python "$VENV/bin/python")" && [ "${named%% *}" = "${own%% *}" ]
}

# Whether .venv is whole and has what these requirements files ask for; if not, prints what is wrong.
is_set_up() {
  [ ! -e "$VENV/incomplete" ] || { echo "its set-up was interrupted"; return 1; }
  is_named_python || { echo "it has another Python than $PYTHON"; return 1; }
  has "$VENV/bin/python" --whole "$@"
}

# Arguments for `env`, a line each, that leave pip with those of its settings that say how packages are fetched (a mirror,
# a proxy, a certificate), and without those that change what is installed or where (target, prefix, user, no-deps ...).
pip_settings() {
  "$VENV/bin/python" -c '
import ast, os, sys

KEPT = """index-url extra-index-url find-links no-index trusted-host proxy cert client-cert timeout default-timeout
retries constraint cache-dir no-cache-dir prefer-binary only-binary no-binary keyring-provider""".split()
settings = {}
lines = [line.rstrip("\n").partition("=") for line in sys.stdin]
for section in ("global.", "install.", ":env:."):
    for name, _, value in lines:
        if name.startswith(section) and name[len(section) :] in KEPT and ast.literal_eval(value):
            settings[name[len(section) :]] = " ".join(str(ast.literal_eval(value)).split())
print("\n".join(f"-u{name}" for name in os.environ if name.startswith("PIP_")))
print("PIP_CONFIG_FILE=" + os.devnull)
print("\n".join(f"PIP_{name.upper().replace(chr(45), chr(95))}={value}" for name, value in settings.items()))
' <<<"$1"
}

# Runs pip with its output in a log and one line on the terminal.
quiet_pip() {
  local log="$VENV/setup.log" start=$SECONDS status=0 step pid line settings=() given
  # `pip config` has a --user of its own, which leaves out the other files
  given="$(env -u PIP_PYTHON PIP_USER=0 PIP_GLOBAL=0 PIP_SITE=0 "$VENV/bin/python" -m pip config list 2>"$log")" ||
    stop "pip cannot read its settings: $(tail -n 1 "$log")"
  while IFS= read -r line; do
    if [ -n "$line" ]; then settings+=("$line"); fi
  done < <(pip_settings "$given")
  env "${settings[@]}" "$VENV/bin/python" -m pip install --no-input --disable-pip-version-check --progress-bar off "$@" >"$log" 2>&1 &
  pid=$!
  trap 'kill "$pid" 2>/dev/null; exit 130' INT TERM
  if [ -t 2 ]; then
    while kill -0 "$pid" 2>/dev/null; do
      step="$(grep -E '^(Collecting|Downloading|Installing)' "$log" 2>/dev/null | tail -n 1 | cut -c1-50)"
      printf '\rinstalling packages, %3d s  %-50s' "$((SECONDS - start))" "$step" >&2
      sleep 1
    done
    printf '\r%-80s\r' '' >&2
  else
    say "installing packages into $VENV ..."
  fi
  wait "$pid" || status=$?
  trap - INT TERM
  if [ "$status" -ne 0 ]; then
    if grep -qE 'NewConnectionError|NameResolutionError|name resolution|Connection (refused|reset|timed out)|Network is unreachable|Max retries|No matching distribution' "$log"; then
      stop "packages could not be fetched; go online (or set PIP_INDEX_URL to a mirror) and run this again; details in $log"
    fi
    tail -n 5 "$log" >&2
    stop "pip failed with code $status; details in $log"
  fi
  say "packages installed in $((SECONDS - start)) s"
}

# Whether packages can be installed into .venv as it is.
can_be_filled() {
  [ ! -e "$VENV/incomplete" ] && is_named_python && has "$VENV/bin/python" && "$VENV/bin/python" -c "import pip"
} >/dev/null 2>&1

# Makes .venv. Interrupted at any point, the marker `incomplete` stays, and the next run starts over; one that was made here
# and is whole has the marker `complete`. Nothing else is ever removed.
make_venv() {
  local base
  base="$(find_python)" || exit 2
  if [ -n "$(ls -A "$VENV" 2>/dev/null)" ] && [ ! -e "$VENV/incomplete" ] && [ ! -e "$VENV/complete" ]; then
    stop "$VENV was not made by this script and cannot be used: $1; move it away and run this again"
  fi
  say "making a virtual environment in $VENV with $("$base" --version) ..."
  rm -rf "$VENV" 2>/dev/null || stop "$VENV cannot be removed; remove it and run this again"
  { mkdir -p "$VENV" && touch "$VENV/incomplete"; } 2>/dev/null || stop "$VENV cannot be written to"
  "$base" -m venv "$VENV" >/dev/null 2>&1 ||
    stop "$base has no working venv module; on Debian or Ubuntu: apt install $(basename "$base")-venv"
}

# Installs what .venv lacks, into a new one if this one cannot be filled.
fill_venv() {
  local faults="$1" file arguments=() damaged=""
  shift
  if can_be_filled; then
    { : >>"$VENV/setup.log"; } 2>/dev/null || stop "$VENV cannot be written to, and it cannot be used as it is: $faults"
    say "in $VENV $faults"
    damaged="$("$VENV/bin/python" "$ROOT/scripts/check_requirements.py" --damaged "$@" 2>/dev/null || true)"
  else
    make_venv "$faults"
  fi
  # shellcheck disable=SC2086  # several names
  if [ -n "$damaged" ]; then quiet_pip --ignore-installed --no-deps $damaged; fi
  for file in "$@"; do arguments+=(-r "$file"); done
  quiet_pip "${arguments[@]}"
  faults="$(has "$VENV/bin/python" --whole "$@")" ||
    stop "pip found nothing wrong, and $VENV cannot be used: $faults; move it away and run this again; details in its setup.log"
  if [ -e "$VENV/incomplete" ]; then mv "$VENV/incomplete" "$VENV/complete"; fi
}

set_up() {
  local files=() file active faults others=""
  for file in "$@"; do files+=("$ROOT/$file"); done
  if [ "${DIAGONAL_NO_VENV:-0}" = 1 ]; then
    PYTHON="${PYTHON:-python3}"
    return
  fi
  for active in "${VIRTUAL_ENV:-}" "${CONDA_PREFIX:-}"; do
    if [ -z "$active" ] || [ "$active" -ef "$VENV" ]; then continue; fi
    if faults="$(has "$active/bin/python" "${files[@]}")"; then
      PYTHON="$active/bin/python"
      return
    fi
    others="${others}the active environment $active is not used: $faults"$'\n'
  done
  unset PYTHONPATH PYTHONHOME PYTHONSAFEPATH PYTHONPLATLIBDIR
  if ! is_set_up "${files[@]}" >/dev/null; then
    printf '%s' "$others" >&2
    { : >>"$VENV.lock"; } 2>/dev/null ||
      stop "$VENV cannot be made or mended: $(dirname "$VENV") cannot be written to; activate an environment that has $*"
    ( # a second set-up waits here until the first is through, and then finds its work done
      if command -v flock >/dev/null; then
        flock --nonblock 9 || { say "waiting for another set-up in $ROOT ..."; flock 9; }
      fi
      faults="$(is_set_up "${files[@]}")" || fill_venv "$faults" "${files[@]}"
    ) 9>>"$VENV.lock" || exit $?
  fi
  PYTHON="$VENV/bin/python"
}

# GPUs that a process started here would see.
count_gpus() {
  if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
    case "$CUDA_VISIBLE_DEVICES" in
      "" | -*) echo 0 ;;
      *) tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c . ;;
    esac
  elif command -v nvidia-smi >/dev/null; then
    nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true
  else
    echo 0
  fi
}
