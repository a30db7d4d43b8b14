//! Panels of weights in their codes, and how they become words for the micro-kernels.
//!
//! A panel is a stream of *groups*, the columns along K that share a record of scales. A group begins with the records of the
//! panel's columns, number by number: the first number of all columns, then the second, … Codes follow in *units* of eight
//! columns of the product by eight along K, unit after unit of K and, for each, from the first eight columns of the panel to
//! the last:
//!
//! ```text
//! group │ header: scale of column 0, of column 1, … │ k 0..8: columns 0..8 │ k 0..8: 8..16 │ … │ k 8..16: 0..8 │ …
//! ```
//!
//! In a unit of bytes the eight columns of one k lie side by side. A unit of four bits is made for shuffles of bytes within
//! sixteen: of byte `16·(column / 4) + 8·h + 2·(column % 4) + p` the low nibble is `k = 2·h + p`, the high one `k = 4 + 2·h + p`.
//!
//! Where AMX multiplies with bfloat16, units are *tiles* of sixteen columns by 32 along K, and a decoded column of a tile is a row of
//! the tile that the processor multiplies: 32 elements along K, which most often have one scale. Of byte
//! `64·(column / 4) + 2·k + column % 4 / 2` an even column has the low nibble, an odd one the high; bytes lie column after column.
//!
//! Where rows are multiplied as int8 ([`super::int8`]), a unit is a vector of columns by eight along K, and has four elements of a
//! column side by side, which one instruction multiplies: byte `4·column + j` is `k = j`, the vector after it `k = 4 + j`. Of four bits
//! the low nibble is `k = j`, the high one `k = 4 + j`. A group fills whole blocks of 32 along K.
//!
//! Decoded words are those that a matrix of bfloat16 has when it is packed, so whatever multiplies with them gives the same bits.

use super::kernel::VECTORS;
use super::{ElementType, int8};
use epsmoe_quant::{Code, Codes, Format};
use half::bf16;
use std::ops::Range;

/// Columns of the product, and of K, in a unit that is not a tile.
pub(crate) const SIDE: usize = 8;

/// Columns of the product in a tile, and elements along K.
pub(crate) const TILE: [usize; 2] = [16, 32];

/// In what order codes lie in a panel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    /// Eight by eight, to be decoded.
    Units,
    /// For AMX.
    Tiles,
    /// For rows in int8.
    Quads,
}

/// Bytes that a record has at most: two factors, and scale and minimum of sixteen parts.
const MOST_RECORD: usize = 36;

/// How a panel of codes lies. What follows from format and width is kept: a group is short, and working it out takes as long as
/// multiplying with one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    pub format: Format,
    /// Columns of the panel.
    pub width: usize,
    /// Length of the rows that are multiplied.
    pub k: usize,
    pub order: Order,
    /// Columns of the product, and elements along K, in a unit.
    pub unit: [usize; 2],
    /// Bytes of a unit.
    pub unit_bytes: usize,
    /// Units side by side in the panel.
    pub octets: usize,
    /// Bytes from the beginning of a group to its codes.
    pub header_bytes: usize,
    /// Bytes of a group.
    pub group_bytes: usize,
}

/// The operands of a product of some rows with panels of codes, over all of K.
pub(crate) struct CodedTile<'a> {
    pub layout: &'a Layout,
    pub rows: usize,
    /// The first panel and the last, of one or two, or of neighbours.
    pub panels: [*const u8; 2],
    pub count: usize,
    /// Activations, as [`super::Blocks`] says, float32 in words; or as [`CodedProducts`] packs them.
    pub activations: *const u32,
    /// The panel that follows, which may be brought into L2 meanwhile.
    pub following: *const u8,
    /// Room for decoded weights, on a cache line: [`CodedProducts::decoded_words`].
    pub decoded: *mut u32,
    /// Sums `[panels, rows, width]`, written at the end.
    pub sums: *mut f32,
}

