// Keys and values cached in bf16; `kernels.rs` repeats widths and steps.
#include "attention_hopper.cuh"

HOPPER(bf16, 64, 64, 4, true)
HOPPER(bf16, 128, 128, 4, true)
HOPPER(bf16, 192, 128, 4, true)
HOPPER(bf16, 256, 256, 2, false)
