#!/usr/bin/env python3
"""What run-ranks.sh measured of MoE layers, in a short table: real ranks that are threads and processes, the one whose others
are emulated, what was predicted, and how far emulation and prediction are from the processes."""
import glob, json, statistics

def name(row):
    return row["schedule"] if row["schedule"] != "staged" else f"staged:{row['stages']}"

cells = {}
for file in sorted(glob.glob("real-*.json")):
    kind, wire, tokens, model = file[len("real-"):-len(".json")].split("-", 3)
    rows = json.load(open(file))["rows"]
    cells.setdefault((model, int(tokens), wire), {})[kind] = {
        name(row): row["moe_layer_ms"] for row in rows if row["moe_layer_ms"]}
for file in sorted(glob.glob("emulated-*.json")):
    wire, model = file[len("emulated-"):-len(".json")].split("-", 1)
    for cell in json.load(open(file))["cells"]:
        of = cells.setdefault((model, cell["tokens"], wire), {})
        of["emulated"] = {row["schedule"]: row["layer_us"] / 1e3 for row in cell["rows"]}
        of["predicted"] = {row["schedule"]: row["predicted_us"] / 1e3 for row in cell["rows"] if row["predicted_us"]}

for file in sorted(glob.glob("decode-*.json")):
    report = json.load(open(file))
    times = "  ".join(f"{name(row)} {row['decode_step_ms']:.3f}" for row in report["rows"] if row["decode_step_ms"])
    print(f"{file[:-len('.json')]}, {report['ranks']} ranks: ms of a step: {times}")

errors, behind = {"emulated": [], "predicted": []}, {"thread": [], "process": []}
for (model, tokens, wire), kinds in sorted(cells.items()):
    print(f"{model}, {tokens} tokens a rank, rows in {wire}: ms of a layer")
    for kind, times in kinds.items():
        print(f"  {kind:<10}" + "  ".join(f"{schedule} {ms:.2f}" for schedule, ms in times.items()))
        if kind in errors:
            real = kinds.get("process", {})
            errors[kind] += [abs(ms / real[schedule] - 1) for schedule, ms in times.items() if schedule in real]
        elif "auto" in times:
            behind[kind].append(times["auto"] / min(times.values()) - 1)
for kind, of in errors.items():
    if len(of) > 1:
        print(f"{kind} layers are off from those of processes by {statistics.median(of):.1%} at the median, "
              f"{statistics.quantiles(of, n=10)[-1]:.1%} at the 90th percentile, of {len(of)}")
for kind, of in behind.items():
    if of:
        print(f"auto is behind the best of its cell by {statistics.mean(of):.1%} on average, {max(of):.1%} at most ({kind})")
