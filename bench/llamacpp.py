#!/usr/bin/env python3
"""epsmoe and llama.cpp on the same shapes, in turns: prefill and decode of one sequence on all threads.

llamacpp.py --llama-bench LLAMA_BENCH --epsmoe EPSMOE [--gguf DIR] [--rounds N] [--json FILE] [PRESET ...]

Writes each preset's shapes as a GGUF of random weights into DIR, unless they are there, and lets both programs take
turns on them. Needs the packages `gguf` and `numpy`, and llama.cpp's `llama-bench`, built for this processor.
"""
import argparse
import json
import os
import pathlib
import statistics
import subprocess
import tempfile

PRESETS = pathlib.Path(__file__).resolve().parent.parent / "crates" / "model" / "presets"
DEFAULT = ["llamacpp-qwen3moe-mini", "llamacpp-deepseek2-mini", "llamacpp-deepseek2-lite4"]
DTYPES = {"bfloat16": "BF16", "float32": "F32"}
PROMPT, NEW = 512, 64


def write_gguf(config, dtype, path):
    """The configuration's shapes with random weights, as llama.cpp's own converter lays them out."""
    import gguf
    import numpy

    random = numpy.random.default_rng(1)
    kind = gguf.GGMLQuantizationType[DTYPES[dtype]]
    latent = "kv_lora_rank" in config
    partial = path.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, "deepseek2" if latent else "qwen3moe")

    def matrix(name, *shape):
        numbers = random.standard_normal(shape, dtype=numpy.float32) * numpy.float32(0.02)
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(numbers, kind), raw_dtype=kind)

    def plain(name, *shape):
        writer.add_tensor(f"{name}.weight", random.random(shape, dtype=numpy.float32) * numpy.float32(0.1) + 1)

    def router(name, *shape):
        writer.add_tensor(f"{name}.weight", random.standard_normal(shape, dtype=numpy.float32) * numpy.float32(0.02))

    hidden, heads, layers = config["hidden_size"], config["num_attention_heads"], config["num_hidden_layers"]
    experts = config["n_routed_experts" if latent else "num_experts"]
    inner = config["moe_intermediate_size"]
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_expert_count(experts)
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_feed_forward_length(inner)
    if latent:
        rank, rope = config["kv_lora_rank"], config["qk_rope_head_dim"]
        nope, value = config["qk_nope_head_dim"], config["v_head_dim"]
        shared, dense = config["n_shared_experts"], config["first_k_dense_replace"]
        writer.add_head_count_kv(1)
        writer.add_q_lora_rank(config["q_lora_rank"])
        writer.add_kv_lora_rank(rank)
        writer.add_key_length(rank + rope)
        writer.add_value_length(rank)
        writer.add_key_length_mla(nope + rope)
        writer.add_value_length_mla(value)
        writer.add_rope_dimension_count(rope)
        writer.add_leading_dense_block_count(dense)
        writer.add_expert_shared_count(shared)
        writer.add_expert_weights_scale(config["routed_scaling_factor"])
        writer.add_expert_weights_norm(config["norm_topk_prob"])
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SOFTMAX)
    else:
        width = config["head_dim"]
        kv_heads, shared, dense = config["num_key_value_heads"], 0, 0
        writer.add_head_count_kv(kv_heads)
        writer.add_key_length(width)
        writer.add_value_length(width)

    matrix("token_embd", config["vocab_size"], hidden)
    matrix("output", config["vocab_size"], hidden)
    plain("output_norm", hidden)
    for layer in range(layers):
        at = f"blk.{layer}."
        plain(at + "attn_norm", hidden)
        plain(at + "ffn_norm", hidden)
        if latent:
            matrix(at + "attn_q_a", config["q_lora_rank"], hidden)
            plain(at + "attn_q_a_norm", config["q_lora_rank"])
            matrix(at + "attn_q_b", heads * (nope + rope), config["q_lora_rank"])
            matrix(at + "attn_kv_a_mqa", rank + rope, hidden)
            plain(at + "attn_kv_a_norm", rank)
            matrix(at + "attn_k_b", heads, rank, nope)
            matrix(at + "attn_v_b", heads, value, rank)
            matrix(at + "attn_output", hidden, heads * value)
        else:
            matrix(at + "attn_q", heads * width, hidden)
            matrix(at + "attn_k", kv_heads * width, hidden)
            matrix(at + "attn_v", kv_heads * width, hidden)
            plain(at + "attn_q_norm", width)
            plain(at + "attn_k_norm", width)
            matrix(at + "attn_output", hidden, heads * width)
        if layer < dense:
            for part in ("gate", "up"):
                matrix(f"{at}ffn_{part}", config["intermediate_size"], hidden)
            matrix(at + "ffn_down", hidden, config["intermediate_size"])
            continue
        router(at + "ffn_gate_inp", experts, hidden)
        for part in ("gate", "up"):
            matrix(f"{at}ffn_{part}_exps", experts, inner, hidden)
        matrix(at + "ffn_down_exps", experts, hidden, inner)
        if shared:
            for part in ("gate", "up"):
                matrix(f"{at}ffn_{part}_shexp", shared * inner, hidden)
            matrix(at + "ffn_down_shexp", hidden, shared * inner)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(partial, path)


