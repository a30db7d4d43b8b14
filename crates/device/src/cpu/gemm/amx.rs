//! AMX: bfloat16 products in tiles of 16 by 16 sums; all else is AVX-512, but for what `amx_pieces` makes of float32.
//!
//! The packed words need no other order than AVX-512's: sixteen steps of a panel's half are a tile of weights (a row of
//! sixteen columns for each step), sixteen words of each row a tile of activations. TDPBF16PS adds to each sum the
//! products of sixteen steps: those of the low halves and those of the high halves, each in rising `k` from zero. So
//! the bits are not AVX-512's, but as independent of neighbouring rows.

use super::ElementType;
use super::kernel::Functions;

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
pub(super) use linux::{SIDE, Shapes, TILE_WIDTH, tiles};
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
pub(super) use linux::{functions, is_supported, weight_functions};

#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
pub(super) fn is_supported() -> bool {
    false
}

#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
pub(super) fn functions(_: ElementType) -> &'static Functions {
    unreachable!("AMX is not supported on this system")
}

#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
pub(super) fn weight_functions(element: ElementType) -> &'static Functions {
    functions(element)
}

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod linux {
    use super::{ElementType, Functions};
    use crate::cpu::gemm::kernel::{BLOCK_STEPS, BLOCK_STRIDE, ChunkLimit, Several, Tile, VECTORS};
    use crate::cpu::gemm::{amx_pieces, avx512, decode_amx};
    use crate::threaded::LINE_BYTES;
    use std::arch::asm;
    use std::arch::x86_64::{__cpuid_count, _xgetbv};
    use std::sync::LazyLock;

    /// Rows, and words of a row, of a hardware tile.
    pub(in crate::cpu::gemm) const SIDE: usize = 16;

    /// Bytes from one row to the next in packed activations and, of weights and of sums alike, in a panel.
    const ACTIVATION_STRIDE: usize = BLOCK_STRIDE * size_of::<u32>();
    const PANEL_STRIDE: usize = VECTORS * SIDE * size_of::<u32>();

    /// Bytes of `SIDE` rows of activations, of sums, and of `SIDE` steps of weights.
    const ACTIVATION_TILE: usize = SIDE * ACTIVATION_STRIDE;
    const PANEL_TILE: usize = SIDE * PANEL_STRIDE;

    /// Bytes of `SIDE` words, the width of a hardware tile.
    pub(in crate::cpu::gemm) const TILE_WIDTH: usize = SIDE * size_of::<u32>();

    /// Whether the processor has the tiles and the system lets this process use them.
    pub(in crate::cpu::gemm) fn is_supported() -> bool {
        static SUPPORTED: LazyLock<bool> =
            LazyLock::new(|| avx512::has_bf16() && has_bytes() && has_tiles() && may_use_tiles());
        *SUPPORTED
    }

    /// Whether the processor permutes bytes, as all with AMX do.
    fn has_bytes() -> bool {
        is_x86_feature_detected!("avx512vbmi")
    }

    /// Whether the processor has AMX-TILE and AMX-BF16, and the system keeps the state of tiles.
    fn has_tiles() -> bool {
        const BF16_AND_TILE: u32 = 1 << 22 | 1 << 24;
        const TILE_STATE: u64 = 0b11 << 17;
        #[target_feature(enable = "xsave")]
        fn kept_state() -> u64 {
            // SAFETY: register 0 exists wherever the instruction does.
            unsafe { _xgetbv(0) }
        }
        // SAFETY: AVX-512 was found, so the processor has XSAVE and its system uses it.
        let kept = unsafe { kept_state() };
        __cpuid_count(7, 0).edx & BF16_AND_TILE == BF16_AND_TILE && kept & TILE_STATE == TILE_STATE
    }

    /// Asks Linux for the tiles' registers, once for all threads: they are large, so nobody has them unasked.
    fn may_use_tiles() -> bool {
        const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
        const TILE_DATA: libc::c_long = 18;
        // SAFETY: the call takes two numbers and changes only what this process may use.
        unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA) == 0 }
    }

    pub(in crate::cpu::gemm) fn functions(element: ElementType) -> &'static Functions {
        match element {
            ElementType::F32 => avx512::functions(element),
            ElementType::Bf16 => &BF16,
        }
    }

    /// The kernels that multiply with packed weights.
    pub(in crate::cpu::gemm) fn weight_functions(element: ElementType) -> &'static Functions {
        match element {
            ElementType::F32 => &amx_pieces::F32,
            ElementType::Bf16 => &BF16,
        }
    }

    macro_rules! tiles {
        ($tile:ident: $($rows:literal)+) => { &[$($tile::<$rows>),+] };
    }
    pub(in crate::cpu::gemm) use tiles;

    static BF16: Functions = Functions {
        tiles: tiles!(multiply_tile: 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31 32),
        several: Several { tiles: &[], ..avx512::BF16_DOT.several },
        chunk: ChunkLimit { rows: 256, ..avx512::BF16_DOT.chunk }, // eight full tiles
        tile_products: Some(decode_amx::PRODUCTS),
        spin,
        ..avx512::BF16_DOT
    };

    /// What LDTILECFG reads: bytes in a row and rows of each of the eight tile registers.
    #[repr(C, align(64))]
    pub(in crate::cpu::gemm) struct Shapes {
        palette: u8,
        start_row: u8,
        reserved: [u8; 14],
        row_bytes: [u16; 16],
        rows: [u8; 16],
    }

    impl Shapes {
        /// For `rows` rows and `steps` steps, at most two and one hardware tile of them: sums in 0 to 3, activations in
        /// 4 and 5, weights in 6 and 7. What would be empty is left out.
        pub(in crate::cpu::gemm) const fn new(rows: usize, steps: usize) -> Self {
            let mut shapes =
                Shapes { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
            let upper = if rows < SIDE { rows } else { SIDE };
            let lower = rows - upper;
            shapes.set([0, 1], upper, SIDE);
            shapes.set([4, 4], upper, steps);
            shapes.set([6, 7], steps, SIDE);
            if lower > 0 {
                shapes.set([2, 3], lower, SIDE);
                shapes.set([5, 5], lower, steps);
            }
            shapes
        }

        /// For weights as the first operand, in 4 and 5, and `rows` rows of activations in 6 and 7; sums in 0 to 3.
        pub(in crate::cpu::gemm) const fn of_weights(rows: usize) -> Self {
            let mut shapes = Self::new(2 * SIDE, SIDE);
            shapes.set([0, 1], SIDE, rows);
            shapes.set([2, 3], SIDE, rows);
            shapes.set([6, 7], SIDE, rows);
            shapes
        }

        /// For three times `rows` rows, at most sixteen: sums in 0 to 5, weights in 6, activations in 7.
        pub(in crate::cpu::gemm) const fn of_three(rows: usize) -> Self {
            let mut shapes = Self::new(2 * SIDE, SIDE);
            shapes.set([0, 1], rows, SIDE);
            shapes.set([2, 3], rows, SIDE);
            shapes.set([4, 5], rows, SIDE);
            shapes.set([7, 7], rows, SIDE);
            shapes
        }

        const fn set(&mut self, registers: [usize; 2], rows: usize, words: usize) {
            self.rows[registers[0]] = rows as u8;
            self.rows[registers[1]] = rows as u8;
            self.row_bytes[registers[0]] = (words * size_of::<u32>()) as u16;
            self.row_bytes[registers[1]] = (words * size_of::<u32>()) as u16;
        }
    }

    /// `sums += activations · weights` for `ROWS` rows, at most 32: sixteen steps at a time, then those left over.
    ///
    /// # Safety
    /// The pointers of `tile` are valid for the shapes given at its fields, and the processor has the tiles.
    unsafe fn multiply_tile<const ROWS: usize>(tile: Tile) {
        let whole = tile.steps / SIDE;
        let rest = tile.steps % SIDE;
        // SAFETY: the caller's promise; the steps left over begin `whole` tiles of weights and, since a block holds
        // whole tiles of steps, as many tiles of words on in the block they are in.
        unsafe {
            if whole > 0 {
                multiply_groups::<ROWS>(&const { Shapes::new(ROWS, SIDE) }, whole, tile);
            }
            if rest > 0 {
                let (blocks, steps) = (whole * SIDE / BLOCK_STEPS, whole * SIDE % BLOCK_STEPS);
                let rest_of_it = Tile {
                    activations: tile.activations.add(blocks * ROWS * BLOCK_STRIDE + steps),
                    weights: tile.weights.map(|weights| weights.wrapping_byte_add(whole * PANEL_TILE)),
                    more: tile.more || whole > 0,
                    ..tile
                };
                multiply_groups::<ROWS>(&Shapes::new(ROWS, rest), 1, rest_of_it);
            }
        }
    }

    /// The same for `groups` groups of as many steps as `shapes` says.
    ///
    /// # Safety
    /// Like [`multiply_tile`].
    #[inline(always)]
    unsafe fn multiply_groups<const ROWS: usize>(shapes: &Shapes, groups: usize, tile: Tile) {
        let lines = (SIDE * tile.prefetch.stride).div_ceil(LINE_BYTES);
        /// The loop over blocks and over groups of steps in a block, around what one group does. Once they have done
        /// their part, `shapes` is where the fourth stream is and `more` counts the groups left in a block: there are
        /// not registers enough for names of their own.
        macro_rules! walk {
            ($load:literal, $group:literal, $store:literal) => {
                asm!(
                    "ldtilecfg [{shapes}]",
                    "test {more:e}, {more:e}",
                    "jz 2f",
                    $load,
                    "2:",
                    "lea {shapes}, [{apart} + 2 * {apart}]",
                    "3:",
                    "mov {more:e}, {groups_in_block}",
                    "4:",
                    $group,
                    "mov {line:e}, {lines:e}",
                    "5:",
                    "prefetcht1 [{ahead}]",
                    "prefetcht1 [{ahead} + {apart}]",
                    "prefetcht1 [{ahead} + 2 * {apart}]",
                    "prefetcht1 [{ahead} + {shapes}]",
                    "add {ahead}, {line_bytes}",
                    "dec {line:e}",
                    "jg 5b",
                    "add {weights}, {panel_tile}",
                    "add {activations}, {tile_width}",
                    "dec {groups}",
                    "jz 6f",
                    "dec {more:e}",
                    "jnz 4b",
                    "add {activations}, {to_next_block}",
                    "jmp 3b",
                    "6:",
                    $store,
                    "tilerelease",
                    shapes = inout(reg) shapes => _,
                    more = inout(reg) u32::from(tile.more) => _,
                    groups = inout(reg) groups => _,
                    weights = inout(reg) tile.weights[0] => _,
                    activations = inout(reg) tile.activations => _,
                    sums = in(reg) tile.sums,
                    row = in(reg) ACTIVATION_STRIDE,
                    step = in(reg) PANEL_STRIDE,
                    ahead = inout(reg) tile.prefetch.start => _,
                    apart = in(reg) tile.prefetch.apart,
                    lines = in(reg) lines as u32,
                    line = out(reg) _,
                    to_next_block = const ROWS * ACTIVATION_STRIDE - BLOCK_STEPS * size_of::<u32>(),
                    groups_in_block = const BLOCK_STEPS / SIDE,
                    panel_tile = const PANEL_TILE,
                    tile_width = const TILE_WIDTH,
                    line_bytes = const LINE_BYTES,
                    lower_activations = const ACTIVATION_TILE,
                    lower_sums = const PANEL_TILE,
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                    options(nostack),
                )
            };
        }
        // SAFETY: the loads and stores are those of `kernel::multiply_tile`, sixteen steps at a time: the caller's
        // promise. LDTILECFG makes all tiles zero, TILERELEASE leaves none in use.
        unsafe {
            if ROWS <= SIDE {
                walk!(
                    "tileloadd tmm0, [{sums} + {step}]
                    tileloadd tmm1, [{sums} + {step} + {tile_width}]",
                    "tileloadd tmm6, [{weights} + {step}]
                    tileloadd tmm4, [{activations} + {row}]
                    tdpbf16ps tmm0, tmm4, tmm6
                    tileloadd tmm7, [{weights} + {step} + {tile_width}]
                    tdpbf16ps tmm1, tmm4, tmm7
                    # no use for {lower_activations} and {lower_sums}",
                    "tilestored [{sums} + {step}], tmm0
                    tilestored [{sums} + {step} + {tile_width}], tmm1"
                );
            } else {
                walk!(
                    "tileloadd tmm0, [{sums} + {step}]
                    tileloadd tmm1, [{sums} + {step} + {tile_width}]
                    tileloadd tmm2, [{sums} + {step} + {lower_sums}]
                    tileloadd tmm3, [{sums} + {step} + {lower_sums} + {tile_width}]",
                    "tileloadd tmm6, [{weights} + {step}]
                    tileloadd tmm4, [{activations} + {row}]
                    tdpbf16ps tmm0, tmm4, tmm6
                    tileloadd tmm7, [{weights} + {step} + {tile_width}]
                    tdpbf16ps tmm1, tmm4, tmm7
                    tileloadd tmm5, [{activations} + {row} + {lower_activations}]
                    tdpbf16ps tmm2, tmm5, tmm6
                    tdpbf16ps tmm3, tmm5, tmm7",
                    "tilestored [{sums} + {step}], tmm0
                    tilestored [{sums} + {step} + {tile_width}], tmm1
                    tilestored [{sums} + {step} + {lower_sums}], tmm2
                    tilestored [{sums} + {step} + {lower_sums} + {tile_width}], tmm3"
                );
            }
        }
    }

    /// See `kernel::spin_multiply_add`: a round is one product into each of four tiles of sums.
    ///
    /// # Safety
    /// The processor has the tiles.
    unsafe fn spin(rounds: usize) -> f64 {
        const SUMS: usize = 4;
        let words = [0x3f80_3f80_u32; SIDE * SIDE]; // 1.0, in all of a tile
        // SAFETY: the loads are of `words`, a whole tile; all else touches registers only.
        unsafe {
            asm!(
                "ldtilecfg [{shapes}]",
                "tileloadd tmm4, [{words} + {row}]",
                "tileloadd tmm5, [{words} + {row}]",
                "tileloadd tmm6, [{words} + {row}]",
                "tileloadd tmm7, [{words} + {row}]",
                "2:",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "dec {rounds}",
                "jnz 2b",
                "tilerelease",
                shapes = in(reg) &const { Shapes::new(2 * SIDE, SIDE) },
                words = in(reg) &words,
                row = in(reg) TILE_WIDTH,
                rounds = inout(reg) rounds => _,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
        (rounds * SUMS * SIDE * SIDE * SIDE) as f64
    }
}
