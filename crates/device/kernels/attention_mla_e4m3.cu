// Latents cached in codes.
#include "attention_mla.cuh"

LATENT(e4m3)
