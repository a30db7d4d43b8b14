//! Weights packed into column panels, and the small types they are made of.

use super::coded::{CodedProducts, Layout};
use super::epilogue::round_to_bf16;
use super::kernel::Functions;
use super::{Isa, int8};
use crate::cpu::pool::ComputePool;
use crate::threaded::{Pages, Piece, Slabs};
use epsmoe_base::DType;
use epsmoe_quant::Codes;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut, Range};

/// Element type of packed weights and of the activations multiplied with them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ElementType {
    /// float32.
    F32,
    /// bfloat16, two in a word; products and sums are float32.
    Bf16,
}

impl ElementType {
    /// What is kept for activations of `dtype`.
    pub fn of(dtype: DType) -> Self {
        if dtype == DType::BF16 { ElementType::Bf16 } else { ElementType::F32 }
    }

    /// Number of 32-bit words, that is of kernel steps, for `k` elements.
    pub(crate) fn steps(self, k: usize) -> usize {
        match self {
            ElementType::F32 => k,
            ElementType::Bf16 => k.div_ceil(2),
        }
    }
}

/// One row of an unpacked matrix: `K` little-endian elements, at any alignment.
#[derive(Clone, Copy, Debug)]
pub(crate) enum SourceRow<'a> {
    F32(&'a [u8]),
    Bf16(&'a [u8]),
    F16(&'a [u8]),
}

impl SourceRow<'_> {
    /// Number of elements.
    fn len(self) -> usize {
        match self {
            SourceRow::F32(bytes) => bytes.len() / 4,
            SourceRow::Bf16(bytes) | SourceRow::F16(bytes) => bytes.len() / 2,
        }
    }

    /// Writes elements `range` as words of `element`.
    fn write_words(self, range: Range<usize>, element: ElementType, words: &mut [u32]) {
        match (self, element) {
            (SourceRow::F32(bytes), ElementType::F32) => {
                bytes_to_words(&bytes[4 * range.start..4 * range.end], words);
            }
            (SourceRow::Bf16(bytes), ElementType::Bf16) => {
                bytes_to_words(&bytes[2 * range.start..2 * range.end], words);
            }
            _ => {
                let mut values = [0.0_f32; PACK_ELEMENTS];
                let values = &mut values[..range.len()];
                self.read_f32(range, values);
                match element {
                    ElementType::F32 => bytes_to_words(bytemuck::cast_slice(values), words),
                    ElementType::Bf16 => {
                        let mut rounded = [bf16::ZERO; PACK_ELEMENTS];
                        let rounded = &mut rounded[..values.len()];
                        round_to_bf16(values, rounded);
                        bytes_to_words(bytemuck::cast_slice(rounded), words);
                    }
                }
            }
        }
    }

    fn read_f32(self, range: Range<usize>, values: &mut [f32]) {
        match self {
            SourceRow::F32(bytes) => {
                bytemuck::cast_slice_mut(values).copy_from_slice(&bytes[4 * range.start..4 * range.end]);
            }
            SourceRow::Bf16(bytes) => {
                let halves = bytes[2 * range.start..2 * range.end].as_chunks().0;
                for (value, half) in values.iter_mut().zip(halves) {
                    *value = f32::from_bits(u32::from(u16::from_le_bytes(*half)) << 16);
                }
            }
            SourceRow::F16(bytes) => {
                let mut halves = [f16::ZERO; PACK_ELEMENTS];
                let halves = &mut halves[..range.len()];
                bytemuck::cast_slice_mut(halves).copy_from_slice(&bytes[2 * range.start..2 * range.end]);
                halves.convert_to_f32_slice(values);
            }
        }
    }
}

/// Copies little-endian elements into the words that hold them; a half-filled last word gets zero.
#[inline(always)]
pub(crate) fn bytes_to_words(bytes: &[u8], words: &mut [u32]) {
    let (whole, rest) = bytes.as_chunks::<4>();
    for (word, bytes) in words.iter_mut().zip(whole) {
        *word = u32::from_le_bytes(*bytes);
    }
    if let [low, high] = *rest {
        words[whole.len()] = u32::from_le_bytes([low, high, 0, 0]);
    }
}

/// Widens little-endian bf16 to words of one f32 each; a half-filled last pair gets zero.
#[inline(always)]
pub(crate) fn bf16_to_words(bytes: &[u8], words: &mut [u32]) {
    let (pairs, rest) = bytes.as_chunks::<4>();
    for (words, pair) in words.as_chunks_mut::<2>().0.iter_mut().zip(pairs) {
        let pair = u32::from_le_bytes(*pair);
        *words = [pair << 16, pair & !0xffff];
    }
    if let [low, high] = *rest {
        words[2 * pairs.len()..][..2].copy_from_slice(&[u32::from_le_bytes([0, 0, low, high]), 0]);
    }
}

/// Elements of a source row converted at a time; its words in all columns of a panel fit in L1.
const PACK_ELEMENTS: usize = 128;

/// A weight matrix `W [N, K]` (`y = x · Wᵀ`), or the pair gate and up, packed for the micro-kernel.
///
/// Columns of the product, that is rows of `W`, are cut into panels of `width` columns (32 for
/// AVX-512). A panel holds, for each step along K, one word for each of its columns. The word of column `n`
/// at step `s` is at
///
/// ```text
/// (n / width) · width · steps  +  place(s) · width  +  n % width
/// ```
///
/// where `place(s)` is `s` for kernels that read a panel from its first word to its last, and for others what
/// `Functions::place` says.
///
/// Columns beyond `N` in the last panel are zero, and so is the partner of the last bf16 of an odd K.
///
/// In the gated form, panel `p` holds `width / 2` columns of gate, then the same columns of up, so that
/// one tile has both and can store `silu(gate) · up`.
///
/// Weights in codes have panels of the same columns, in bytes that `Layout` describes; they become words when they are used.
pub struct PackedMatrix {
    /// Words, in a slab beside the matrices packed before and after: those of a layer are read in that order.
    memory: Piece,
    columns: usize,
    k: usize,
    element: ElementType,
    gated: bool,
    /// How panels of codes lie.
    coded: Option<Layout>,
    /// What multiplies with them in that order, if they are not decoded first.
    products: Option<CodedProducts>,
    functions: &'static Functions,
}

impl PackedMatrix {
    /// Packs `W [n, k]` into a piece of `slabs`; `row(i)` gives row `i`, in any type. Uses no memory beyond the result;
    /// nothing if there is none for that.
    ///
    /// # Panics
    /// If a row has not `k` elements or the processor does not support `isa`.
    pub(crate) fn pack<'a>(
        pool: &mut ComputePool,
        slabs: &Slabs,
        isa: Isa,
        element: ElementType,
        [n, k]: [usize; 2],
        row: impl Fn(usize) -> SourceRow<'a> + Sync,
    ) -> Option<Self> {
        let functions = Functions::for_weights(isa, element);
        let mut matrix = Self::zeros(slabs, functions, element, [n, k], false)?;
        let width = functions.width();
        matrix.fill(pool, |panel, column| {
            let n_index = panel * width + column;
            (n_index < n).then(|| row(n_index))
        });
        Some(matrix)
    }

    /// Packs `W_gate [i, k]` and `W_up [i, k]` into one gated matrix with `i` output columns.
    ///
    /// # Panics
    /// Like [`Self::pack`].
    pub(crate) fn pack_gated<'a>(
        pool: &mut ComputePool,
        slabs: &Slabs,
        isa: Isa,
        element: ElementType,
        [i, k]: [usize; 2],
        gate: impl Fn(usize) -> SourceRow<'a> + Sync,
        up: impl Fn(usize) -> SourceRow<'a> + Sync,
    ) -> Option<Self> {
        let functions = Functions::for_weights(isa, element);
        let mut matrix = Self::zeros(slabs, functions, element, [i, k], true)?;
        let lanes = functions.lanes;
        matrix.fill(pool, |panel, column| {
            let index = panel * lanes + column % lanes;
            (index < i).then(|| if column < lanes { gate(index) } else { up(index) })
        });
        Some(matrix)
    }

    fn zeros(
        slabs: &Slabs,
        functions: &'static Functions,
        element: ElementType,
        [columns, k]: [usize; 2],
        gated: bool,
    ) -> Option<Self> {
        let piece = |words: usize| slabs.cut(words.checked_mul(size_of::<u32>())?);
        let mut matrix =
            Self { memory: piece(0)?, columns, k, element, gated, coded: None, products: None, functions };
        matrix.memory = piece(matrix.panels().checked_mul(matrix.panel_words())?)?;
        Some(matrix)
    }

    /// Packs matrices in codes, one or gate and up, into a piece of `slabs`, with `int8_rows` for rows that become int8 if the format
    /// has such products; nothing if there is no memory for them.
    ///
    /// # Panics
    /// If the processor does not support `isa`, or two matrices differ in shape or format.
    pub(crate) fn pack_codes(
        pool: &mut ComputePool,
        slabs: &Slabs,
        isa: Isa,
        element: ElementType,
        int8_rows: bool,
        matrices: &[Codes],
    ) -> Option<Self> {
        let functions = Functions::select(isa, element);
        let Codes { format, rows, columns: k, .. } = matrices[0];
        let width = functions.width();
        let in_quads =
            Layout::in_quads(format, width, k).filter(|_| int8_rows).zip(Some(int8::products(isa)));
        let tiled = || Layout::in_tiles(format, width, k).zip(functions.tile_products);
        let (layout, products) = match in_quads.or_else(tiled) {
            Some((layout, products)) => (layout, Some(products)),
            None => (Layout::new(format, width, k), None),
        };
        let gated = matrices.len() > 1;
        let alike = |other: &Codes| (other.format, other.rows, other.columns) == (format, rows, k);
        assert!(matrices.iter().all(alike), "gate and up differ in kind");
        let empty = slabs.cut(0)?;
        let mut matrix = Self {
            memory: empty,
            columns: rows,
            k,
            element,
            gated,
            coded: Some(layout),
            products,
            functions,
        };
        let (panels, panel_bytes) = (matrix.panels(), layout.panel_bytes()?);
        matrix.memory = slabs.cut(panels.checked_mul(panel_bytes)?)?;
        let each = matrix.panel_columns();
        let bytes = SharedSlice::new(&mut matrix.memory);
        pool.run(panels, |panel| {
            // SAFETY: each task has its own panel.
            let bytes = unsafe { bytes.part(panel * panel_bytes..(panel + 1) * panel_bytes) };
            for column in 0..layout.width {
                let row = panel * each + column % each;
                if row < rows {
                    layout.pack(&matrices[column / each], row, column, bytes);
                }
            }
        });
        Some(matrix)
    }

    /// Packs each panel as one task; `source(panel, column)` is `None` for padding.
    fn fill<'a>(
        &mut self,
        pool: &mut ComputePool,
        source: impl Fn(usize, usize) -> Option<SourceRow<'a>> + Sync,
    ) {
        let (panels, panel_words) = (self.panels(), self.panel_words());
        let (functions, k, element) = (self.functions, self.k, self.element);
        let (width, all_steps) = (functions.width(), self.steps());
        let words = SharedSlice::new(bytemuck::cast_slice_mut(&mut self.memory));
        pool.run(panels, |panel| {
            // SAFETY: each task has its own panel.
            let words = unsafe { words.part(panel * panel_words..(panel + 1) * panel_words) };
            let rows: Vec<_> =
                (0..width).filter_map(|column| Some((column, source(panel, column)?))).collect();
            for (_, row) in &rows {
                assert_eq!(row.len(), k, "a weight row has the wrong length");
            }
            for start in (0..k).step_by(PACK_ELEMENTS) {
                let range = start..k.min(start + PACK_ELEMENTS);
                let steps = element.steps(range.start)..element.steps(range.end);
                let places = steps.clone().map(|step| (functions.place)(step, all_steps));
                let places: Vec<_> = places.collect();
                for &(column, row) in &rows {
                    let mut row_words = [0; PACK_ELEMENTS];
                    let row_words = &mut row_words[..steps.len()];
                    row.write_words(range.clone(), element, row_words);
                    for (place, word) in places.iter().zip(row_words) {
                        words[place * width + column] = *word;
                    }
                }
            }
        });
    }

    /// Columns of the product: `N`, or the intermediate width of a gated pair.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Length of the rows multiplied with it.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Type of the weights, and of the activations they are multiplied with.
    pub fn element(&self) -> ElementType {
        self.element
    }

    /// Whether it is a pair gate and up, whose product is `silu(gate) · up`.
    pub fn gated(&self) -> bool {
        self.gated
    }

    /// Memory taken, in bytes.
    pub fn bytes(&self) -> usize {
        self.memory.len()
    }

    /// Whether both can be used in one grouped call.
    pub(crate) fn same_kind(&self, other: &Self) -> bool {
        let kind = |matrix: &Self| (matrix.columns, matrix.k, matrix.element, matrix.gated, matrix.coded);
        kind(self) == kind(other) && std::ptr::eq(self.functions, other.functions)
    }

    pub(crate) fn functions(&self) -> &'static Functions {
        self.functions
    }

    pub(crate) fn steps(&self) -> usize {
        self.element.steps(self.k)
    }

    /// Output columns made by one panel.
    pub(crate) fn panel_columns(&self) -> usize {
        if self.gated { self.functions.lanes } else { self.functions.width() }
    }

    pub(crate) fn panels(&self) -> usize {
        self.columns.div_ceil(self.panel_columns())
    }

    pub(crate) fn panel_words(&self) -> usize {
        self.functions.width() * self.steps()
    }

    fn words(&self) -> &[u32] {
        bytemuck::cast_slice(&self.memory)
    }

    /// How its panels of codes lie; nothing if they are words.
    pub(crate) fn coded(&self) -> Option<Layout> {
        self.coded
    }

    /// The same with what multiplies with panels in that order; nothing if they are words, or codes that are decoded first.
    pub(crate) fn coded_products(&self) -> Option<(Layout, CodedProducts)> {
        self.coded.zip(self.products)
    }

    /// The bytes of a panel of codes.
    pub(crate) fn coded_panel(&self, layout: &Layout, panel: usize) -> &[u8] {
        let bytes = layout.panel_bytes().expect("it was packed");
        &self.memory[panel * bytes..][..bytes]
    }

    pub(crate) fn panel(&self, panel: usize) -> &[u32] {
        &self.words()[panel * self.panel_words()..][..self.panel_words()]
    }
}