/// Products with panels of one order, tiles or quads, for any number of rows.
#[derive(Clone, Copy)]
pub(crate) struct CodedProducts {
    /// Words that the activations of so many rows are packed into.
    pub words: fn(&Layout, usize) -> usize,
    /// Packs the little-endian elements of all rows, one after the other.
    pub pack: unsafe fn(&Layout, ElementType, &[&[u8]], &mut [u32]),
    /// Words for decoded weights.
    pub decoded_words: usize,
    /// Neighbouring panels at once, at most, for so many rows.
    pub panels: fn(usize) -> usize,
    /// Multiplies with neighbouring panels. The sums have room for whole tiles of rows of the last.
    pub multiply: unsafe fn(&CodedTile<'_>),
}

/// Units along K that have the same scales.
pub(crate) struct Run {
    pub group: usize,
    /// Which part of the group.
    pub part: usize,
    /// Units of the group, [`SIDE`] elements along K each.
    pub units: Range<usize>,
    /// Elements along K from where decoding began to the first unit.
    pub at: usize,
}

impl Layout {
    /// Panels of `width` columns, whole units.
    pub(crate) fn new(format: Format, width: usize, k: usize) -> Self {
        Self::of_units(format, width, k, Order::Units, [SIDE; 2])
    }

    /// Panels of tiles; nothing if in some tile a column would have scales that are not those of its halves.
    pub(crate) fn in_tiles(format: Format, width: usize, k: usize) -> Option<Self> {
        let Format { code, group, part, .. } = format;
        let whole = |length: usize| length.is_multiple_of(TILE[1]);
        let alone = group == part && group >= k;
        let fits = alone || whole(group) && (whole(part) || code.bits() == 8 && part == TILE[1] / 2);
        fits.then(|| Self::of_units(format, width, k, Order::Tiles, TILE))
    }

    /// Panels for rows in int8; nothing if codes are no integers, or some block of 32 along K has scales of which none is that of a
    /// half.
    pub(crate) fn in_quads(format: Format, width: usize, k: usize) -> Option<Self> {
        let Format { code, group, part, .. } = format;
        let whole_row = group == part && group >= k && code != Code::E4M3;
        let unit = [width / VECTORS, SIDE];
        (whole_row || int8::multiplies(&format)).then(|| Self::of_units(format, width, k, Order::Quads, unit))
    }

    fn of_units(format: Format, width: usize, k: usize, order: Order, unit: [usize; 2]) -> Self {
        let [across, along] = unit;
        let (unit_bytes, octets) = (across * along * format.code.bits() / 8, width / across);
        let header_bytes = format.record_bytes() * width;
        let units = match order {
            Order::Quads => format.group.next_multiple_of(int8::BLOCK) / along,
            Order::Units | Order::Tiles => format.group.div_ceil(along),
        };
        let group_bytes = header_bytes + units * octets * unit_bytes;
        Layout { format, width, k, order, unit, unit_bytes, octets, header_bytes, group_bytes }
    }

    /// Bytes of a panel; nothing if there are too many.
    pub(crate) fn panel_bytes(&self) -> Option<usize> {
        self.format.groups(self.k).checked_mul(self.group_bytes)
    }

    /// Bytes from the beginning of a panel to the codes of element `k` along K, which begins a unit.
    pub(crate) fn offset(&self, k: usize) -> usize {
        let (group, unit) = (k / self.format.group, k % self.format.group / self.unit[1]);
        group * self.group_bytes + self.header_bytes + unit * self.octets * self.unit_bytes
    }

    /// What `k`, whole units but for the end, is made of.
    pub(crate) fn runs(&self, k: Range<usize>) -> impl Iterator<Item = Run> + use<> {
        let Format { group, part, .. } = self.format;
        let mut next = k.start;
        std::iter::from_fn(move || {
            if next >= k.end {
                return None;
            }
            let (first, within) = (next, next % group);
            next = (first - within + (within / part + 1) * part).min(k.end);
            let units = within / SIDE..(within + next - first).div_ceil(SIDE);
            Some(Run { group: first / group, part: within / part, units, at: first - k.start })
        })
    }

    /// Puts a column of a panel in its place: row `row` of `codes`.
    pub(crate) fn pack(&self, codes: &Codes, row: usize, column: usize, panel: &mut [u8]) {
        let Format { group, .. } = self.format;
        let groups = panel.chunks_exact_mut(self.group_bytes);
        for (index, panel) in groups.enumerate() {
            let (header, units) = panel.split_at_mut(self.header_bytes);
            let record = codes.record(row, index);
            for field in self.format.fields() {
                let at = field.start * self.width + column * field.len();
                header[at..at + field.len()].copy_from_slice(&record[field]);
            }
            let bytes = self.format.row_bytes(group);
            let from = codes.row(row).chunks(bytes).nth(index).unwrap_or_default();
            let [across, along] = self.unit;
            let own = units.chunks_exact_mut(self.unit_bytes).skip(column / across).step_by(self.octets);
            for (from, to) in from.chunks(self.format.row_bytes(along)).zip(own) {
                match self.order {
                    Order::Units => self.pack_unit(from, column % across, to),
                    Order::Tiles => self.pack_tile(from, column % across, to),
                    Order::Quads => self.pack_quads(from, column % across, to),
                }
            }
        }
    }

