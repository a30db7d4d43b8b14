#!/usr/bin/env python3
"""epsmoe, llama.cpp and ik_llama.cpp on the same shapes, in turns: prefill, and decode of one and of eight sequences.

peers.py --epsmoe EPSMOE [--llama-cpp DIR] [--ik-llama-cpp DIR] [--gguf DIR] [--rounds N] [--json FILE] [PRESET ...]

Writes each preset's shapes as a GGUF of random weights into the folder of --gguf, unless they are there, and lets the
programs take turns on them. Needs the packages `gguf` and `numpy`, and the folders of `llama-bench` and
`llama-batched-bench` of one or both peers, built for this processor. Of ik_llama.cpp weights are repacked when they are
loaded and lie in huge pages, which is what makes it fast; llama.cpp has no such switches. ik_llama.cpp's
`llama-batched-bench` gives every sequence token 0, and so all of them the same experts: let it draw tokens at random, as
llama.cpp's does, or its decode of eight sequences reads an eighth of the experts.

With --peer-dtype q4_k_m, q8_0, q4_0 or mxfp4 weights are random codes, and epsmoe reads the same file. Widths should be whole
blocks: --hf-overrides changes a preset's; maps that are none have bytes (Q8_0). epsmoe reads no GGUF of Qwen3.5, and takes random
weights of its own there.
"""
import argparse
import hashlib
import json
import os
import pathlib
import statistics
import subprocess
import tempfile

PRESETS = pathlib.Path(__file__).resolve().parent.parent / "crates" / "model" / "presets"
DEFAULT = ["llamacpp-qwen3moe-mini", "llamacpp-deepseek2-mini", "llamacpp-deepseek2-lite4"]
DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
QUANTISED = {"q4_k_m": "Q4_K", "q8_0": "Q8_0", "q4_0": "Q4_0", "mxfp4": "MXFP4"}
PROMPT, NEW, SEQUENCES = 512, 64, 8
PHASES = [f"prefill of {PROMPT}", f"decode of {NEW}", f"decode of {SEQUENCES} x {NEW}"]
# Families of which epsmoe reads no GGUF.
WITHOUT_GGUF = ["qwen3_5_moe"]
FLAGS = {"llama.cpp": [], "ik_llama.cpp": ["-rtr", "1", "-thp", "1"]}


