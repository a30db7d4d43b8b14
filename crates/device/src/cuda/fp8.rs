//! Weights in FP8 blocks as a GPU holds them that multiplies codes: rows of codes on 16 bytes, gate and up alternating as in
//! every weight, and the scales of blocks, matrix by matrix, block rows by blocks of columns. `gemm_fp8.cuh` says
//! what reads both.

use super::hopper::INTERLEAVED;
use epsmoe_quant::Codes;

/// Rows and columns that share a scale.
pub(super) const BLOCK: usize = 128;

/// Rows and columns of a weight that one copy brings: `PIECE_ROWS` of the source.
pub(super) const WEIGHT_PIECE: (u32, u32) = (64, 128);

/// Matrices as they lie on a GPU.
pub(super) struct Packed {
    /// Rows of `stride` bytes.
    pub(super) codes: Vec<u8>,
    pub(super) scales: Vec<f32>,
    pub(super) rows: usize,
    pub(super) stride: usize,
}

/// Whether matrices of this size can be held so: buffers have no aligned rows of other widths.
pub(super) fn is_even(size: [usize; 2]) -> bool {
    size.iter().all(|size| size.is_multiple_of(INTERLEAVED))
}

/// Bytes from a row of codes to the next.
pub(super) fn stride(width: usize) -> usize {
    width.next_multiple_of(16)
}

/// One matrix, or rows of gate and up in turn. Nothing for other codes than e4m3 in blocks of 128 × 128 and MXFP4 that folds into
/// such, and for widths that buffers have no aligned rows of.
pub(super) fn pack(matrices: &[Codes]) -> Option<Packed> {
    let first = matrices.first()?;
    if first.format.may_fold() {
        return pack(&matrices.iter().map(Codes::folded).collect::<Option<Vec<_>>>()?);
    }
    let (count, height, width) = (matrices.len(), first.rows, first.columns);
    if !(first.format.may_be_fp8_blocks() && is_even([height, width])) {
        return None;
    }
    let (stride, across) = (stride(width), width.div_ceil(BLOCK));
    let mut codes = vec![0; count * height * stride];
    let mut scales = Vec::with_capacity(count * height.div_ceil(BLOCK) * across);
    for (index, matrix) in matrices.iter().enumerate() {
        for row in 0..height {
            let at = match count {
                1 => row,
                _ => (row / INTERLEAVED * count + index) * INTERLEAVED + row % INTERLEAVED,
            };
            codes[at * stride..][..width].copy_from_slice(matrix.row(row));
            for block in 0..across {
                let record = matrix.record(row, block);
                if row % BLOCK == 0 {
                    scales.push(matrix.format.affine(record, 0).scale);
                } else if record != matrix.record(row - 1, block) {
                    return None;
                }
            }
        }
    }
    Some(Packed { codes, scales, rows: count * height, stride })
}

#[cfg(test)]
mod tests {
    use super::*;
    use epsmoe_quant::{Code, Format, Scale};

    /// Rows of one code each, `first` onwards, with a scale for every block row.
    fn matrix(rows: usize, columns: usize, first: u8, scales: &[f32]) -> Codes {
        let format = Format { code: Code::E4M3, scale: Scale::F32, group: BLOCK, part: BLOCK, zeros: false };
        let codes = (0..rows).flat_map(|row| vec![first + row as u8; columns]).collect();
        let record = |row: usize| scales[row / BLOCK].to_le_bytes().repeat(columns.div_ceil(BLOCK));
        Codes { format, rows, columns, codes, records: (0..rows).flat_map(record).collect() }
    }

    #[test]
    fn gate_and_up_take_turns_and_keep_their_scales() {
        let packed = pack(&[matrix(16, 8, 0, &[1.0]), matrix(16, 8, 100, &[2.0])]).expect("blocks");
        assert_eq!((packed.rows, packed.stride, &packed.scales[..]), (32, 16, &[1.0, 2.0][..]));
        let firsts: Vec<u8> = packed.codes.iter().step_by(16).copied().collect();
        assert_eq!(firsts[6..10], [6, 7, 100, 101]);
        assert_eq!(firsts[14..18], [106, 107, 8, 9]);
        assert_eq!(packed.codes[8..16], [0; 8], "room up to 16 bytes");
    }

    #[test]
    fn other_scales_than_of_blocks_are_another_matter() {
        let mut rows = matrix(136, 136, 0, &[1.0, 2.0]);
        assert_eq!(pack(std::slice::from_ref(&rows)).expect("blocks").scales, [1.0, 1.0, 2.0, 2.0]);
        rows.records[8..12].copy_from_slice(&3f32.to_le_bytes());
        assert!(pack(&[rows]).is_none(), "the second row's first scale is another");
        assert!(pack(&[matrix(12, 8, 0, &[1.0])]).is_none(), "twelve rows");
    }
}
