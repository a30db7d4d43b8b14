// Keys and values cached in bf16.
#include "attention_few.cuh"

SCORES(bf16)
SUMS(bf16)
