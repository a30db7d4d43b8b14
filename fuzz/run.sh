#!/bin/sh
# Fuzzes every reader, one after the other: fuzz/run.sh SECONDS_EACH
# Needs a nightly compiler and cargo-fuzz. Corpora begin with the fixtures, and stay in fuzz/corpus.
set -eu
cd "$(dirname "$0")"
fixtures=../fixtures

for name in "$fixtures"/*/; do
    name=$(basename "$name")
    for pair in config:config.json weights_index:model.safetensors.index.json tokenizer_config:tokenizer_config.json \
        chat_template:chat_template.jinja generation_config:generation_config.json; do
        from="$fixtures/$name/${pair#*:}"
        mkdir -p "corpus/${pair%%:*}"
        [ ! -f "$from" ] || cp "$from" "corpus/${pair%%:*}/$name"
    done
done
mkdir -p corpus/tokenizer corpus/safetensors_header
cp "$fixtures/mixtral/tokenizer.json" corpus/tokenizer/mixtral
cp ../crates/text/tests/templates/*.jinja corpus/chat_template
mkdir -p corpus/gguf corpus/quantised corpus/quantisation_config
cp ../crates/quant/tests/golden/*.gguf corpus/gguf
cp ../crates/quant/tests/golden/*.safetensors corpus/quantised
# A header of 56 bytes, and the four bytes that it describes.
printf '\070\0\0\0\0\0\0\0{"a":{"dtype":"F32","shape":[1,1],"data_offsets":[0,4]}}\0\0\0\0' > corpus/safetensors_header/one

for target in tokenizer chat_template tokenizer_config config safetensors_header weights_index generation_config \
    gguf quantised quantisation_config; do
    # In a process of its own that is started again after a finding: finding one must not end the run.
    cargo +nightly fuzz run "$target" "corpus/$target" -- -fork=1 -ignore_crashes=1 -ignore_timeouts=1 -ignore_ooms=1 \
        -rss_limit_mb=2048 -timeout=10 -max_total_time="$1"
done
