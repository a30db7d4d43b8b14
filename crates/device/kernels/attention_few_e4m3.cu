// Keys and values cached in codes.
#include "attention_few.cuh"

SCORES(e4m3)
SUMS(e4m3)
