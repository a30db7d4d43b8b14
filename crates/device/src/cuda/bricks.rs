//! Weights in codes as a GPU holds them: in *bricks* of 64 rows and 64 columns, each a piece of memory with everything that
//! decodes it. `gemm_coded.cu` says how one lies.
//!
//! Kernels know four kinds of codes and three of scales. What checkpoints have is brought to these so that weights stay what they
//! are, bit by bit: a zero becomes what is added, `(code − zero) · scale = code · scale + more`, where the product of zero and
//! scale is exact; scales of FP4 and FP8 take in the power of two that is missing while codes lie in the places of a bfloat16.

use super::hopper::INTERLEAVED;
use epsmoe_quant::{Affine, Code, Codes, Format, Scale};
use half::bf16;

/// Rows of a brick, and its columns.
pub(super) const SIDE: usize = 64;

/// Bytes of the largest brick: bytes with four scales and what is added for each row.
#[cfg(test)]
const MOST_BYTES: usize = 6144;

/// Columns that one multiplication of a warp takes, and lanes that share a row of them.
const STEP: usize = 16;
const LANES: usize = 4;

/// What makes a weight of a code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Scales {
    /// A bfloat16.
    Short,
    /// A float32.
    Scaled,
    /// A float32, and one that is added.
    Shifted,
}

impl Scales {
    fn bytes(self) -> usize {
        match self {
            Scales::Short => 2,
            Scales::Scaled => 4,
            Scales::Shifted => 8,
        }
    }
}

/// How the weights of a format lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Bricks {
    code: Code,
    scales: Scales,
    /// Scales of a row of a brick.
    pub(super) parts: usize,
}

impl Bricks {
    /// Of a format, if there are kernels for it.
    pub(super) fn of(format: &Format) -> Option<Bricks> {
        let Format { code, scale, part, zeros, .. } = *format;
        let parts = match part {
            16 => 4,
            32 => 2,
            part if part.is_multiple_of(SIDE) => 1,
            _ => return None,
        };
        // A word has two of them.
        let short = matches!(scale, Scale::E8M0 | Scale::BF16) && parts <= 2;
        let minima = scale == Scale::NestedWithMinima;
        let scales = match code {
            // Zero times such a scale need not be exact.
            _ if zeros && scale == Scale::F32 => return None,
            Code::E2M1 | Code::E4M3 if zeros || minima => return None,
            Code::E2M1 if scale != Scale::E8M0 || !short => return None,
            Code::E2M1 => Scales::Short,
            _ if zeros || minima => Scales::Shifted,
            _ if short => Scales::Short,
            Code::U4 => Scales::Shifted,
            Code::I8 | Code::E4M3 => Scales::Scaled,
        };
        Some(Bricks { code, scales, parts })
    }

    /// What `gemm_coded.cu` calls this kind.
    pub(super) fn kind(self) -> u32 {
        match (self.code, self.scales) {
            (Code::E2M1, _) => 0,
            (Code::U4, Scales::Short) => 1,
            (Code::I8, Scales::Short) => 2,
            (Code::E4M3, Scales::Short) => 3,
            (Code::U4, _) => 4,
            (Code::I8, Scales::Scaled) => 5,
            (Code::I8, Scales::Shifted) => 6,
            (Code::E4M3, _) => 7,
        }
    }

    /// Whether scales are in bfloat16, which takes fewer registers.
    pub(super) fn is_short(self) -> bool {
        self.scales == Scales::Short
    }

    /// Bytes of the codes of a row of a brick.
    fn row_bytes(self) -> usize {
        SIDE * self.code.bits() / 8
    }

    /// Bytes of a brick.
    pub(super) fn bytes(self) -> usize {
        SIDE * (self.row_bytes() + self.parts * self.scales.bytes())
    }

    /// Bits of a weight, scales included.
    pub(super) fn bits(self) -> f64 {
        (8 * self.bytes()) as f64 / (SIDE * SIDE) as f64
    }