    fn pack_unit(&self, from: &[u8], column: usize, to: &mut [u8]) {
        if self.format.code.bits() == 8 {
            from.iter().enumerate().for_each(|(k, &code)| to[SIDE * k + column] = code);
            return;
        }
        let at = |pair: usize| from.get(pair).copied().unwrap_or(0);
        for h in 0..2 {
            let (low, high) = (at(h), at(2 + h));
            let first = 16 * (column / 4) + 8 * h + 2 * (column % 4);
            to[first] = low & 15 | (high & 15) << 4;
            to[first + 1] = low >> 4 | high & 0xf0;
        }
    }

    fn pack_tile(&self, from: &[u8], column: usize, to: &mut [u8]) {
        if self.format.code.bits() == 8 {
            to[TILE[1] * column..][..from.len()].copy_from_slice(from);
            return;
        }
        let (own, shift) = (&mut to[64 * (column / 4) + column % 4 / 2..], 4 * (column % 2));
        for (pair, &codes) in from.iter().enumerate() {
            own[4 * pair] |= (codes & 15) << shift;
            own[4 * pair + 2] |= (codes >> 4) << shift;
        }
    }

    fn pack_quads(&self, from: &[u8], column: usize, to: &mut [u8]) {
        if self.format.code.bits() == 8 {
            let vectors = to.chunks_exact_mut(4 * self.unit[0]);
            vectors
                .zip(from.chunks(4))
                .for_each(|(to, from)| to[4 * column..][..from.len()].copy_from_slice(from));
            return;
        }
        for (pair, &codes) in from.iter().enumerate() {
            let (own, shift) = (&mut to[4 * column + pair % 2 * 2..], pair / 2 * 4);
            own[0] |= (codes & 15) << shift;
            own[1] |= (codes >> 4) << shift;
        }
    }

    /// The code of element `k`, both counted in the unit.
    fn code(&self, unit: &[u8], column: usize, k: usize) -> u8 {
        let (byte, shift) = match (self.order, self.format.code.bits()) {
            (Order::Units, 8) => return unit[SIDE * k + column],
            (Order::Tiles, 8) => return unit[TILE[1] * column + k],
            (Order::Quads, 8) => return unit[4 * (k / 4 * self.unit[0] + column) + k % 4],
            (Order::Units, _) => {
                (16 * (column / 4) + 8 * (k % 4 / 2) + 2 * (column % 4) + k % 2, 4 * (k / 4))
            }
            (Order::Tiles, _) => (64 * (column / 4) + 2 * k + column % 4 / 2, 4 * (column % 2)),
            (Order::Quads, _) => (4 * column + k % 4, k / 4 * 4),
        };
        unit[byte] >> shift & 15
    }