def byte_names():
    """GPT-2's name for each byte, in the order of the bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(others)) for byte in range(256)]


def write_vocabulary(writer, size):
    """Every byte a token, and names that nobody types for the rest: enough for a server to make text of tokens."""
    import gguf

    names = byte_names() + [f"<{index}>" for index in range(256, size)]
    kinds = [gguf.TokenType.NORMAL] * 256 + [gguf.TokenType.UNUSED] * (size - 256)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(names)
    writer.add_token_types(kinds)
    writer.add_token_merges([f"{names[97]} {names[98]}"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(False)


def random_blocks(random, kind, shape):
    """Random codes with scales such that weights deviate by about 0.02."""
    import gguf
    import numpy

    block, size = gguf.GGML_QUANT_SIZES[kind]
    count = int(numpy.prod(shape)) // block
    if shape[-1] % block:
        raise SystemExit(f"rows of {shape[-1]} are no whole blocks of {kind.name}: use other widths (--hf-overrides)")
    blocks = random.integers(0, 256, (count, size), dtype=numpy.uint8)

    def half(at, value):
        blocks[:, at : at + 2] = numpy.frombuffer(numpy.float16(value).tobytes(), dtype=numpy.uint8)

    if kind.name == "Q4_K":
        half(0, 9e-5)
        half(2, 6.7e-4)
        # Scales and minima from 32 to 63.
        blocks[:, 4:12] |= 0xA0
        blocks[:, 12:16] |= 0x88
    elif kind.name == "Q6_K":
        half(208, 5.4e-5)
        blocks[:, 192:208] = 16 + blocks[:, 192:208] % 8
    elif kind.name == "Q8_0":
        half(0, 2.7e-4)
    elif kind.name == "Q4_0":
        half(0, 4.3e-3)
    else:
        blocks[:, 0] = 120
    return blocks.reshape(*shape[:-1], shape[-1] // block * size)


def mixed(name, dtype, layers):
    """The format of a matrix: of q4_k_m more bits for the output, and in some layers for values and down maps."""
    if dtype != "q4_k_m":
        return {**DTYPES, **QUANTISED}[dtype]
    layer = int(name.split(".")[1]) if name.startswith("blk.") else 0
    more = layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
    better = name == "output" or (more and any(part in name for part in ("attn_v", "ffn_down")))
    return "Q6_K" if better else "Q4_K"


class Tensors:
    """Random tensors of a model, and the keys that all families have."""

    def __init__(self, writer, config, dtype, experts, shared_width=0):
        import numpy

        self.writer, self.config, self.dtype = writer, config, dtype
        self.experts, self.shared_width = experts, shared_width
        self.random = numpy.random.default_rng(1)
        writer.add_vocab_size(config["vocab_size"])
        write_vocabulary(writer, config["vocab_size"])
        writer.add_context_length(config["max_position_embeddings"])
        writer.add_embedding_length(config["hidden_size"])
        writer.add_block_count(config["num_hidden_layers"])
        writer.add_head_count(config["num_attention_heads"])
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config["num_experts_per_tok"])
        self.matrix("token_embd", config["vocab_size"], config["hidden_size"])
        self.matrix("output", config["vocab_size"], config["hidden_size"])
        self.plain("output_norm", config["hidden_size"])

    def matrix(self, name, *shape):
        import gguf
        import numpy

        kind = gguf.GGMLQuantizationType[mixed(name, self.dtype, self.config["num_hidden_layers"])]
        if self.dtype in QUANTISED:
            if shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
                kind = gguf.GGMLQuantizationType.Q8_0
            return self.writer.add_tensor(f"{name}.weight", random_blocks(self.random, kind, shape), raw_dtype=kind)
        numbers = self.random.standard_normal(shape, dtype=numpy.float32) * numpy.float32(0.02)
        self.writer.add_tensor(f"{name}.weight", gguf.quants.quantize(numbers, kind), raw_dtype=kind)

    def plain(self, name, *shape, middle=1.0, part="weight"):
        import numpy

        numbers = self.random.random(shape, dtype=numpy.float32) * numpy.float32(0.1) + numpy.float32(middle)
        self.writer.add_tensor(f"{name}.{part}" if part else name, numbers)

    def router(self, name, *shape):
        import numpy

        self.writer.add_tensor(f"{name}.weight", self.random.standard_normal(shape, dtype=numpy.float32) * numpy.float32(0.02))

    def grouped_attention(self, at, width, gate=1):
        """Maps of attention in groups of heads; `gate` is how many times as many rows those of queries have."""
        hidden, heads = self.config["hidden_size"], self.config["num_attention_heads"]
        kv_heads = self.config["num_key_value_heads"]
        self.matrix(at + "attn_q", gate * heads * width, hidden)
        self.matrix(at + "attn_k", kv_heads * width, hidden)
        self.matrix(at + "attn_v", kv_heads * width, hidden)
        self.matrix(at + "attn_output", hidden, heads * width)

    def mlp(self, at, end, width, *experts):
        for part in ("gate", "up"):
            self.matrix(f"{at}ffn_{part}{end}", *experts, width, self.config["hidden_size"])
        self.matrix(f"{at}ffn_down{end}", *experts, self.config["hidden_size"], width)

    def expert_layer(self, at, inner):
        self.router(at + "ffn_gate_inp", self.experts, self.config["hidden_size"])
        self.mlp(at, "_exps", inner, self.experts)
        if self.shared_width:
            self.mlp(at, "_shexp", self.shared_width)


def write_qwen3moe(writer, config, dtype, _):
    width = config["head_dim"]
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(width)
    writer.add_value_length(width)
    tensors = Tensors(writer, config, dtype, config["num_experts"])
    for layer in range(config["num_hidden_layers"]):
        at = f"blk.{layer}."
        tensors.plain(at + "attn_norm", config["hidden_size"])
        tensors.plain(at + "ffn_norm", config["hidden_size"])
        tensors.grouped_attention(at, width)
        tensors.plain(at + "attn_q_norm", width)
        tensors.plain(at + "attn_k_norm", width)
        tensors.expert_layer(at, config["moe_intermediate_size"])


def write_deepseek2(writer, config, dtype, whole):
    import gguf

    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    rank, rope = config["kv_lora_rank"], config["qk_rope_head_dim"]
    nope, value = config["qk_nope_head_dim"], config["v_head_dim"]
    shared, dense, inner = config["n_shared_experts"], config["first_k_dense_replace"], config["moe_intermediate_size"]
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_expert_feed_forward_length(inner)
    writer.add_head_count_kv(heads if whole else 1)
    writer.add_q_lora_rank(config["q_lora_rank"])
    writer.add_kv_lora_rank(rank)
    writer.add_key_length(nope + rope if whole else rank + rope)
    writer.add_value_length(value if whole else rank)
    if not whole:
        writer.add_key_length_mla(nope + rope)
        writer.add_value_length_mla(value)
    writer.add_rope_dimension_count(rope)
    writer.add_leading_dense_block_count(dense)
    writer.add_expert_shared_count(shared)
    writer.add_expert_weights_scale(config["routed_scaling_factor"])
    writer.add_expert_weights_norm(config["norm_topk_prob"])
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SOFTMAX)
    tensors = Tensors(writer, config, dtype, config["n_routed_experts"], shared * inner)
    for layer in range(config["num_hidden_layers"]):
        at = f"blk.{layer}."
        tensors.plain(at + "attn_norm", hidden)
        tensors.plain(at + "ffn_norm", hidden)
        tensors.matrix(at + "attn_q_a", config["q_lora_rank"], hidden)
        tensors.plain(at + "attn_q_a_norm", config["q_lora_rank"])
        tensors.matrix(at + "attn_q_b", heads * (nope + rope), config["q_lora_rank"])
        tensors.matrix(at + "attn_kv_a_mqa", rank + rope, hidden)
        tensors.plain(at + "attn_kv_a_norm", rank)
        if whole:
            tensors.matrix(at + "attn_kv_b", heads * (nope + value), rank)
        else:
            tensors.matrix(at + "attn_k_b", heads, rank, nope)
            tensors.matrix(at + "attn_v_b", heads, value, rank)
        tensors.matrix(at + "attn_output", hidden, heads * value)
        if layer < dense:
            tensors.mlp(at, "", config["intermediate_size"])
        else:
            tensors.expert_layer(at, inner)


def write_gpt_oss(writer, config, dtype, _):
    import gguf

    hidden, heads, width = config["hidden_size"], config["num_attention_heads"], config["head_dim"]
    kv_heads, experts, inner = config["num_key_value_heads"], config["num_local_experts"], config["intermediate_size"]
    scaling = config["rope_scaling"]
    writer.add_feed_forward_length(inner)
    writer.add_expert_feed_forward_length(inner)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_sliding_window(config["sliding_window"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(scaling["factor"])
    writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
    tensors = Tensors(writer, config, dtype, experts)
    for layer in range(config["num_hidden_layers"]):
        at = f"blk.{layer}."
        tensors.plain(at + "attn_norm", hidden)
        tensors.plain(at + "post_attention_norm", hidden)
        tensors.grouped_attention(at, width)
        for name, rows in [("q", heads), ("k", kv_heads), ("v", kv_heads)]:
            tensors.plain(f"{at}attn_{name}", rows * width, middle=0, part="bias")
        tensors.plain(at + "attn_output", hidden, middle=0, part="bias")
        tensors.plain(at + "attn_sinks", heads)
        tensors.expert_layer(at, inner)
        tensors.plain(at + "ffn_gate_inp", experts, middle=0, part="bias")
        for name, rows in [("gate", inner), ("up", inner), ("down", hidden)]:
            tensors.plain(f"{at}ffn_{name}_exps", experts, rows, middle=0, part="bias")


def write_qwen35moe(writer, config, dtype, _):
    hidden, width = config["hidden_size"], config["head_dim"]
    state, keys, values = (config[f"linear_{name}"] for name in ("value_head_dim", "num_key_heads", "num_value_heads"))
    rope, every = config["rope_parameters"], config["full_attention_interval"]
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_shared_feed_forward_length(config["shared_expert_intermediate_size"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(int(width * rope["partial_rotary_factor"]))
    writer.add_rope_dimension_sections([*rope["mrope_section"], 0])
    writer.add_full_attention_interval(every)
    writer.add_ssm_conv_kernel(config["linear_conv_kernel_dim"])
    writer.add_ssm_state_size(config["linear_key_head_dim"])
    writer.add_ssm_group_count(keys)
    writer.add_ssm_time_step_rank(values)
    writer.add_ssm_inner_size(state * values)
    tensors = Tensors(writer, config, dtype, config["num_experts"], config["shared_expert_intermediate_size"])
    channels = (2 * keys + values) * state
    for layer in range(config["num_hidden_layers"]):
        at = f"blk.{layer}."
        tensors.plain(at + "attn_norm", hidden)
        tensors.plain(at + "post_attention_norm", hidden)
        if (layer + 1) % every == 0:
            tensors.grouped_attention(at, width, gate=2)
            tensors.plain(at + "attn_q_norm", width)
            tensors.plain(at + "attn_k_norm", width)
        else:
            tensors.matrix(at + "attn_qkv", channels, hidden)
            tensors.matrix(at + "attn_gate", values * state, hidden)
            tensors.plain(at + "ssm_conv1d", channels, config["linear_conv_kernel_dim"], middle=0)
            tensors.plain(at + "ssm_dt", values, middle=-3, part="bias")
            tensors.plain(at + "ssm_a", values, middle=-1, part="")
            tensors.matrix(at + "ssm_beta", values, hidden)
            tensors.matrix(at + "ssm_alpha", values, hidden)
            tensors.plain(at + "ssm_norm", state)
            tensors.matrix(at + "ssm_out", hidden, values * state)
        tensors.expert_layer(at, config["moe_intermediate_size"])
        tensors.plain(at + "ffn_gate_inp_shexp", hidden, middle=0)


FAMILIES = {
    "qwen3_moe": ("qwen3moe", write_qwen3moe),
    "deepseek_v2": ("deepseek2", write_deepseek2),
    "gpt_oss": ("gpt-oss", write_gpt_oss),
    "qwen3_5_moe": ("qwen35moe", write_qwen35moe),
}


def write_gguf(config, dtype, path, whole=False):
    """The configuration's shapes with random weights, as llama.cpp's own converter lays them out. Latent attention's map to
    keys and values is cut in two there; `whole` leaves it in one, as ik_llama.cpp wants it."""
    import gguf

    partial = path.with_suffix(".partial")
    name, write = FAMILIES[config["model_type"]]
    writer = gguf.GGUFWriter(partial, name)
    write(writer, config.get("text_config", config), dtype, whole)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(partial, path)


def run(command, errors=subprocess.PIPE):
    """What a program prints. It runs in a folder of its own, where it may leave a log."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=errors, text=True, check=False, cwd=folder)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\nended with {done.returncode}:\n{done.stderr or done.stdout}")
    return done.stdout