/// Zeroed words that begin on a cache line.
pub(crate) struct AlignedWords {
    pages: Pages,
}

impl AlignedWords {
    /// # Panics
    /// If the system has no memory left.
    pub(crate) fn zeros(len: usize) -> Self {
        Self { pages: Pages::new(len * size_of::<u32>()).expect("out of memory") }
    }

    /// Makes it at least `len` words long; the contents may be lost.
    pub(crate) fn grow(&mut self, len: usize) {
        if self.len() < len {
            *self = Self::zeros(len);
        }
    }
}

impl Deref for AlignedWords {
    type Target = [u32];

    fn deref(&self) -> &[u32] {
        bytemuck::cast_slice(&self.pages)
    }
}

impl DerefMut for AlignedWords {
    fn deref_mut(&mut self) -> &mut [u32] {
        bytemuck::cast_slice_mut(&mut self.pages)
    }
}

/// A slice of which several threads write different parts.
pub(crate) struct SharedSlice<'a, T> {
    start: *mut T,
    len: usize,
    slice: PhantomData<&'a mut [T]>,
}

// SAFETY: parts are handed out under the promise that they do not overlap.
unsafe impl<T: Send> Sync for SharedSlice<'_, T> {}

impl<'a, T> SharedSlice<'a, T> {
    pub(crate) fn new(slice: &'a mut [T]) -> Self {
        Self { start: slice.as_mut_ptr(), len: slice.len(), slice: PhantomData }
    }

