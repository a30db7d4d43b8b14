//! GGUF files: their tensors against a plain oracle, their metadata as a configuration and a vocabulary, and what is
//! refused in which words.
#![expect(clippy::unwrap_used, reason = "helpers of tests may panic")]

mod support;

use epsmoe_base::Mix;
use epsmoe_quant::gguf::{Gguf, TokenKind};
use epsmoe_quant::{CodedTensor, GgmlType, Hints, QuantError, Rows, StoredTensor, StoredTensors, StoredType};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::path::Path;
use support::gguf::{Builder, kv};

fn read(bytes: &[u8]) -> Result<Gguf, QuantError> {
    Gguf::read(bytes.len() as u64, |into, at| {
        into.copy_from_slice(&bytes[at as usize..][..into.len()]);
        Ok(())
    })
}

/// A file in memory.
struct File {
    header: Gguf,
    bytes: Vec<u8>,
}

impl StoredTensors for File {
    type Error = QuantError;

    fn find(&self, name: &str) -> Option<StoredTensor> {
        self.header.tensors.get(name).map(|tensor| tensor.tensor.clone())
    }

    fn fill(&self, name: &str, first: u64, into: &mut [u8]) -> Result<(), QuantError> {
        let at = (self.header.tensors[name].start + first) as usize;
        into.copy_from_slice(&self.bytes[at..][..into.len()]);
        Ok(())
    }
}

/// All formats, whole and in random parts. The file is oracle.py's.
#[test]
fn blocks_are_what_the_oracle_says() {
    let seed = 5;
    println!("seed {seed}");
    let mut mix = Mix::new(seed);
    let bytes =
        std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/blocks.gguf")).unwrap();
    let file = File { header: read(&bytes).unwrap(), bytes };
    let mut held = BTreeSet::new();
    for format in GgmlType::all() {
        let name = format.to_string().to_lowercase();
        let expected = &file.header.tensors[&format!("{name}.expected")];
        let shape = expected.tensor.shape.clone();
        let mut values = vec![0; expected.bytes as usize];
        file.fill(&format!("{name}.expected"), 0, &mut values).unwrap();
        let expected: Vec<f32> =
            values.as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect();
        let coded =
            CodedTensor::detect(&name, &shape, &Hints::default(), |name| file.find(name)).unwrap().unwrap();
        assert_eq!(coded.coding().to_string(), format!("GGUF {format}"));
        for whole in std::iter::once(true).chain(std::iter::repeat_n(false, 40)) {
            let (first, start) = if whole { (0, 0) } else { (mix.below(shape[0]), mix.below(shape[1])) };
            let rows =
                Rows::range(first..if whole { shape[0] } else { first + 1 + mix.below(shape[0] - first) });
            let columns = start..if whole { shape[1] } else { start + 1 + mix.below(shape[1] - start) };
            let mut weights = vec![f32::NAN; rows.count * columns.len()];
            coded.decode(&file, rows, columns.clone(), &mut weights).unwrap();
            let part = (0..rows.count).flat_map(|i| &expected[rows.at(i) * shape[1]..][columns.clone()]);
            assert!(weights.iter().eq(part), "{format} {rows:?} {columns:?}");
            let Some(codes) = coded.codes(&file, rows, columns.clone()).unwrap() else { continue };
            held.insert(name.clone());
            weights.chunks_exact(columns.len()).enumerate().for_each(|(row, weights)| {
                let mut decoded = vec![f32::NAN; columns.len()];
                codes.decode(row, &mut decoded);
                assert_eq!(decoded, weights, "codes of {format} {rows:?} {columns:?}");
            });
        }
    }
    assert!(
        held.iter().map(String::as_str).eq(["mxfp4", "q4_0", "q4_k", "q5_k", "q6_k", "q8_0"]),
        "{held:?}"
    );
}

