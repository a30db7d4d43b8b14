// The instructions of tensor cores since sm_80, one line each: pieces into shared memory, from there into registers,
// and multiplied.
#pragma once
#include "common.cuh"

__device__ __forceinline__ u32 shared_address(const void* pointer) {
    return u32(__cvta_generic_to_shared(pointer));
}

// 16 bytes to shared memory, of which `bytes` are read and the rest are zero.
__device__ __forceinline__ void copy_async(u32 to, const void* from, u32 bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

// So many bytes, 4, 8 or 16, likewise.
template <u32 BYTES> __device__ __forceinline__ void copy_few_async(u32 to, const void* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(from), "n"(BYTES) : "memory");
}

__device__ __forceinline__ void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// At most PENDING groups of copies have yet to arrive.
template <u32 PENDING> __device__ __forceinline__ void copies_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Eight elements to shared memory one by one, of which `elements` are read and the rest are zero: for what does not
// start on 16 bytes.
__device__ __forceinline__ void copy_slowly(bf16* to, const bf16* from, u32 elements) {
    u32 words[4] = {};
    for (u32 j = 0; j < elements; ++j) words[j / 2] |= u32(from[j].bits) << (j % 2 * 16);
    *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
}

// Eight elements from shared memory, of which `elements` are written; `vectors` if all are and start on 16 bytes.
__device__ __forceinline__ void store_piece(bf16* to, const bf16* from, u32 elements, bool vectors) {
    if (vectors) {
        *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
        return;
    }
    for (u32 j = 0; j < elements; ++j) to[j] = from[j];
}

__device__ __forceinline__ void load_matrices(u32 (&registers)[4], u32 from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                 : "r"(from));
}

__device__ __forceinline__ void load_transposed(u32 (&registers)[4], u32 from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                 : "r"(from));
}

__device__ __forceinline__ void multiply(f32 (&sums)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
                 "{%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two numbers rounded to bf16, the first in the low half.
__device__ __forceinline__ u32 narrow_pair(f32 first, f32 second) {
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
    return pair;
}