def time_llama(folder, model, threads, flags):
    """Tokens a second of prefill, and of decode of one and of eight sequences: the median of the programs' repeats."""
    common = ["-m", model, "-t", str(threads)]
    command = [folder / "llama-bench", *common, *flags, "-p", str(PROMPT), "-n", str(NEW), "-r", "3", "-o", "json"]
    rate = {bool(row["n_prompt"]): statistics.median(row["samples_ts"]) for row in json.loads(run(command))}
    # The other program has switches where llama-bench wants 0 or 1, and may print its table where errors go.
    switches = [flag for flag in flags if flag != "1"]
    command = [folder / "llama-batched-bench", *common, *switches, "-c", "2048", "-npp", "1", "-ntg", str(NEW), "-npl",
               ",".join([str(SEQUENCES)] * 3)]
    lines = run(command, errors=subprocess.STDOUT).splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    eight = statistics.median(float(row[rows[0].index("S_TG t/s")]) for row in rows[2:])
    return [rate[True], rate[False], eight]


def time_epsmoe(program, model, dtype, threads):
    """Likewise. A prompt of one token is what a sequence that is generated from nothing begins with."""

    def rate(sequences, prompt, new, steps_tokens):
        with tempfile.TemporaryDirectory() as folder:
            out = os.path.join(folder, "bench.json")
            run([program, "bench", *model, "--dtype", dtype, "--data-parallel-size", "1",
                 "--threads", str(threads), "--contender", "auto", "--batch-size", str(sequences), "--input-len", str(prompt),
                 "--output-len", str(new), "--num-iters", "3", "--json", out])
            with open(out) as file:
                counted = json.load(file)["rows"][0]["tokens_per_second"]
        # The program counts prompt and new tokens; a prompt's last token makes the first new one.
        return counted * steps_tokens / (prompt + new)

    return [rate(1, PROMPT, 1, PROMPT), rate(1, 1, NEW, NEW), rate(SEQUENCES, 1, NEW, NEW)]


