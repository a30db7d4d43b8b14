"""Whole models with random weights: ours and transformers in turns, prefill of four shapes; then decode of both."""
import json, os, statistics, subprocess, sys, time, torch, transformers
from transformers import AutoConfig, AutoModelForCausalLM
torch.manual_seed(1)
name, preset = sys.argv[1], sys.argv[2]
shapes = [(8, 1024), (2, 4096), (1, 16384), (1, 32768)]
until = time.time() + float(sys.argv[3])
raw = json.load(open(f"{name}.config.json"))
config = AutoConfig.for_model(**{k: v for k, v in raw.items() if k not in ("auto_map", "architectures", "torch_dtype", "dtype")})
config._attn_implementation = "sdpa"
config._experts_implementation = "grouped_mm"
t = time.time()
old = torch.get_default_dtype(); torch.set_default_dtype(torch.bfloat16)
with torch.device("meta"):
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", experts_implementation="grouped_mm")
torch.set_default_dtype(old)
model = model.to_empty(device="cuda")
with torch.no_grad():
    for n, p in model.named_parameters():
        p.normal_(0, 0.02) if p.dim() > 1 else p.fill_(1.0)
    # what is computed at construction was lost on meta: make rotary tables again
    for n, m in model.named_modules():
        if hasattr(m, "inv_freq") and hasattr(m, "config"):
            new = type(m)(config=m.config, device="cuda") 
            for b, v in new.named_buffers(recurse=False): setattr(m, b, v)
        for b, v in m.named_buffers(recurse=False):
            if "bias" in b: v.zero_()
model.eval()
print(f"{name}: transformers {transformers.__version__} sdpa grouped_mm, made in {time.time()-t:.1f} s, {sum(p.numel() for p in model.parameters())/1e9:.2f} G, {torch.cuda.memory_allocated()/2**30:.1f} GiB", flush=True)
vocab = config.vocab_size
def theirs(b, l, n):
    times = []
    for i in range(n + 1):
        ids = torch.randint(0, vocab, (b, l), device="cuda")
        torch.cuda.synchronize(); s = time.perf_counter()
        with torch.no_grad(): model(input_ids=ids, use_cache=True, logits_to_keep=1)
        torch.cuda.synchronize(); times.append(time.perf_counter() - s)
    return statistics.median(times[1:]) * 1e3
def ours(b, l, out=1, n=5):
    j = f"ours-{b}-{l}-{out}.json"
    cmd = ["./epsmoe", "bench", "--device", "cuda", "-dp", "1", "--schedule", "serial", "--dtype", "bfloat16", "--model", f"preset:{preset}", "--batch-size", str(b), "--input-len", str(l), "--output-len", str(out), "--num-iters", str(n), "--max-num-batched-tokens", str(max(8192, min(32768, b*l))), "--gpu-memory-utilization", "0.95", "--json", j]
    r = subprocess.run(cmd, capture_output=True, text=True, timeout=90)
    open(f"out/ours-{name}-{b}-{l}-{out}.txt", "w").write(" ".join(cmd) + "\n" + r.stdout + r.stderr[-2000:])
    if r.returncode: return None
    return json.load(open(j))
def figure(d):
    rows = d["rows"] if "rows" in d else [d]
    return rows[0]
table = []
for b, l in shapes:
    if time.time() > until: print("out of time"); break
    t1 = None
    try: t1 = theirs(b, l, 3)
    except Exception as e: print("theirs:", b, l, str(e)[:200]); torch.cuda.empty_cache()
    torch.cuda.empty_cache()
    o = ours(b, l)
    try: t2 = theirs(b, l, 3)
    except Exception as e: t2 = None
    torch.cuda.empty_cache()
    print(b, l, "theirs", t1, t2, "ours", json.dumps(figure(o))[:600] if o else "failed", flush=True)
def theirs_decode(b, l, n):
    from transformers import DynamicCache
    ids = torch.randint(0, vocab, (b, l), device="cuda")
    with torch.no_grad():
        out = model(input_ids=ids, use_cache=True, logits_to_keep=1); cache = out.past_key_values
        times = []
        for i in range(n):
            torch.cuda.synchronize(); s = time.perf_counter()
            out = model(input_ids=out.logits[:, -1:].argmax(-1), past_key_values=cache, use_cache=True)
            torch.cuda.synchronize(); times.append(time.perf_counter() - s)
    return statistics.median(times[3:]) * 1e3
for b, l, out in [(1, 1024, 65), (32, 1024, 33), (128, 1024, 17), (1, 32768, 33)]:
    if time.time() > until: print("out of time"); break
    o = ours(b, l, out, 3)
    t1 = None
    if b < 128:
        try: t1 = theirs_decode(b, l, 13)
        except Exception as e: print("theirs:", str(e)[:200])
        torch.cuda.empty_cache()
    print("decode", b, l, "theirs", t1, "ours", json.dumps(figure(o))[:900] if o else "failed", flush=True)
if len(sys.argv) > 4:
    s = time.time(); torch.cuda.synchronize()
    try:
        model.save_pretrained(sys.argv[4], max_shard_size="4GB"); print(f"saved in {time.time()-s:.1f} s")
    except Exception as e: print("save:", str(e)[:300])
