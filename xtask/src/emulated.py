#!/usr/bin/env python3
"""What run-emulated.sh measured, in a short table: layers of one rank of several, how far predictions were off, and how far
the auto schedule was behind the best of its cell and ahead of the serial one."""
import glob, json, math, random, statistics, sys

def draw(seed):
    """Layers at random: number, model, tokens from 512 to 16384 and GB/s from 40 to 400, both even in their logarithm."""
    numbers = random.Random(seed)
    for cell in range(1, 21):
        model = ["deepseek-v2", "deepseek-v3", "qwen3-30b-a3b", "mixtral-8x7b"][int(4 * numbers.random())]
        between = lambda least, most: int(least * math.exp(numbers.random() * math.log(most / least)))
        print(cell, model, between(512, 16384), between(40, 400))

if sys.argv[1:2] == ["draw"]:
    draw(int(sys.argv[2]))
    sys.exit()

def cells(pattern):
    for file in sorted(glob.glob(pattern)):
        yield from json.load(open(file))["cells"]

def share(numbers, of_ten):
    return statistics.quantiles(numbers, n=10)[of_ten - 1] if len(numbers) > 1 else numbers[0]

def account(name, all_cells):
    """Of the layers that were predicted, and of the cells that auto was in."""
    rows = [row for cell in all_cells for row in cell["rows"] if row["predicted_us"]]
    off = [abs(row["predicted_us"] / row["layer_us"] - 1) for row in rows]
    if off:
        print(f"{name}: predictions of {len(off)} layers are off by {statistics.median(off):.1%} at the median, "
              f"{share(off, 9):.1%} at the 90th percentile")
    behind, over_serial = [], []
    for cell in all_cells:
        of = {row["schedule"]: row["layer_us"] for row in cell["rows"]}
        if "auto" in of:
            behind.append(of["auto"] / min(of.values()) - 1)
            over_serial.append(of["auto"] / of["serial"] - 1)
    if behind:
        print(f"{name}: auto is behind the best of its cell by {statistics.mean(behind):.1%} on average, {max(behind):.1%} "
              f"at most; behind serial by {max(over_serial):.1%} at most; {len(behind)} cells")

for cell in cells("layer-*.json"):
    times = "  ".join(f"{row['schedule']} {row['layer_us'] / 1e3:.2f} ({row['efficiency'] or 0:.2f})" for row in cell["rows"])
    print(f"{cell['model']} {cell['tokens']} {cell['emulated_link']}: {times}")
account("layers", list(cells("layer-*.json")))
account("drawn", list(cells("drawn-*.json")))
for file in sorted(glob.glob("share-*.json")):
    for cell in json.load(open(file))["cells"]:
        times = "  ".join(f"{row['schedule']} {row['layer_us'] / 1e3:.2f}" for row in cell["rows"])
        print(f"{file[6:-5]} multiprocessors left, {cell['tokens']} tokens: {times}")
for file in sorted(glob.glob("model-*.json") + glob.glob("ablation-*.json")):
    report = json.load(open(file))
    for row in report["rows"]:
        ratio = row["ratio_to_base"] or row["ratio_to_serial"]
        print(f"{file[:-5]}: {row['strategy']} {row['schedule']} {row['stages']} {row['gemm']}: {row['tokens_per_second']:.0f} tokens/s, "
              f"layer {row['moe_layer_ms'] or 0:.2f} ms, ratio {ratio or 0:.3f}")