    /// Part `range` of the slice.
    ///
    /// # Safety
    /// While the part lives, no other part that overlaps it does.
    #[expect(clippy::mut_from_ref, reason = "disjoint parts, by the caller's promise")]
    pub(crate) unsafe fn part(&self, range: Range<usize>) -> &mut [T] {
        assert!(range.start <= range.end && range.end <= self.len, "part outside the slice");
        // SAFETY: in bounds by the assertion; not aliased by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(range.start), range.len()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pack_scalar(element: ElementType, [n, k]: [usize; 2], values: &[f32]) -> PackedMatrix {
        let mut pool = ComputePool::new(2).expect("threads");
        PackedMatrix::pack(&mut pool, &Slabs::default(), Isa::Scalar, element, [n, k], |row| {
            SourceRow::F32(bytemuck::cast_slice(&values[row * k..][..k]))
        })
        .expect("memory")
    }

    #[test]
    fn what_does_not_fit_into_memory_is_not_packed() {
        let mut pool = ComputePool::new(1).expect("a thread");
        let none = |_| -> SourceRow<'static> { unreachable!("there is nothing to fill") };
        let (slabs, shape) = (Slabs::default(), [1 << 10, 1 << 40]);
        assert!(PackedMatrix::pack(&mut pool, &slabs, Isa::Scalar, ElementType::F32, shape, none).is_none());
    }