def summary(turns):
    """Medians of each program, and the ratio of the same turns."""
    key = lambda turn: (turn["preset"], turn["dtype"], turn.get("peer_dtype", turn["dtype"]), turn["threads"])
    for preset, dtype, peer_dtype, threads in sorted({key(turn) for turn in turns}):
        ours = [turn for turn in turns if key(turn) == (preset, dtype, peer_dtype, threads)]
        print(f"{preset} {dtype}, peers {peer_dtype}, {threads} threads, {len(ours)} turns, tokens/s")
        for at, phase in enumerate(PHASES):
            median = lambda name: statistics.median(turn["rates"][name][at] for turn in ours)
            text = f"  {phase:24} epsmoe {median('epsmoe'):8.1f}"
            for peer in ours[0]["rates"]:
                if peer != "epsmoe":
                    ratios = [turn["rates"]["epsmoe"][at] / turn["rates"][peer][at] for turn in ours]
                    text += f" | {peer} {median(peer):8.1f}, ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            print(text, flush=True)


def add_peers(parser):
    """Options that say whom to measure, and with which weights."""
    path = lambda text: pathlib.Path(text).resolve()
    parser.add_argument("--llama-cpp", type=path, metavar="DIR", help="programs of llama.cpp")
    parser.add_argument("--ik-llama-cpp", type=path, metavar="DIR", help="programs of ik_llama.cpp")
    parser.add_argument("--epsmoe", required=True, type=path)
    parser.add_argument("--gguf", type=path, default="gguf", help="folder of the GGUF files")
    parser.add_argument("--dtype", action="append", choices=["bfloat16", "float32"], help="default: bfloat16")
    parser.add_argument("--hf-overrides", type=json.loads, default={}, metavar="JSON", help="other values of a preset")
    parser.add_argument("--peer-dtype", choices=[*DTYPES, *QUANTISED], help="what peers hold weights in, if it is not the same: float16"
                        " has as many bytes as bfloat16, and they are faster with it where the processor has no bf16 products")
    parser.add_argument("--json", type=pathlib.Path, help="turns are added to those already there")


