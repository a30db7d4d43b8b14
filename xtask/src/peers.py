#!/usr/bin/env python3
"""Products and experts on one GPU, ours and PyTorch's in turns, cell by cell.

peers.py OP_SUITE [--seconds N] [--json FILE] [PART ...]     parts: equal zipf uneven dense caps experts [default: all]

Ours are timed by the program OP_SUITE in a process of its own (`speed::served`), PyTorch's here: grouped_mm, or mm expert
by expert where ours are dense. They take turns, ROUNDS for each cell, on weights and rows that exceed the GPU's cache. Medians; a short table comes last. Without
PyTorch only ours are timed. --other OP_SUITE times a second build of ours in the same turns.
"""
import argparse, itertools, json, math, statistics, subprocess, time

try:
    import torch
    grouped_mm = getattr(torch.nn.functional, "grouped_mm", None) or torch._grouped_mm
except ImportError:
    torch = None

SHAPES = {  # hidden, inner, local experts
    "dsv2": (5120, 1536, 20), "dsv3": (7168, 2048, 32), "mixtral": (4096, 14336, 2),
    "dbrx": (6144, 10752, 2), "qwen3-30b": (2048, 768, 16), "dsv2-lite": (2048, 1408, 8)}
ROWS = (64, 256, 512, 1024, 2048, 4096)
ROUNDS, REPEATS = 4, 6


class Ours:
    def __init__(self, program):
        command = [program, "speed::served", "--exact", "--ignored", "--nocapture"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def time(self, line):
        """Rows multiplied, and seconds of each repeat."""
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        for answer in self.process.stdout:
            if answer.startswith("each "):
                self.each = answer.split()[1:]
            if answer.startswith("ns "):
                rows, *times = map(int, answer.split()[1:])
                return rows, [time * 1e-9 for time in times]
        raise SystemExit(f"ours ended at: {line}")

    def end(self):
        """Lets it finish what it has to say."""
        self.process.communicate()


def zipf(rows, experts):
    weights = [(i + 1) ** -0.8 for i in range(experts)]
    counts = [int(rows * experts * weight / sum(weights)) for weight in weights]
    counts[0] += rows * experts - sum(counts)
    # A fixed order that is neither ascending nor descending.
    return [counts[i * 7 % experts if experts % 7 else i] for i in range(experts)]


LOADS = {
    "equal": lambda rows, experts: [rows] * experts,
    "zipf": zipf,
    "one": lambda rows, experts: [rows * experts if e == experts // 2 else 0 for e in range(experts)],
    "half": lambda rows, experts: [2 * rows if e % 2 else 0 for e in range(experts)]}


class Torch:
    """The products of one cell, grouped or expert by expert, its inputs used in turn."""
    weights, held = None, None

    def __init__(self, k, n, counts, kind):
        experts, rows = len(counts), sum(counts)
        self.kind, self.counts = kind, counts
        sets = max(1, math.ceil(250e6 / (2 * k * (experts * n + rows))))
        if Torch.held != (k, n, experts, sets):
            Torch.weights = None
            Torch.weights = [torch.randn(experts, n, k, device="cuda", dtype=torch.bfloat16) for _ in range(sets)]
            Torch.held = (k, n, experts, sets)
        self.rows = [torch.randn(rows, k, device="cuda", dtype=torch.bfloat16) for _ in range(sets)]
        self.ends = torch.cumsum(torch.tensor(counts), 0).to(torch.int32).cuda()

    def multiply(self, rows, weights):
        if self.kind == "grouped":
            grouped_mm(rows, weights.transpose(1, 2), offs=self.ends)
            return
        for part, weight in zip(rows.split(self.counts), weights):
            if len(part):
                torch.mm(part, weight.t())

    def time(self, repeats):
        marks = []
        for turn in range(repeats + 1):
            at = turn % len(self.rows)
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            self.multiply(self.rows[at], Torch.weights[at])
            end.record()
            marks.append((begin, end))
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) * 1e-3 for begin, end in marks[1:]]


def products(shape, rows, op, load, programs, kind="grouped", reserved=0):
    hidden, inner, experts = SHAPES[shape]
    k, n, maps, epilogue = (hidden, inner, 2, "swiglu") if op == "gate_up" else (inner, hidden, 1, "store")
    counts = LOADS[load](rows, experts)
    line = f"products {k} {n} {epilogue} {kind} {reserved} {REPEATS} {','.join(map(str, counts))}"
    times = {name: [] for name in programs}
    theirs = Torch(k, n * maps, counts, kind) if torch and not reserved else None
    if theirs:
        times["torch"] = []
    for _ in range(ROUNDS):
        for name, program in programs.items():
            times[name] += program.time(line)[1]
        if theirs:
            times["torch"] += theirs.time(REPEATS)
    work = 2 * sum(counts) * k * n * maps
    return {name: work / statistics.median(seconds) / 1e12 for name, seconds in times.items()}


