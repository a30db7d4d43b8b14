#!/usr/bin/env python3
"""epsmoe serve and llama-server on the same shapes, in turns: tokens a second, TTFT and TPOT under 8 and 32 clients.

serve_peers.py --epsmoe EPSMOE [--llama-cpp DIR] [--ik-llama-cpp DIR] [--gguf DIR] [--rounds N] [--json FILE] [PRESET ...]

A turn starts a server, asks it once for nothing that counts, and lets `epsmoe bench serve` be all clients of both; then the
next server has its turn. Prompts are random token ids, answers greedy and exactly so long. Needs what peers.py needs, and
`llama-server` in the folders of the peers.
"""
import argparse
import json
import os
import pathlib
import socket
import statistics
import subprocess
import tempfile
import time
import urllib.error
import urllib.request

from peers import DEFAULT, PRESETS, add_peers, models_of, run

CLIENTS = [8, 32]
FIGURES = {
    "tokens/s": lambda figures: figures["output_throughput"],
    "TTFT p50 ms": lambda figures: figures["ttft_ms"]["p50"],
    "TTFT p99 ms": lambda figures: figures["ttft_ms"]["p99"],
    "TPOT p50 ms": lambda figures: figures["tpot_ms"]["p50"],
}
FLAGS = {"llama.cpp": [], "ik_llama.cpp": ["-rtr", "-thp"]}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def command(name, options, preset, dtype, model, port):
    """How a server is started: with room for all clients at once, and no more threads than asked for."""
    most = max(options.clients)
    tokens = options.input_len + options.output_len
    if name == "epsmoe":
        return [options.epsmoe, "serve", f"preset:{preset}", "--dtype", dtype, "--data-parallel-size", "1", "--threads",
                str(options.threads), "--max-num-seqs", str(most), "--port", str(port), "--log-level", "error"]
    context = str(most * (tokens + 64))
    return [options.peers[name] / "llama-server", "-m", model, "-t", str(options.threads), "-np", str(most), "-c", context,
            "--host", "127.0.0.1", "--port", str(port), *FLAGS[name]]


def await_ready(server, base):
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise SystemExit(f"a server ended with {server.returncode} before it was ready")
        try:
            with urllib.request.urlopen(base + "/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise SystemExit(f"no server at {base} after 300 s")


def ask(options, base, clients, requests):
    with tempfile.TemporaryDirectory() as folder:
        out = os.path.join(folder, "figures.json")
        run([options.epsmoe, "bench", "serve", "--base-url", base, "--num-prompts", str(requests), "--max-concurrency",
             str(clients), "--random-input-len", str(options.input_len), "--random-output-len", str(options.output_len),
             "--json", out])
        with open(out) as file:
            figures = json.load(file)
    expected = requests * options.output_len
    if figures["total_output_tokens"] != expected:
        raise SystemExit(f"{base} made {figures['total_output_tokens']} tokens where {expected} were asked for")
    return figures


def turn(name, options, preset, dtype, model):
    port = free_port()
    base = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen(command(name, options, preset, dtype, model, port), stdout=log, stderr=log)
        try:
            await_ready(server, base)
            ask(options, base, 2, 2)
            return {str(clients): ask(options, base, clients, options.rounds_of_clients * clients) for clients in options.clients}
        finally:
            server.terminate()
            server.wait(60)


def summary(turns):
    for preset, dtype in sorted({(turn["preset"], turn["dtype"]) for turn in turns}):
        ours = [turn for turn in turns if (turn["preset"], turn["dtype"]) == (preset, dtype)]
        print(f"{preset} {dtype}, {len(ours)} turns")
        for clients in ours[0]["figures"]["epsmoe"]:
            for figure, of in FIGURES.items():
                values = {name: [of(turn["figures"][name][clients]) for turn in ours] for name in ours[0]["figures"]}
                text = f"  {clients:>3} clients {figure:12} epsmoe {statistics.median(values['epsmoe']):9.1f}"
                for peer in values:
                    if peer != "epsmoe":
                        ratio = statistics.median(mine / theirs for mine, theirs in zip(values["epsmoe"], values[peer]))
                        text += f" | {peer} {statistics.median(values[peer]):9.1f}, ratio {ratio:.2f}"
                print(text, flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="*", metavar="PRESET", help="default: " + DEFAULT[0])
    add_peers(parser)
    parser.add_argument("--clients", type=int, action="append", help=f"default: {CLIENTS}")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--rounds-of-clients", type=int, default=3, help="requests for each client")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=64)
    options = parser.parse_args()
    options.clients = options.clients or CLIENTS
    options.peers = {"llama.cpp": options.llama_cpp, "ik_llama.cpp": options.ik_llama_cpp}
    turns = json.loads(options.json.read_text()) if options.json and options.json.exists() else []
    for preset in options.presets or DEFAULT[:1]:
        config = json.loads((PRESETS / f"{preset}.json").read_text())
        for dtype in options.dtype or ["bfloat16"]:
            models = models_of(options, preset, config, dtype)
            for _ in range(options.rounds):
                figures = {"epsmoe": turn("epsmoe", options, preset, dtype, None)}
                for name, model in models.items():
                    figures[name] = turn(name, options, preset, dtype, model)
                turns.append({"preset": preset, "dtype": dtype, "threads": options.threads, "load": os.getloadavg(),
                              "input_len": options.input_len, "output_len": options.output_len, "figures": figures})
                if options.json:
                    options.json.write_text(json.dumps(turns, indent=1) + "\n")
    summary(turns)


if __name__ == "__main__":
    main()
