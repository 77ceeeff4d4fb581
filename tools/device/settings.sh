#!/bin/sh
# Chooses settings for a model on this device, by `coreinfer-edge doctor`, and prints them:
# THREADS, CONTEXT, MEMORY (empty where the model fits), GPUS (that this build can use), GPU_MEMORY
# (empty where none holds any of the model), MEMORY_MAX (for a control group).
#
#   tools/device/settings.sh MODEL [--memory SIZE] [--out FILE]
#
#   --memory  the most that the model may have; default: what is available
#   --out     a file for them, which must not be there, or be one that this script wrote
#
# COREINFER_EDGE names the command, if it is not on the path.
set -eu

say() { printf '%s\n' "$*" >&2; }
refuse() {
    say "settings.sh: $*"
    exit 1
}
first_line='# Written by tools/device/settings.sh'

model='' memory=auto out=''
while [ $# -gt 0 ]; do
    case $1 in
        --memory | --out)
            [ $# -gt 1 ] || refuse "$1 needs a value"
            if [ "$1" = --memory ]; then memory=$2; else out=$2; fi
            shift
            ;;
        -h | --help)
            sed -n '2,/^set -eu/{/^set/d;s/^# \{0,1\}//;p;}' "$0"
            exit 0
            ;;
        -*) refuse "unknown option $1: see --help" ;;
        *)
            [ -z "$model" ] || refuse "one model: $model or $1"
            model=$1
            ;;
    esac
    shift
done
[ -n "$model" ] || refuse "name a model: a .gguf file, or demo"
command=${COREINFER_EDGE:-coreinfer-edge}
command -v "$command" >/dev/null || refuse "there is no coreinfer-edge here: run tools/device/install.sh, or
set COREINFER_EDGE to the command"
if [ -e "$out" ] && [ "$(head -n 1 "$out")" != "$first_line" ]; then
    refuse "$out is there already, and not of this script: give another --out"
fi
# the Python of the command, because it is there
python=$(head -n 1 "$(command -v "$command")" | sed -n 's/^#!//p')
case $python in */python*) ;; *) python=python3 ;; esac

log=$(mktemp)
trap 'rm -f "$log"' EXIT
settings=$("$command" doctor "$model" --memory "$memory" --quick --json 2>"$log" | "$python" -c '
import json, sys

try:
    report = json.load(sys.stdin)
except ValueError:  # it was killed
    sys.exit("doctor has no report: run coreinfer-edge doctor MODEL --quick")
if "error" in report:
    sys.exit(1)
model = report["model"]
for finding in report["findings"]:
    if finding["kind"] == "problem":
        print("problem: " + finding["what"] + ": " + finding["do"], file=sys.stderr)
gpu_plan, plan, prediction, mib = model["gpu_plan"], model["plan"], model["prediction"], 1 << 20
if plan is None and gpu_plan is None:
    sys.exit(model["refusal"])
whole = prediction["runs"] == "whole" or gpu_plan is not None
if prediction["is_poor"] and gpu_plan is None:
    print("the text will suffer: a smaller model is better here", file=sys.stderr)
print("THREADS=%d" % report["threads"])
print("CONTEXT=%d" % (gpu_plan or plan)["n_ctx"])
print("MEMORY=%s" % ("" if whole else "%dMiB" % (plan["budget"] // mib)))
print("GPUS=%d" % len(report["device"]["gpus"]))
print("GPU_MEMORY=%s" % ("auto" if gpu_plan else ""))
# a server takes some more than the model: its packages, requests, the page cache of small files
if gpu_plan:  # CUDA has memory of its own beside the weights that stay here
    most = 1.15 * prediction["file_bytes"] / mib + 1024
else:
    most = 1.15 * (plan["total"] if whole else plan["budget"]) / mib + 128
print("MEMORY_MAX=%dM" % most)
') || refuse "there are no settings for $model. $(grep '^error' "$log" || true)"

if [ -n "$out" ]; then
    new=$out.new.$$
    trap 'rm -f "$log" "$new"' EXIT
    printf '%s\n%s\n' "$first_line" "$settings" >"$new" || refuse "$out cannot be written"
    mv "$new" "$out"
    say "settings.sh: wrote $out"
else
    printf '%s\n' "$settings"
fi
