// Keys and values cached in codes; `kernels.rs` repeats widths and steps.
#include "attention_hopper.cuh"

HOPPER(e4m3, 64, 64, 4, true)
HOPPER(e4m3, 128, 128, 4, true)
HOPPER(e4m3, 192, 128, 4, true)
HOPPER(e4m3, 256, 256, 2, false)
