// Keys and values cached in codes.
#include "attention_gqa.cuh"

GROUPED(e4m3, 64)
GROUPED(e4m3, 128)