#[test]
fn tensors_are_where_the_table_says() {
    let file = Builder::new("qwen3moe")
        .tensor("a", 0, &[2, 3], &[1; 24])
        .tensor("b", 8, &[64], &[7; 68])
        .tensor("c", 30, &[4, 2, 8], &[3; 128])
        .bytes();
    let header = read(&file).unwrap();
    let shapes: Vec<_> = header.tensors.values().map(|tensor| tensor.tensor.shape.clone()).collect();
    assert_eq!(shapes, [vec![3, 2], vec![64], vec![8, 2, 4]], "slowest dimension first");
    assert_eq!(header.tensors["b"].tensor.dtype, StoredType::Ggml(GgmlType::Q8_0));
    for (name, byte) in [("a", 1), ("b", 7), ("c", 3)] {
        let tensor = &header.tensors[name];
        assert!(file[tensor.start as usize..][..tensor.bytes as usize].iter().all(|&b| b == byte), "{name}");
    }
}

fn refused(file: &[u8]) -> String {
    read(file).unwrap_err().to_string()
}

#[test]
fn headers_that_lie_are_refused_with_the_numbers_that_disagree() {
    const MEND: &str = "; the file is damaged or incomplete: fetch it again";
    let good = || Builder::new("qwen3moe").tensor("a", 0, &[4], &[0; 16]).tensor("b", 0, &[4], &[0; 16]);
    assert!(read(&good().bytes()).is_ok());
    let cases: Vec<(Builder, &str)> = vec![
        (good().count_tensors(1 << 40), "it claims 1099511627776 tensors, of at most 1048576"),
        (good().count_keys(1 << 40), "it claims 1099511627776 keys, of at most 65536"),
        (good().tensor("a", 0, &[4], &[0; 16]), "tensor `a` is there twice"),
        (good().key(kv::text("general.architecture", "x")), "key `general.architecture` is there twice"),
        (
            good().tensor("c", 0, &[1 << 40, 1 << 40], &[]),
            "tensor `c` of F32 has the impossible shape [1099511627776, 1099511627776]",
        ),
        (good().tensor("c", 0, &[4], &[0; 8]), "tensor `c` ends at byte 272, but the file has 264"),
        (good().tensor("c", 8, &[33], &[0; 64]), "tensor `c` of Q8_0 has the impossible shape [33]"),
        (good().tensor("c", 0, &[1, 1, 1, 1, 1], &[0; 4]), "tensor `c` has 5 dimensions, of at most 4"),
        (good().tensor_at("c", 0, &[4], 8), "tensor `c` starts at byte 8, which is no multiple of 32"),
        (
            good().tensor_at("c", 0, &[4], 0),
            "tensor `c` overlaps the one before it: it starts at byte 192, before 208",
        ),
        (
            good().tensor_at("c", 0, &[4], u64::MAX - 31),
            "tensor `c` starts at byte 18446744073709551584, far beyond any file",
        ),
        (good().key(kv::value("k", 77, &[])), "`k` has a value of type 77, which is none"),
        (
            good().key(kv::value("k", 8, &(1u64 << 50).to_le_bytes())),
            "k takes 1125899906842624 bytes, but there are",
        ),
        (good().key(kv::list("k", 4, 1 << 50, &[])), "`k` claims 1125899906842624 items, of at most"),
        (good().key(kv::list("k", 8, 1, &[2, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xfe])), "k is not UTF-8"),
        (good().key(kv::nested("k", 9)), "`k` has lists within 3 lists"),
        (
            good().key(kv::whole("general.alignment", 0)),
            "`general.alignment` is 0, which is no power of two that fits",
        ),
        (good().key(kv::value("k", 6, &f32::NAN.to_le_bytes())), "`k` is NaN, which is no number"),
        (good().key(kv::value("k", 12, &f64::INFINITY.to_le_bytes())), "`k` is inf, which is no number"),
        (good().key(kv::text("general.alignment", "x")), "`general.alignment` is not a whole number"),
    ];
    for (file, problem) in cases {
        let message = refused(&file.bytes());
        assert!(message.starts_with(problem) && message.ends_with(MEND), "{message}\n{problem}");
    }
    assert_eq!(refused(b"GGML\x03\0\0\0"), "this is not a GGUF file; fetch it again");
    assert_eq!(
        refused(&good().version(1).bytes()),
        "its version is 1, of which 2 and 3 are read (little-endian); convert the model again"
    );
    assert_eq!(
        refused(&good().tensor("c", 16, &[256], &[0; 66]).bytes()),
        "tensor `c` is IQ2_XXS, which is not read; use a file whose tensors are F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, \
         Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS, MXFP4"
    );
}

