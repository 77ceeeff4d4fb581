#!/bin/sh
# Measures this device with a model, and writes one JSON file that can be sent in with an issue. There
# is no path and no name of a user or host in it; look at it before you send it.
#
#   tools/device/benchmark.sh [MODEL] [--out FILE]
#
#   MODEL   a .gguf file; default: demo
#   --out   default: coreinfer-benchmark.json here. It must not be there yet.
#
# It takes some minutes on a small board. COREINFER_EDGE names the command, if it is not on the path.
set -eu

say() { printf '%s\n' "$*" >&2; }
refuse() {
    say "benchmark.sh: $*"
    exit 1
}

model='' out=coreinfer-benchmark.json
while [ $# -gt 0 ]; do
    case $1 in
        --out)
            [ $# -gt 1 ] || refuse "$1 needs a value"
            out=$2
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
model=${model:-demo}
[ ! -e "$out" ] || refuse "$out is there already: give another --out"
command=${COREINFER_EDGE:-coreinfer-edge}
command -v "$command" >/dev/null || refuse "there is no coreinfer-edge here: run tools/device/install.sh, or
set COREINFER_EDGE to the command"
python=$(head -n 1 "$(command -v "$command")" | sed -n 's/^#!//p')
case $python in */python*) ;; *) python=python3 ;; esac

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
say "benchmark.sh: the device"
"$command" doctor --json >"$folder/doctor.json" 2>"$folder/log" || refuse "$(tail -n 1 "$folder/log")"
say "benchmark.sh: the model"
"$command" doctor "$model" --json >"$folder/model.json" 2>"$folder/log" ||
    refuse "$(tail -n 1 "$folder/log")"

# bench has the model twice, for llama.cpp's kernels and for ours
measured=$("$python" -c '
import json, sys

report = json.load(open(sys.argv[1]))
found = report["model"]["prediction"]
room = 2.5 * found["file_bytes"] < report["device"]["available_bytes"]
print("yes" if found["runs"] == "whole" and room else "no", report["threads"])
' "$folder/model.json")
threads=${measured#* }
if [ "${measured% *}" = yes ]; then
    say "benchmark.sh: decoding, whole and with a core set, beside llama.cpp's kernels"
    "$command" bench "$model" --density 0.7 --contexts 128 --prompt-tokens 128 --tokens 32 --rounds 3 \
        --repeats 0 --threads "$threads" --json >"$folder/bench.json" 2>"$folder/log" ||
        refuse "$(tail -n 1 "$folder/log")"
    say "benchmark.sh: an answer"
    "$command" generate "$model" "The history of Rome begins with" --max-tokens 32 --temperature 0 \
        --threads "$threads" --json >"$folder/answer.json" 2>"$folder/log" ||
        refuse "$(tail -n 1 "$folder/log")"
else
    say "benchmark.sh: there is no room for the model twice, so decoding is not measured"
fi

"$python" -c '
import json, pathlib, sys

folder, out = pathlib.Path(sys.argv[1]), sys.argv[2]
result = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
for part in ("bench", "answer"):
    result.get(part, {}).pop("model", None)  # a path
if "bench" in result:  # who builds a kernel can put a name behind its version
    machine = result["bench"]["machine"]
    machine["system"] = machine["system"].split("-")[0]
with open(out, "x") as file:
    json.dump(result, file, indent=1)
    file.write("\n")
' "$folder" "$out" || refuse "$out cannot be written"
say "benchmark.sh: wrote $out"