    /// Rows, and bytes, of `count` matrices of so many rows and columns.
    pub(super) fn size(self, [count, rows, columns]: [usize; 3]) -> (usize, usize) {
        let rows = if count == 1 { rows } else { rows.next_multiple_of(INTERLEAVED) * count };
        (rows, rows.div_ceil(SIDE) * columns.div_ceil(SIDE) * self.bytes())
    }

    /// One matrix, or rows of gate and up in turn, and how many rows that makes. Nothing if some scale does not become one of
    /// these.
    pub(super) fn pack(self, matrices: &[Codes]) -> Option<(Vec<u8>, usize)> {
        let count = matrices.len();
        let first = matrices.first()?;
        let (rows, bytes) = self.size([count, first.rows, first.columns]);
        let across = first.columns.div_ceil(SIDE);
        let mut bricks = vec![0; bytes];
        for (index, codes) in matrices.iter().enumerate() {
            for row in 0..codes.rows {
                let (turn, within) = (row / INTERLEAVED, row % INTERLEAVED);
                let at = if count == 1 { row } else { (turn * count + index) * INTERLEAVED + within };
                let bricks = bricks[at / SIDE * across * self.bytes()..].chunks_exact_mut(self.bytes());
                for (column, brick) in (0..codes.columns).step_by(SIDE).zip(bricks) {
                    self.place(codes, row, column, at % SIDE, brick)?;
                }
            }
        }
        Some((bricks, rows))
    }

    /// Puts what row `row` has from `column` on into row `at` of a brick.
    fn place(self, codes: &Codes, row: usize, column: usize, at: usize, brick: &mut [u8]) -> Option<()> {
        let (own, scales) = brick.split_at_mut(SIDE * self.row_bytes());
        let stored = &codes.row(row)[column * self.code.bits() / 8..];
        match self.code {
            Code::E2M1 => place_nibbles(stored, own, at, bits_of_e2m1),
            Code::U4 => place_nibbles(stored, own, at, nibble),
            Code::I8 | Code::E4M3 => place_bytes(stored, &mut own[at * SIDE..][..SIDE]),
        }
        let Format { group, part, .. } = codes.format;
        for (index, scale) in scales[order_of(at) * self.parts * self.scales.bytes()..]
            .chunks_exact_mut(self.scales.bytes())
            .take(self.parts)
            .enumerate()
        {
            let k = column + index * SIDE / self.parts;
            if k < codes.columns {
                let affine = codes.format.affine(codes.record(row, k / group), k % group / part);
                self.write(affine, scale)?;
            }
        }
        Some(())
    }

    fn write(self, affine: Affine, to: &mut [u8]) -> Option<()> {
        let missing = match self.code {
            Code::E2M1 => 126,
            Code::E4M3 => 120,
            Code::U4 | Code::I8 => 0,
        };
        let scale = affine.scale * 2f32.powi(missing);
        let exact = scale / 2f32.powi(missing) == affine.scale;
        if !(scale.is_finite() && exact) {
            return None;
        }
        match self.scales {
            Scales::Short => to.copy_from_slice(&bf16::from_f32(scale).to_le_bytes()),
            Scales::Scaled => to.copy_from_slice(&scale.to_le_bytes()),
            Scales::Shifted => {
                let more = -(affine.zero * affine.scale) - affine.minimum;
                to[..4].copy_from_slice(&scale.to_le_bytes());
                to[4..].copy_from_slice(&more.to_le_bytes());
            }
        }
        Some(())
    }
}

/// Where a pair of neighbours along K is among the words of a row: which step it belongs to, which half of it, and the lane.
fn place_of(pair: usize) -> (usize, usize, usize) {
    (2 * pair / STEP, 2 * pair % STEP / (STEP / 2), pair % LANES)
}

/// Which of all rows, in the order in which they lie, a row of a brick is: rows that a lane multiplies together are neighbours.
fn order_of(row: usize) -> usize {
    row / 16 * 16 + row % 8 * 2 + row / 8 % 2
}

