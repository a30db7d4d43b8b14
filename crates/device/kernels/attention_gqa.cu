// Keys and values cached in bf16.
#include "attention_gqa.cuh"

GROUPED(bf16, 64)
GROUPED(bf16, 128)