def run(command):
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\nended with {done.returncode}:\n{done.stderr}")
    return done.stdout


def time_llama(program, model, threads):
    """Tokens a second of prefill and of decode: the median of the program's repeats."""
    answer = json.loads(run([program, "-m", model, "-t", str(threads), "-p", str(PROMPT), "-n", str(NEW), "-r", "3", "-o", "json"]))
    rate = {bool(row["n_prompt"]): statistics.median(row["samples_ts"]) for row in answer}
    return rate[True], rate[False]


def time_epsmoe(program, preset, dtype, threads):
    """Likewise. A prompt of one token is what a sequence that is generated from nothing begins with."""

    def rate(prompt, new, steps_tokens):
        with tempfile.TemporaryDirectory() as folder:
            out = os.path.join(folder, "bench.json")
            run([program, "bench", "--model", f"preset:{preset}", "--dtype", dtype, "--data-parallel-size", "1",
                 "--threads", str(threads), "--contender", "auto", "--batch-size", "1", "--input-len", str(prompt),
                 "--output-len", str(new), "--num-iters", "3", "--json", out])
            with open(out) as file:
                counted = json.load(file)["rows"][0]["tokens_per_second"]
        # The program counts prompt and new tokens; a prompt's last token makes the first new one.
        return counted * steps_tokens / (prompt + new)

    return rate(PROMPT, 1, PROMPT), rate(1, NEW, NEW)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="*", metavar="PRESET", help="default: " + " ".join(DEFAULT))
    parser.add_argument("--llama-bench", required=True)
    parser.add_argument("--epsmoe", required=True)
    parser.add_argument("--gguf", type=pathlib.Path, default=pathlib.Path("gguf"), help="folder of the GGUF files")
    parser.add_argument("--dtype", action="append", choices=list(DTYPES), help="default: bfloat16")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=pathlib.Path)
    options = parser.parse_args()
    options.gguf.mkdir(parents=True, exist_ok=True)
    results = []
    for preset in options.presets or DEFAULT:
        config = json.loads((PRESETS / f"{preset}.json").read_text())
        for dtype in options.dtype or ["bfloat16"]:
            model = options.gguf / f"{preset}-{dtype}.gguf"
            if not model.exists():
                write_gguf(config, dtype, model)
            turns = {"epsmoe": [], "llama.cpp": []}
            for _ in range(options.rounds):
                turns["epsmoe"].append(time_epsmoe(options.epsmoe, preset, dtype, options.threads))
                turns["llama.cpp"].append(time_llama(options.llama_bench, model, options.threads))
            results.append({"preset": preset, "dtype": dtype, "load": os.getloadavg(), "turns": turns})
            print(f"{preset} {dtype}: {len(turns['epsmoe'])} turns each, {options.threads} threads")
            for at, phase in enumerate((f"prefill of {PROMPT}", f"decode of {NEW}")):
                ours, theirs = ([turn[at] for turn in turns[name]] for name in turns)
                ratios = [ours / theirs for ours, theirs in zip(ours, theirs)]
                print(f"  {phase}: epsmoe {statistics.median(ours):.1f}, llama.cpp {statistics.median(theirs):.1f} tokens/s, "
                      f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})", flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