/// Every format with fewer blocks than its shape needs, rows of no whole blocks, and scales that are no numbers.
#[test]
fn blocks_that_lie_are_refused() {
    for format in GgmlType::all() {
        let (number, block, bytes) = (format.number(), format.block() as u64, format.block_bytes());
        let of = |dimensions: &[u64], bytes: &[u8]| {
            Builder::new("qwen3moe").tensor("a", number, dimensions, bytes).bytes()
        };
        assert!(read(&of(&[block, 2], &vec![0; 2 * bytes])).is_ok(), "{format}");
        for (dimensions, data, problem) in [
            (vec![block, 64], bytes, "ends at byte"),
            (vec![block - 1], bytes, "has the impossible shape"),
            (vec![block + 1, 4], 8 * bytes, "has the impossible shape"),
            (vec![block, 1 << 50], bytes, "ends at byte"),
            (vec![u64::MAX, u64::MAX, u64::MAX, u64::MAX], 0, "has the impossible shape"),
        ] {
            let message = refused(&of(&dimensions, &vec![0; data]));
            assert!(
                message.contains("tensor `a`") && message.contains(problem),
                "{format} {dimensions:?}: {message}"
            );
        }
        // All bits set are NaN in every kind of scale; what is read whole is refused decoded and in codes.
        let file = of(&[block, 2], &vec![0xff; 2 * bytes]);
        let file = File { header: read(&file).unwrap(), bytes: file };
        let shape = [2, block as usize];
        let coded =
            CodedTensor::detect("a", &shape, &Hints::default(), |name| file.find(name)).unwrap().unwrap();
        let mut weights = vec![0.0f32; shape[0] * shape[1]];
        let decoded = coded.decode(&file, Rows::range(0..2), 0..shape[1], &mut weights);
        let message = decoded.unwrap_err().to_string();
        assert!(message.contains("tensor `a`: row 0, column 0 is"), "{format}: {message}");
        if let Ok(Some(_)) = coded.codes(&file, Rows::range(0..2), 0..shape[1]) {
            panic!("{format}: scales of NaN are held");
        }
    }
}

#[test]
fn a_file_cut_anywhere_is_refused() {
    let file = Builder::new("qwen3moe")
        .key(kv::texts("tokenizer.ggml.tokens", &["a", "b"]))
        .tensor("a", 0, &[4], &[0; 16])
        .bytes();
    let end = read(&file).unwrap().tensors["a"].start + 16;
    for length in 0..end as usize {
        let message = refused(&file[..length]);
        assert!(message.contains("the file"), "{length}: {message}");
    }
}

fn tokens(builder: Builder) -> Builder {
    builder
        .key(kv::texts("tokenizer.ggml.tokens", &["<s>", "</s>", "<end>", "a", "b", "ab"]))
        .key(kv::whole("tokenizer.ggml.bos_token_id", 0))
        .key(kv::whole("tokenizer.ggml.eos_token_id", 1))
        .key(kv::whole("tokenizer.ggml.eot_token_id", 2))
        .tensor("token_embd.weight", 0, &[16, 6], &[0; 384])
        .tensor("output.weight", 0, &[16, 6], &[0; 384])
}

/// Keys of an architecture: whole numbers, then others.
fn model(architecture: &str, whole: &[(&str, u32)], numbers: &[(&str, f32)]) -> Builder {
    let common = [
        ("embedding_length", 16),
        ("block_count", 2),
        ("context_length", 4096),
        ("attention.head_count", 4),
        ("expert_count", 8),
        ("expert_used_count", 2),
    ];
    let mut builder = tokens(Builder::new(architecture));
    for (key, value) in common.iter().chain(whole) {
        builder = builder.key(kv::whole(&format!("{architecture}.{key}"), *value));
    }
    for (key, value) in numbers {
        builder = builder.key(kv::number(&format!("{architecture}.{key}"), *value));
    }
    builder
}

fn config(builder: Builder) -> Value {
    Value::Object(read(&builder.bytes()).unwrap().config().unwrap())
}

/// `config` has all keys of `expected` with their values.
fn has(config: &Value, expected: Value) {
    for (key, value) in expected.as_object().unwrap() {
        assert_eq!(&config[key], value, "{key} in {config:#}");
    }
}