    /// W [10, 3] of f32 in panels of 8 columns: W[9, 2] is in panel 1, step 2, column 1, that is at
    /// word 1·8·3 + 2·8 + 1 = 41 of 48.
    #[test]
    fn f32_word_index_worked_example() {
        let values: Vec<f32> = (0..30).map(|index| index as f32).collect();
        let packed = pack_scalar(ElementType::F32, [10, 3], &values);
        assert_eq!(packed.words().len(), 48);
        assert_eq!(packed.words().as_ptr().addr() % 64, 0);
        assert_eq!(f32::from_bits(packed.words()[41]), 9.0 * 3.0 + 2.0);
        assert_eq!(packed.words()[42..48], [0; 6], "columns 10..16 do not exist");
    }

    /// W [10, 3] of bf16 has 2 steps: W[9, 2] is the low half of word 1·8·2 + 1·8 + 1 = 25 of 32.
    #[test]
    fn bf16_word_index_worked_example() {
        let values: Vec<f32> = (0..30).map(|index| index as f32).collect();
        let packed = pack_scalar(ElementType::Bf16, [10, 3], &values);
        assert_eq!(packed.words().len(), 32);
        assert_eq!(packed.words()[25], u32::from(bf16::from_f32(29.0).to_bits()));
        let pair = [27.0, 28.0].map(|value| u32::from(bf16::from_f32(value).to_bits()));
        assert_eq!(packed.words()[17], pair[0] | pair[1] << 16, "W[9, 0] and W[9, 1]");
    }

