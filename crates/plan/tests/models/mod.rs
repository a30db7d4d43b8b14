//! Sizes of published models.

use epsmoe_plan::{AttentionSizes, ModelSizes};

pub(crate) fn deepseek_v2() -> ModelSizes {
    ModelSizes {
        name: "DeepSeek-V2".into(),
        layers: 60,
        dense_layers: 1,
        hidden: 5120,
        vocab: 102_400,
        tied: false,
        attention: AttentionSizes::Mla {
            heads: 128,
            query_rank: 1536,
            latent: 512,
            nope: 128,
            rope: 64,
            value: 128,
        },
        experts: 160,
        top_k: 6,
        groups: Some((8, 3)),
        inner: 1536,
        shared_inner: 3072,
        dense_inner: 12_288,
        residual_inner: 0,
    }
}

pub(crate) fn mixtral() -> ModelSizes {
    ModelSizes {
        name: "Mixtral 8x7B".into(),
        layers: 32,
        dense_layers: 0,
        hidden: 4096,
        vocab: 32_000,
        tied: false,
        attention: AttentionSizes::Gqa { heads: 32, kv_heads: 8, head: 128 },
        experts: 8,
        top_k: 2,
        groups: None,
        inner: 14_336,
        shared_inner: 0,
        dense_inner: 0,
        residual_inner: 0,
    }
}

pub(crate) fn dbrx() -> ModelSizes {
    ModelSizes {
        name: "DBRX".into(),
        layers: 40,
        hidden: 6144,
        vocab: 100_352,
        attention: AttentionSizes::Gqa { heads: 48, kv_heads: 8, head: 128 },
        experts: 16,
        top_k: 4,
        inner: 10_752,
        ..mixtral()
    }
}

/// 512 experts, as wide as DeepSeek-V3's.
pub(crate) fn wide() -> ModelSizes {
    ModelSizes {
        name: "512 experts".into(),
        hidden: 7168,
        experts: 512,
        top_k: 8,
        groups: None,
        inner: 2048,
        shared_inner: 2048,
        ..deepseek_v2()
    }
}
