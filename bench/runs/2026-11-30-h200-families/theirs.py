"""theirs.py FOLDER: prefill and decode of a model of random weights by transformers on the first GPU, from FOLDER/config.json; medians."""
import sys, time, statistics, json, torch, transformers
from transformers import AutoConfig, AutoModelForCausalLM
name = sys.argv[1]
begun = time.time()
config = AutoConfig.from_pretrained(name)
torch.set_default_dtype(torch.bfloat16)
with torch.device("cuda"):
    try:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    except Exception as error:
        print("first try:", str(error)[:300]); config = getattr(config, "text_config", config)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
model.eval()
text = getattr(config, "text_config", config)
n = sum(p.numel() for p in model.parameters())
print(f"{name}: {n/1e9:.2f} G parameters, made in {time.time()-begun:.1f} s, transformers {transformers.__version__}, experts {getattr(text, '_experts_implementation', None)}, attention {text._attn_implementation}", flush=True)
def timed(call, repeats):
    times = []
    for _ in range(repeats + 1):
        torch.cuda.synchronize(); start = time.time(); call(); torch.cuda.synchronize(); times.append(time.time() - start)
    return statistics.median(times[1:])
result = {"model": name}
with torch.no_grad():
    ids = torch.randint(0, text.vocab_size, (8, 1024), device="cuda")
    seconds = timed(lambda: model(ids, logits_to_keep=1, use_cache=True), 3)
    result["prefill_ms"] = seconds * 1e3
    print(f"prefill 8x1024: {seconds*1e3:.1f} ms", flush=True)
    for batch in (1, 32):
        ids = torch.randint(0, text.vocab_size, (batch, 1024), device="cuda")
        out = model(ids[:, :1024], logits_to_keep=1, use_cache=True)
        cache, token = out.past_key_values, ids[:, :1]
        def step():
            model(token, past_key_values=cache, use_cache=True, logits_to_keep=1)
        times = []
        for _ in range(14):
            torch.cuda.synchronize(); start = time.time(); step(); torch.cuda.synchronize(); times.append(time.time() - start)
        result[f"decode{batch}_ms"] = statistics.median(times[4:]) * 1e3
        print(f"decode {batch} x 1024: {result[f'decode{batch}_ms']:.2f} ms a step", flush=True)
        del cache, out
print(json.dumps(result))
