// Latents cached in bf16.
#include "attention_mla.cuh"

LATENT(bf16)