    /// The words of elements `k` along K of a panel, which begin a unit, step by step `width` of them; to the end of the last
    /// unit of [`SIDE`]. Written as it is defined, for processors without vectors, and to hold the others to.
    pub(crate) fn decode(&self, panel: &[u8], k: Range<usize>, element: ElementType, out: &mut [u32]) {
        let [across, along] = self.unit;
        for run in self.runs(k) {
            let group = &panel[run.group * self.group_bytes..][..self.group_bytes];
            let (header, units) = group.split_at(self.header_bytes);
            for column in 0..self.width {
                let mut record = [0; MOST_RECORD];
                for field in self.format.fields() {
                    let from = &header[field.start * self.width + column * field.len()..][..field.len()];
                    record[field].copy_from_slice(from);
                }
                let affine = self.format.affine(&record[..self.format.record_bytes()], run.part);
                for (index, first) in run.units.clone().map(|unit| unit * SIDE).enumerate() {
                    let unit = (first / along * self.octets + column / across) * self.unit_bytes;
                    let unit = &units[unit..][..self.unit_bytes];
                    let words: [u32; SIDE] = std::array::from_fn(|k| {
                        let code = self.code(unit, column % across, first % along + k);
                        let weight =
                            (self.format.code.value(code) - affine.zero) * affine.scale - affine.minimum;
                        u32::from(bf16::from_f32(weight).to_bits()) << 16
                    });
                    let first = run.at + index * SIDE;
                    match element {
                        ElementType::F32 => {
                            for (k, word) in words.into_iter().enumerate() {
                                out[(first + k) * self.width + column] = word;
                            }
                        }
                        ElementType::Bf16 => {
                            for (step, pair) in words.as_chunks::<2>().0.iter().enumerate() {
                                out[(first / 2 + step) * self.width + column] = pair[0] >> 16 | pair[1];
                            }
                        }
                    }
                }
            }
        }
    }
}

/// [`Layout::decode`] as a kernel.
///
/// # Safety
/// None is needed; those for other processors want their instructions.
pub(crate) unsafe fn decode_portable(
    layout: &Layout,
    panel: &[u8],
    k: Range<usize>,
    element: ElementType,
    out: &mut [u32],
) {
    layout.decode(panel, k, element, out);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::gemm::{Isa, kernel::Functions};
    use epsmoe_base::Mix;
    use epsmoe_quant::Scale;

    const FORMATS: [Format; 6] = [
        Format { code: Code::E2M1, scale: Scale::E8M0, group: 32, part: 32, zeros: false },
        Format { code: Code::U4, scale: Scale::BF16, group: 32, part: 32, zeros: false },
        Format { code: Code::U4, scale: Scale::F16, group: 128, part: 128, zeros: true },
        Format { code: Code::U4, scale: Scale::NestedWithMinima, group: 256, part: 32, zeros: false },
        Format { code: Code::I8, scale: Scale::Nested, group: 256, part: 16, zeros: false },
        Format { code: Code::E4M3, scale: Scale::F32, group: 128, part: 128, zeros: false },
    ];

    fn random(mix: &mut Mix, format: Format, rows: usize, columns: usize) -> Codes {
        let mut byte = |below: usize| mix.below(below) as u8;
        let codes = (0..rows * format.row_bytes(columns)).map(|_| byte(127)).collect();
        // Halves between 2⁻¹² and 2, powers and floats about one, whatever their other bytes are.
        let records = (0..rows * format.groups(columns)).flat_map(|_| {
            let mut record: Vec<u8> = (0..format.record_bytes()).map(|_| byte(64)).collect();
            match format.scale {
                Scale::E8M0 => record[0] = 120 + byte(10),
                Scale::F32 | Scale::BF16 => record[format.fields().next().expect("a scale").end - 1] = 0x3c,
                _ => (),
            }
            record
        });
        Codes { format, rows, columns, codes, records: records.collect() }
    }

    /// A panel is what was packed into it, whatever the width and wherever decoding begins, and processors agree on it.
    #[test]
    fn panels_are_decoded_as_the_codes_are() {
        let seed = 31;
        println!("seed {seed}");
        let mut mix = Mix::new(seed);
        for (format, width, k) in FORMATS
            .into_iter()
            .flat_map(|format| [(8, 40), (16, 331), (32, 600)].map(|(width, k)| (format, width, k)))
        {
            let codes = random(&mut mix, format, width, k);
            let tiled = Layout::in_tiles(format, width, k).filter(|_| width.is_multiple_of(TILE[0]));
            let in_quads = Layout::in_quads(format, width, k);
            for layout in [Some(Layout::new(format, width, k)), tiled, in_quads].into_iter().flatten() {
                decode_as_the_codes_are(&mut mix, &layout, &codes);
            }
        }
    }

    fn decode_as_the_codes_are(mix: &mut Mix, layout: &Layout, codes: &Codes) {
        let &Layout { format, width, k, .. } = layout;
        let mut panel = vec![0; layout.panel_bytes().expect("small")];
        (0..width).for_each(|column| layout.pack(codes, column, column, &mut panel));
        for _ in 0..20 {
            let start = mix.below(k.div_ceil(SIDE)) * SIDE;
            let range = start..start + 1 + mix.below(k - start);
            for element in [ElementType::F32, ElementType::Bf16] {
                let each = if element == ElementType::F32 { 1 } else { 2 };
                let mut words = vec![0; range.len().next_multiple_of(SIDE) / each * width];
                layout.decode(&panel, range.clone(), element, &mut words);
                for column in 0..width {
                    let mut row = vec![0.0; k];
                    codes.decode(column, &mut row);
                    for (within, &want) in row[range.clone()].iter().enumerate() {
                        let word = words[within / each * width + column];
                        let got = if each == 2 && within % 2 == 0 { word << 16 } else { word & !0xffff };
                        let want = bf16::from_f32(want).to_f32().to_bits();
                        assert_eq!(
                            got, want,
                            "{format} in {:?}, width {width}, column {column}, {within} of {range:?}",
                            layout.order
                        );
                    }
                }
                if layout.order != Order::Units {
                    continue;
                }
                for isa in Isa::ALL.into_iter().filter(|isa| isa.is_supported()) {
                    let mut others = vec![0; words.len()];
                    let decode = Functions::select(isa, element).decode;
                    // SAFETY: the table exists only where its instructions do.
                    unsafe { decode(layout, &panel, range.clone(), element, &mut others) }
                    assert!(others == words, "{format}, width {width}, {range:?} by {isa}");
                }
            }
        }
    }

    /// Where something is in a panel of sixteen columns whose only code is 14, k = 45 of column 13.
    fn bytes_of_one_code(layout: &Layout) -> Vec<(usize, u8)> {
        let mut codes = vec![0; 16 * 32];
        codes[13 * 32 + 22] = 0xe0;
        let codes = Codes { format: FORMATS[1], rows: 16, columns: 64, codes, records: vec![0; 16 * 4] };
        let mut panel = vec![0; layout.panel_bytes().expect("small")];
        (0..16).for_each(|column| layout.pack(&codes, column, column, &mut panel));
        panel.into_iter().enumerate().filter(|(_, byte)| *byte != 0).collect()
    }

    /// Two groups of 32 of four bits, 16 columns wide: 32 bytes of scales, then 4 units of 2 · 32 bytes. k = 45 of column 13 is in
    /// group 1, unit 1 of it, the second eight columns: column 5 and k 5 of the unit, so in the high nibble of byte
    /// 16 · 1 + 8 · 0 + 2 · 1 + 1 = 19.
    #[test]
    fn place_of_a_code_worked_example() {
        let layout = Layout::new(FORMATS[1], 16, 64);
        assert_eq!((layout.header_bytes, layout.group_bytes), (32, 288));
        let at = 288 + 32 + (2 + 1) * 32 + 19;
        assert_eq!(layout.offset(40) + 32 + 19, at);
        assert_eq!(bytes_of_one_code(&layout), [(at, 0xe0)]);
    }

    /// The same in tiles of 256 bytes: k = 45 of column 13 is in group 1, at k 13 of its tile, in the high nibble (the column is odd) of byte
    /// 64 · 3 + 2 · 13 + 0 = 218.
    #[test]
    fn place_of_a_code_in_a_tile_worked_example() {
        let layout = Layout::in_tiles(FORMATS[1], 16, 64).expect("whole groups");
        assert_eq!((layout.header_bytes, layout.group_bytes), (32, 288));
        assert_eq!(bytes_of_one_code(&layout), [(288 + 32 + 218, 0xe0)]);
    }

    /// The same for rows in int8, in vectors of eight columns: k = 45 of column 13 is in group 1, unit 1 of it, of the second eight
    /// columns: k 5 of column 5, so in the high nibble of byte 4 · 5 + 1 = 21.
    #[test]
    fn place_of_a_code_for_rows_in_int8_worked_example() {
        let layout = Layout::in_quads(FORMATS[1], 16, 64).expect("whole groups");
        assert_eq!((layout.header_bytes, layout.group_bytes), (32, 288));
        assert_eq!(bytes_of_one_code(&layout), [(288 + 32 + (2 + 1) * 32 + 21, 0xe0)]);
    }

    /// What has scales for parts of a half of a tile keeps to units.
    #[test]
    fn formats_that_tiles_can_have() {
        let fits = |code, scale, [group, part]: [usize; 2], k| {
            Layout::in_tiles(Format { code, scale, group, part, zeros: false }, 32, k).is_some()
        };
        assert!(fits(Code::U4, Scale::F16, [32, 32], 100) && fits(Code::I8, Scale::Nested, [256, 16], 100));
        assert!(fits(Code::U4, Scale::F16, [40, 40], 40), "one group for a whole row");
        assert!(!fits(Code::U4, Scale::F16, [40, 40], 80) && !fits(Code::U4, Scale::F16, [16, 16], 64));
    }

    /// Rounding by multiplication is rounding to the nearest bfloat16, ties to even: every significand there is.
    #[test]
    fn veltkamp_rounds_as_bfloat16_does() {
        for significand in 1u32 << 23..1 << 24 {
            let value = f32::from_bits((127 << 23) | (significand & 0x7f_ffff));
            let above = value * 65537.0;
            assert_eq!(above - (above - value), bf16::from_f32(value).to_f32(), "{value:e}");
        }
    }
}