/// Codes of four bits of row `at`: a word holds two steps of a lane, its lower half the first numbers of four pairs, its upper half the
/// second ones. A lane has the words of two rows side by side. `spread` says which bits of a word those of a code are that is the first
/// of one of the four pairs.
fn place_nibbles(from: &[u8], to: &mut [u8], at: usize, spread: impl Fn(u32, usize) -> u32) {
    const WORDS: usize = SIDE / STEP / 2;
    let mut words = [0; LANES * WORDS];
    for (pair, &both) in from.iter().take(SIDE / 2).enumerate() {
        let (step, half, lane) = place_of(pair);
        let (place, both) = (step % 2 * 2 + half, u32::from(both));
        words[lane * WORDS + step / 2] |= spread(both & 15, place) | spread(both >> 4, place).rotate_left(16);
    }
    let (to, _) = to.as_chunks_mut::<4>();
    for (lane, words) in words.chunks_exact(WORDS).enumerate() {
        let first = (at / 16 * 8 + at % 8) * 2 * LANES * WORDS + (lane * 2 + at / 8 % 2) * WORDS;
        to[first..].iter_mut().zip(words).for_each(|(to, word)| *to = word.to_le_bytes());
    }
}

/// Four bits side by side.
fn nibble(code: u32, at: usize) -> u32 {
    code << (4 * at)
}

/// Sign, two bits of exponent and one of fraction, where a rotation brings them to 15, 8, 7 and 6; of the last place where room is
/// left, which is there but for the fraction. `E2m1` of the source takes them from there.
fn bits_of_e2m1(code: u32, at: usize) -> u32 {
    let (sign, rest) = (code >> 3, code & 7);
    match at {
        0 => sign << 9 | rest,
        1 => sign << 13 | rest << 4,
        2 => sign << 19 | rest << 10,
        _ => sign << 15 | (rest >> 1) << 7 | (rest & 1) << 14,
    }
}