    /// 1.0, −2.0 and 3.0 are three words of f32; the partner of the last is zero.
    #[test]
    fn widened_words_worked_example() {
        let numbers = [1.0, -2.0, 3.0].map(bf16::from_f32);
        let mut words = [7; 5];
        bf16_to_words(bytemuck::cast_slice(&numbers), &mut words);
        assert_eq!(words.map(f32::from_bits)[..4], [1.0, -2.0, 3.0, 0.0]);
        assert_eq!(words[4], 7, "nothing is written beyond");
    }

    #[test]
    fn every_source_type_gives_the_same_words() {
        let mut pool = ComputePool::new(2).expect("threads");
        let values: Vec<f32> = (0..20 * 301).map(|index| (index % 251) as f32 - 125.0).collect();
        let as_bf16: Vec<bf16> = values.iter().map(|value| bf16::from_f32(*value)).collect();
        let as_f16: Vec<f16> = values.iter().map(|value| f16::from_f32(*value)).collect();
        for element in [ElementType::F32, ElementType::Bf16] {
            let mut pack = |row: &(dyn Fn(usize) -> SourceRow<'static> + Sync)| {
                PackedMatrix::pack(&mut pool, &Slabs::default(), Isa::Scalar, element, [20, 301], row)
                    .expect("memory")
                    .words()
                    .to_vec()
            };
            let values: &'static [f32] = values.clone().leak();
            let as_bf16: &'static [bf16] = as_bf16.clone().leak();
            let as_f16: &'static [f16] = as_f16.clone().leak();
            let expected = pack(&|row| SourceRow::F32(bytemuck::cast_slice(&values[row * 301..][..301])));
            let from_bf16 = pack(&|row| SourceRow::Bf16(bytemuck::cast_slice(&as_bf16[row * 301..][..301])));
            let from_f16 = pack(&|row| SourceRow::F16(bytemuck::cast_slice(&as_f16[row * 301..][..301])));
            assert!(from_bf16 == expected && from_f16 == expected);
        }
    }
}
