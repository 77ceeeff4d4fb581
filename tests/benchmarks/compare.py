"""Compares two results of the benchmarks, or trims one to what is worth saving.

python compare.py baseline.json new.json   # exit status 1 if something became slower
python compare.py --trim baseline.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

# Slower than this by the median, and by the best round too: one alone may be the machine.
SLOWER = 1.15


def trimmed(result: dict[str, Any]) -> dict[str, Any]:
    """Without the single rounds and what tells whose machine it was."""
    machine = result["machine_info"]["cpu"].get("brand_raw", "") if "machine_info" in result else ""
    return {
        "processor": result.get("processor", machine),
        "date": result.get("date", result.get("datetime", ""))[:10],
        "benchmarks": [
            {
                "name": benchmark["name"],
                "stats": {key: benchmark["stats"][key] for key in ("min", "median", "iqr")},
            }
            for benchmark in result["benchmarks"]
        ],
    }


def compared(old: dict[str, Any], new: dict[str, Any]) -> tuple[list[str], bool]:
    """A line for each benchmark, the most slowed down first; and whether any became slower."""
    before = {benchmark["name"]: benchmark["stats"] for benchmark in old["benchmarks"]}
    rows = []
    for benchmark in new["benchmarks"]:
        name, now = benchmark["name"], benchmark["stats"]
        if name not in before:
            rows.append((0.0, f"{'new':>8}  {now['median'] * 1e3:10.3f} ms  {name}"))
            continue
        ratios = [now[key] / before[name][key] for key in ("median", "min")]
        mark = "SLOWER" if min(ratios) > SLOWER else ""
        times = f"{before[name]['median'] * 1e3:10.3f} -> {now['median'] * 1e3:10.3f} ms"
        rows.append((min(ratios), f"{ratios[0]:7.2f}x  {times}  {name}  {mark}".rstrip()))
    rows.sort(reverse=True)
    return [line for _, line in rows], any(ratio > SLOWER for ratio, _ in rows)


def main() -> int:
    if sys.argv[1] == "--trim":
        path = Path(sys.argv[2])
        path.write_text(json.dumps(trimmed(json.loads(path.read_text())), indent=1) + "\n")
        return 0
    old, new = (json.loads(Path(name).read_text()) for name in sys.argv[1:])
    print(f"baseline: {old['processor']}, {old['date']}; times of another machine tell little")
    lines, slower = compared(old, new)
    print("\n".join(lines))
    return int(slower)


if __name__ == "__main__":
    sys.exit(main())