/// Codes of eight bits: a word holds a step of a lane.
fn place_bytes(from: &[u8], to: &mut [u8]) {
    for (pair, both) in from.chunks(2).take(SIDE / 2).enumerate() {
        let (step, half, lane) = place_of(pair);
        let at = lane * 16 + step * 4 + half;
        to[at] = both[0];
        to[at + 2] = both.get(1).copied().unwrap_or(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(format: Format, codes: Vec<u8>, record: &[u8]) -> Codes {
        let columns = codes.len() * 8 / format.code.bits();
        let groups = columns.div_ceil(format.group);
        Codes { format, rows: 1, columns, codes, records: record.repeat(groups) }
    }

    const INT4: Format = Format { code: Code::U4, scale: Scale::F16, group: 32, part: 32, zeros: false };

    /// k = 93 of row 13 of up is in the second brick at 29: step 1, the second half of it, lane 2, the second of its pair.
    /// Row 13 of up is packed row 29: 16 rows before it, and 8 of gate. It lies beside row 21, the sixth of the second sixteen: 512
    /// bytes and 5 of 64 before it. Lane 2 begins 32 further, row 29 follows 8 bytes of row 21; of its word of the steps 0 and 1 nibble 3
    /// of the upper half is the upper one of byte 3.
    #[test]
    fn place_of_a_code_worked_example() {
        let bricks = Bricks::of(&INT4).expect("a kernel");
        assert_eq!((bricks.bytes(), bricks.bits()), (64 * (32 + 16), 6.0));
        let empty = Codes {
            format: INT4,
            rows: 14,
            columns: 96,
            codes: vec![0; 14 * 48],
            records: vec![0; 14 * 3 * 2],
        };
        let mut up = empty.clone();
        up.codes[13 * 48 + 46] = 0xe0;
        let (packed, rows) = bricks.pack(&[empty, up]).expect("scales of zero");
        assert_eq!(rows, 32);
        let set: Vec<_> = (0..packed.len()).filter(|&at| ![0, 0x80].contains(&packed[at])).collect();
        let at = bricks.bytes() + 512 + 5 * 64 + 32 + 8 + 3;
        assert_eq!((set, packed[at]), (vec![at], 0xe0));
    }

    /// No two of eight codes share a bit, and what the kernel makes of a word is what they mean.
    #[test]
    fn bits_of_e2m1_come_to_their_places() {
        for codes in 0..1u32 << 16 {
            // The upper half has other codes than the lower one.
            let code = |at: usize| (codes >> (4 * (at % 4)) & 15) ^ if at < 4 { 0 } else { 13 };
            let word = (0..8).fold(0u32, |word, at| {
                let bits = bits_of_e2m1(code(at), at % 4).rotate_left(16 * (at / 4) as u32);
                assert_eq!(word & bits, 0);
                word | bits
            });
            for at in 0..4 {
                let bits = match at {
                    0 => word << 6 & 0x81c0_81c0,
                    1 => word << 2 & 0x81c0_81c0,
                    2 => word.rotate_right(4) & 0x81c0_81c0,
                    _ => word & 0x8180_8180 | word >> 8 & 0x0040_0040,
                };
                for (half, bits) in [bits << 16, bits & 0xffff_0000].into_iter().enumerate() {
                    let value = f32::from_bits(bits) * 2f32.powi(126);
                    assert_eq!(value, Code::E2M1.value(code(at + 4 * half) as u8), "{codes:x}, {at}");
                }
            }
        }
    }

    #[test]
    fn place_of_a_byte_worked_example() {
        let fp8 = Format { code: Code::E4M3, scale: Scale::F32, group: 128, part: 128, zeros: false };
        let bricks = Bricks::of(&fp8).expect("a kernel");
        assert_eq!((bricks.bytes(), bricks.kind()), (64 * 68, 7));
        let mut codes = vec![0; 64];
        // Step 2, the first half, lane 3, the first of its pair.
        codes[38] = 0x55;
        let (packed, _) = bricks.pack(&[row(fp8, codes, &0.5f32.to_le_bytes())]).expect("a scale");
        assert_eq!(packed.iter().position(|&byte| byte == 0x55), Some(3 * 16 + 2 * 4));
        assert_eq!(packed[64 * 64..][..4], 2f32.powi(119).to_le_bytes());
    }

    /// Codes of four bits without zeros stand eight above what they mean: `code · 0.5 − 4`.
    #[test]
    fn zeros_become_what_is_added() {
        let bricks = Bricks::of(&INT4).expect("a kernel");
        let (packed, _) = bricks.pack(&[row(INT4, vec![0; 32], &[0, 0x38])]).expect("scales");
        assert_eq!(packed[64 * 32..][..4], 0.5f32.to_le_bytes());
        assert_eq!(packed[64 * 32 + 4..][..4], (-4.0f32).to_le_bytes());
    }

    #[test]
    fn the_largest_brick() {
        let scales =
            [Scale::E8M0, Scale::F16, Scale::BF16, Scale::F32, Scale::Nested, Scale::NestedWithMinima];
        let formats = [Code::E2M1, Code::U4, Code::I8, Code::E4M3].into_iter().flat_map(|code| {
            let of = move |scale| [(16, false), (16, true)].map(|(part, zeros)| (code, scale, part, zeros));
            scales.into_iter().flat_map(of)
        });
        let bytes = formats.filter_map(|(code, scale, part, zeros)| {
            Bricks::of(&Format { code, scale, group: part, part, zeros }).map(Bricks::bytes)
        });
        assert_eq!(bytes.max(), Some(MOST_BYTES));
    }

    #[test]
    fn what_no_kernel_takes() {
        let of = |part| Bricks::of(&Format { group: part, part, ..INT4 });
        assert!(of(24).is_none() && of(96).is_none() && of(8).is_none());
        assert!(of(16).is_some() && of(64).is_some() && of(5120).is_some());
        // FP4 of 2⁴ times more than the largest bfloat16 with the power that it lacks.
        let fp4 = Format { code: Code::E2M1, scale: Scale::E8M0, group: 32, part: 32, zeros: false };
        let bricks = Bricks::of(&fp4).expect("a kernel");
        assert!(bricks.pack(&[row(fp4, vec![0; 32], &[128])]).is_some());
        assert!(bricks.pack(&[row(fp4, vec![0; 32], &[133])]).is_none());
    }
}