#[test]
fn qwen3_becomes_its_config() {
    let builder = model(
        "qwen3moe",
        &[
            ("feed_forward_length", 48),
            ("expert_feed_forward_length", 24),
            ("attention.head_count_kv", 2),
            ("attention.key_length", 32),
        ],
        &[("attention.layer_norm_rms_epsilon", 1e-6), ("rope.freq_base", 1e6)],
    );
    let config = config(builder);
    has(
        &config,
        json!({
            "architectures": ["Qwen3MoeForCausalLM"], "dtype": "bfloat16", "vocab_size": 6, "hidden_size": 16,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
            "intermediate_size": 48, "moe_intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 2,
            "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "norm_topk_prob": true,
            "tie_word_embeddings": false, "attention_bias": false, "bos_token_id": 0, "eos_token_id": [1, 2],
        }),
    );
    assert_eq!(config.get("rope_scaling"), None);
}

#[test]
fn mixtral_is_a_llama_whose_rows_are_rotated_in_pairs() {
    let keys = [("feed_forward_length", 48), ("attention.head_count_kv", 2)];
    let config = config(model("llama", &keys, &[("attention.layer_norm_rms_epsilon", 1e-5)]));
    has(
        &config,
        json!({
            "architectures": ["MixtralForCausalLM"], "rope_interleave": true, "intermediate_size": 48, "head_dim": 4,
            "rope_theta": 10_000.0, "rms_norm_eps": 1e-5,
        }),
    );
    let dense = Builder::new("llama").bytes();
    let message = read(&dense).unwrap().config().unwrap_err().to_string();
    assert!(message.starts_with("it is a llama without experts"), "{message}");
}

#[test]
fn deepseek_is_v2_or_v3_by_its_gate() {
    let keys = [
        ("feed_forward_length", 48),
        ("expert_feed_forward_length", 24),
        ("expert_shared_count", 2),
        ("leading_dense_block_count", 1),
        ("attention.kv_lora_rank", 8),
        ("attention.key_length_mla", 12),
        ("attention.value_length_mla", 6),
        ("attention.key_length", 576),
        ("attention.value_length", 512),
        ("rope.dimension_count", 4),
        ("rope.scaling.original_context_length", 64),
    ];
    let numbers = [
        ("rope.scaling.factor", 40.0),
        ("rope.scaling.yarn_log_multiplier", 0.0707),
        ("expert_weights_scale", 2.5),
    ];
    let build = |gate| {
        let builder =
            model("deepseek2", &keys, &numbers).key(kv::text("deepseek2.rope.scaling.type", "yarn"));
        builder.key(kv::whole("deepseek2.expert_gating_func", gate))
    };
    has(
        &config(build(1)),
        json!({
            "architectures": ["DeepseekV2ForCausalLM"], "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6,
            "kv_lora_rank": 8, "q_lora_rank": null, "n_shared_experts": 2, "first_k_dense_replace": 1,
            "routed_scaling_factor": 2.5, "topk_method": "greedy", "norm_topk_prob": false,
            "rope_scaling": {
                "rope_type": "yarn", "factor": 40, "original_max_position_embeddings": 64, "mscale": 0.707,
                "mscale_all_dim": 0.707,
            },
        }),
    );
    let grouped = build(2).key(kv::whole("deepseek2.expert_group_count", 4));
    let v3 = config(grouped.key(kv::whole("deepseek2.expert_group_used_count", 2)));
    has(
        &v3,
        json!({
            "architectures": ["DeepseekV3ForCausalLM"], "scoring_func": "sigmoid", "topk_method": "noaux_tc",
            "n_group": 4, "topk_group": 2,
        }),
    );
    let message = read(&build(4).bytes()).unwrap().config().unwrap_err().to_string();
    assert!(message.starts_with("`deepseek2.expert_gating_func` is 4"), "{message}");
}

