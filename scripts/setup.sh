# Sourced by inference.sh, training.sh and scripts/test.sh.
#   set_up requirements.txt [requirements-dev.txt ...]
# leaves the Python to use in $PYTHON. In order:
#   DIAGONAL_NO_VENV=1    python3 as it is ($PYTHON if set), nothing is installed
#   an active VIRTUAL_ENV that has what is asked for
#   .venv in the checkout, made and filled when it is missing, out of date or half done
# PYTHON=/path/to/python3.12 chooses what .venv is made from.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="$ROOT/.venv"

say() { printf '%s\n' "$*" >&2; }
stop() { say "error: $*"; exit 2; }

# The interpreter that .venv is made from: 3.11 or 3.12.
find_python() {
  local candidate version seen="" candidates=(python3 python3.12 python3.11 python)
  if [ -n "${PYTHON:-}" ]; then candidates=("$PYTHON"); fi
  for candidate in "${candidates[@]}"; do
    version="$("$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)" || continue
    case "$version" in
      3.11 | 3.12) command -v "$candidate"; return ;;
    esac
    seen="$seen $candidate=$version"
  done
  stop "Python 3.11 or 3.12 is needed and was not found (found:${seen:- none}); install one, or name it: PYTHON=/path/to/python3.12"
}

# What .venv must agree with for one requirements file: the interpreter and every line of the file.
stamp_of() { { "$1" -c 'import sys; print(sys.version)'; cat "$2"; } | sha256sum | cut -d' ' -f1; }

# Whether .venv is whole and has what these requirements files ask for.
is_set_up() {
  local base="$1" file
  shift
  [ -x "$VENV/bin/python" ] && [ ! -e "$VENV/incomplete" ] || return 1
  for file in "$@"; do
    [ "$(cat "$VENV/stamp-${file##*/}" 2>/dev/null)" = "$(stamp_of "$base" "$file")" ] || return 1
  done
}

# Runs pip with its output in a log and one line on the terminal.
quiet_pip() {
  local log="$VENV/setup.log" start=$SECONDS status=0 step pid
  "$VENV/bin/python" -m pip install --no-input --disable-pip-version-check --progress-bar off "$@" >"$log" 2>&1 &
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
    say "installing packages into $VENV (first run only) ..."
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

# Makes and fills .venv. Interrupted at any point, the marker `incomplete` stays and the next run starts over.
fill_venv() {
  local base="$1" file arguments=() version='import sys; print(sys.version)'
  shift
  if [ -e "$VENV/incomplete" ] || ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1 ||
    [ "$("$VENV/bin/python" -c "$version")" != "$("$base" -c "$version")" ]; then
    say "making a virtual environment in $VENV with $("$base" --version) ..."
    rm -rf "$VENV" || stop "$VENV cannot be removed; remove it and run this again"
    mkdir -p "$VENV" 2>/dev/null || stop "$ROOT cannot be written to; activate a virtual environment with requirements.txt installed"
    touch "$VENV/incomplete"
    "$base" -m venv "$VENV" >/dev/null 2>&1 ||
      stop "$base has no working venv module; on Debian or Ubuntu: apt install $(basename "$base")-venv"
  fi
  touch "$VENV/incomplete"
  for file in "$@"; do arguments+=(-r "$file"); done
  quiet_pip "${arguments[@]}"
  for file in "$@"; do stamp_of "$base" "$file" >"$VENV/stamp-${file##*/}"; done
  rm "$VENV/incomplete"
}

set_up() {
  local files=() file base
  for file in "$@"; do files+=("$ROOT/$file"); done
  if [ "${DIAGONAL_NO_VENV:-0}" = 1 ]; then
    PYTHON="${PYTHON:-python3}"
    return
  fi
  if [ -n "${VIRTUAL_ENV:-}" ] && "$VIRTUAL_ENV/bin/python" "$ROOT/scripts/check_requirements.py" "${files[@]}" >/dev/null 2>&1; then
    PYTHON="$VIRTUAL_ENV/bin/python"
    return
  fi
  base="$(find_python)" || exit 2
  if ! is_set_up "$base" "${files[@]}"; then
    ( # a second set-up waits here until the first is through, and then finds its work done
      if command -v flock >/dev/null; then
        flock --nonblock 9 || { say "waiting for another set-up in $ROOT ..."; flock 9; }
      fi
      is_set_up "$base" "${files[@]}" || fill_venv "$base" "${files[@]}"
    ) 9>>"$ROOT/.venv.lock" || exit $?
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