def merged(config, overrides):
    """Other values in the place of some, as epsmoe's --hf-overrides has it."""
    new = {key: merged(config[key], value) if isinstance(value, dict) and key in config else value for key, value in overrides.items()}
    return config | new


def models_of(options, preset, config, dtype):
    """The GGUF of each peer that takes part; what is not there is written."""
    dtype = options.peer_dtype or dtype
    options.gguf.mkdir(parents=True, exist_ok=True)
    models = {}
    for name in (name for name, programs in options.peers.items() if programs):
        whole = name == "ik_llama.cpp" and "kv_lora_rank" in config
        other = "-" + hashlib.sha256(json.dumps(config).encode()).hexdigest()[:8] if options.hf_overrides else ""
        models[name] = options.gguf / f"{preset}{other}-{dtype}{'-whole' if whole else ''}.gguf"
        if not models[name].exists():
            write_gguf(config, dtype, models[name], whole)
    return models


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="*", metavar="PRESET", help="default: " + " ".join(DEFAULT))
    add_peers(parser)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--threads", type=int, action="append", help="default: all cores")
    options = parser.parse_args()
    options.peers = {"llama.cpp": options.llama_cpp, "ik_llama.cpp": options.ik_llama_cpp}
    turns = json.loads(options.json.read_text()) if options.json and options.json.exists() else []
    for preset in options.presets or DEFAULT:
        config = merged(json.loads((PRESETS / f"{preset}.json").read_text()), options.hf_overrides)
        for dtype in options.dtype or ["bfloat16"]:
            models = models_of(options, preset, config, dtype)
            for _ in range(options.rounds):
                for threads in options.threads or [os.cpu_count()]:
                    own = ["--model", f"preset:{preset}", "--hf-overrides", json.dumps(options.hf_overrides)]
                    rates = {"epsmoe": time_epsmoe(options.epsmoe, own, dtype, threads)}
                    if options.peer_dtype in QUANTISED and config["model_type"] not in WITHOUT_GGUF:
                        file = ["--model", str(next(iter(models.values())))]
                        rates = {"epsmoe": time_epsmoe(options.epsmoe, file, dtype, threads), "epsmoe bf16": rates["epsmoe"]}
                    for name, model in models.items():
                        rates[name] = time_llama(options.peers[name], model, threads, FLAGS[name])
                    turn = {"preset": preset, "dtype": dtype, "threads": threads, "load": os.getloadavg(), "rates": rates}
                    if options.peer_dtype:
                        turn["peer_dtype"] = options.peer_dtype
                    turns.append(turn)
                    if options.json:
                        options.json.write_text(json.dumps(turns, indent=1) + "\n")
    summary(turns)


if __name__ == "__main__":
    main()