#[test]
fn the_other_architectures_become_their_configs() {
    let qwen2 = model(
        "qwen2moe",
        &[("feed_forward_length", 48), ("expert_shared_feed_forward_length", 40)],
        &[("attention.layer_norm_rms_epsilon", 1e-6)],
    );
    has(
        &config(qwen2.tensor("blk.0.attn_q.bias", 0, &[16], &[0; 64])),
        json!({
            "architectures": ["Qwen2MoeForCausalLM"], "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 40, "qkv_bias": true, "norm_topk_prob": false,
        }),
    );
    let olmoe = model("olmoe", &[("feed_forward_length", 24)], &[]);
    has(&config(olmoe), json!({"architectures": ["OlmoeForCausalLM"], "intermediate_size": 24}));
    let keys = [("feed_forward_length", 24), ("attention.head_count_kv", 2)];
    let numbers =
        [("attention.clamp_kqv", 8.0), ("rope.freq_base", 5e5), ("attention.layer_norm_epsilon", 1e-5)];
    has(
        &config(model("dbrx", &keys, &numbers)),
        json!({
            "architectures": ["DbrxForCausalLM"], "rms_norm_eps": 1e-5,
            "attn_config": {"kv_n_heads": 2, "rope_theta": 5e5, "clip_qkv": 8.0},
            "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 8, "moe_top_k": 2},
        }),
    );
    let keys = [("expert_feed_forward_length", 24), ("attention.sliding_window", 128)];
    let oss = model("gpt-oss", &keys, &[("rope.scaling.factor", 32.0)]);
    has(
        &config(oss.key(kv::text("gpt-oss.rope.scaling.type", "yarn"))),
        json!({
            "architectures": ["GptOssForCausalLM"], "intermediate_size": 24, "num_local_experts": 8,
            "sliding_window": 128, "layer_types": ["sliding_attention", "full_attention"],
            "rope_scaling": {
                "rope_type": "yarn", "factor": 32, "truncate": false, "beta_fast": 32.0, "beta_slow": 1.0
            },
        }),
    );
    let message = read(&Builder::new("mamba").bytes()).unwrap().config().unwrap_err().to_string();
    assert!(message.starts_with("architecture `mamba` is not supported in GGUF"), "{message}");
    let missing = read(&tokens(Builder::new("qwen3moe")).bytes()).unwrap().config().unwrap_err().to_string();
    assert_eq!(missing, "`qwen3moe.embedding_length` is missing; fetch the file again");
}

#[test]
fn a_vocabulary_comes_with_what_is_needed_for_a_tokenizer() {
    let builder = tokens(Builder::new("qwen3moe"))
        .key(kv::text("tokenizer.ggml.model", "gpt2"))
        .key(kv::text("tokenizer.ggml.pre", "qwen2"))
        .key(kv::texts("tokenizer.ggml.merges", &["a b"]))
        .key(kv::list(
            "tokenizer.ggml.token_type",
            5,
            6,
            &[3i32, 3, 4, 1, 6, 5].map(i32::to_le_bytes).concat(),
        ))
        .key(kv::whole("tokenizer.ggml.padding_token_id", u32::MAX))
        .key(kv::flag("tokenizer.ggml.add_bos_token", true))
        .key(kv::text("tokenizer.chat_template", "{{ messages }}"));
    let tokenizer = read(&builder.bytes()).unwrap().tokenizer().unwrap().unwrap();
    assert_eq!((tokenizer.model.as_str(), tokenizer.split.as_deref()), ("gpt2", Some("qwen2")));
    assert_eq!((tokenizer.tokens.len(), tokenizer.merges.as_slice()), (6, &["a b".to_owned()][..]));
    use TokenKind::*;
    assert_eq!(tokenizer.kinds, [Control, Control, UserDefined, Normal, Byte, Unused]);
    assert_eq!((tokenizer.bos, tokenizer.eos, tokenizer.ends), (Some(0), Some(1), vec![1, 2]));
    assert_eq!((tokenizer.padding, tokenizer.add_bos, tokenizer.add_eos), (None, Some(true), None));
    assert_eq!(tokenizer.chat_template.as_deref(), Some("{{ messages }}"));

    let wrong = |builder: Builder| read(&builder.bytes()).unwrap().tokenizer().unwrap_err().to_string();
    let short = tokens(Builder::new("x")).key(kv::list("tokenizer.ggml.scores", 6, 1, &[0; 4]));
    assert!(wrong(short).starts_with("`tokenizer.ggml.scores` has 1 items for 6 tokens"));
    let beyond = tokens(Builder::new("x")).key(kv::whole("tokenizer.ggml.padding_token_id", 6));
    assert!(wrong(beyond).starts_with("`tokenizer.ggml.padding_token_id` is 6, but there are 6 tokens"));
    assert_eq!(read(&Builder::new("x").bytes()).unwrap().tokenizer(), Ok(None));
}