def geometric(values):
    return math.exp(sum(map(math.log, values)) / len(values))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("program")
    parser.add_argument("parts", nargs="*", default=[])
    parser.add_argument("--other")
    parser.add_argument("--seconds", type=float, default=480)
    parser.add_argument("--json")
    options = parser.parse_intermixed_args()
    programs = {"ours": Ours(options.program)}
    if options.other:
        programs["other"] = Ours(options.other)
    parts = options.parts or ["equal", "zipf", "uneven", "dense", "caps", "experts"]
    until = time.time() + options.seconds
    results, short = [], []

    def cell(*key, **more):
        if time.time() > until:
            return None
        found = products(*key, programs, **more)
        results.append({"cell": key, **more, "tflops": found})
        print(*key, *more.values(), " ".join(f"{name} {value:.0f}" for name, value in found.items()), flush=True)
        return found

    def against_torch(load):
        found = [cell(shape, rows, op, load) for shape in SHAPES for op in ("gate_up", "down") for rows in ROWS]
        for name in programs:
            ratios = [f[name] / f["torch"] for f in found if f and "torch" in f]
            if ratios:
                short.append(f"{load} loads, {name} over torch: geometric mean {geometric(ratios):.3f}, "
                             f"worst {min(ratios):.3f}, {len(ratios)} cells")

    for load in ("equal", "zipf"):
        if load in parts:
            against_torch(load)
    if "uneven" in parts:
        for op in ("gate_up", "down"):
            found = {load: cell("dsv2", 1024, op, load) for load in ("equal", "one", "half")}
            if all(found.values()):
                short.append(f"dsv2 {op} 1024 rows each, over equal loads: " + ", ".join(
                    f"{name} {found[name]['ours'] / found['equal']['ours']:.3f}" for name in ("one", "half")))
    if "dense" in parts:
        for shape in SHAPES:
            for op in ("gate_up", "down"):
                ratios, peers = [], []
                for rows in (16, 64, 256, 1024, 4096):
                    pair = [cell(shape, rows, op, "equal", kind=kind) for kind in ("grouped", "dense")]
                    if all(pair):
                        ratios.append(f"{rows}: {pair[0]['ours'] / pair[1]['ours']:.2f}")
                        peers += [f"{rows}: {pair[1]['ours'] / pair[1]['torch']:.2f}"] if torch else []
                short.append(f"{shape} {op}, grouped over dense by rows: " + ", ".join(ratios))
                short.append(f"{shape} {op}, dense over torch.mm by rows: " + ", ".join(peers))
    if "caps" in parts:
        for op in ("gate_up", "down"):
            found = [(132 - reserved, cell("dsv2", 1024, op, "equal", reserved=reserved))
                     for reserved in (0, 4, 8, 16, 24, 32, 40)]
            short.append(f"dsv2 {op} 1024 rows each, TFLOP/s by multiprocessors of 132: " + ", ".join(
                f"{blocks}: {f['ours']:.0f}" for blocks, f in found if f))
    if "experts" in parts:
        hidden, inner, experts = SHAPES["dsv2"]
        for load, rows, (name, program) in itertools.product(
                ("equal", "routed"), (256, 512, 1024, 2048), programs.items()):
            copies, times = 0, []
            for _ in range(ROUNDS):
                copies, more = program.time(f"experts {hidden} {inner} {experts} {rows} {REPEATS} {load}")
                times += more
            seconds = statistics.median(times)
            rate = 6 * copies * hidden * inner / seconds / 1e12
            results.append({"cell": ["dsv2", rows, "experts", load, name], "seconds": seconds, "tflops": rate,
                            "each": program.each})
            each = ", ".join(f"{op} {int(ns) / 1e3:.0f}" for op, ns in zip(program.each[::2], program.each[1::2]))
            short.append(f"dsv2 experts with expand and reduce, {rows} rows each, {load} loads, {name}: "
                         f"{seconds * 1e3:.3f} ms, {rate:.0f} TFLOP/s ({each} us)")
    for program in programs.values():
        program.end()
    if options.json:
        json.dump(results, open(options.json, "w"), indent=0)
    print("\n" + "\n".join(short))


if __name__ == "__main__":
    main()
