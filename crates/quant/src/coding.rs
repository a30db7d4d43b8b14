//! Which coding a tensor has: what the checkpoint holds decides, not what its configuration lists.

use crate::error::DAMAGED;
use crate::stored::StoredMatrix;
use crate::{GgmlType, QuantError, StoredTensor, StoredType};
use std::fmt;

/// How the weights of a matrix `[N, K]` are coded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Coding {
    /// `w[n, k] = (code[n, k] − zero) · scale`, one scale and zero for each block of the matrix.
    Blocks(Blocks),
    /// Blocks of GGUF along K.
    Ggml(GgmlType),
}

/// Codes with a scale for each block of the matrix. The last block of a row or column may be partial.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Blocks {
    /// What a code means.
    pub element: Element,
    /// Rows and columns that share a scale.
    pub rows: usize,
    /// See `rows`.
    pub columns: usize,
    /// Where a code is.
    pub order: Order,
    /// Whether each block has a zero of its own. Otherwise it is [`Element::zero`].
    pub zeros: bool,
}

/// What a code means before its scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Element {
    /// FP8 e4m3.
    E4M3,
    /// FP8 e5m2.
    E5M2,
    /// FP4 e2m1, two a byte.
    E2M1,
    /// Four bits without a sign, two a byte.
    U4,
    /// Eight bits without a sign.
    U8,
    /// Signed bytes.
    I8,
}

impl Element {
    /// Bits of a code.
    pub fn bits(self) -> usize {
        match self {
            Element::E2M1 | Element::U4 => 4,
            _ => 8,
        }
    }

    /// The code of zero where a block has no zero of its own.
    pub fn zero(self) -> f32 {
        match self {
            Element::U4 => 8.0,
            Element::U8 => 128.0,
            _ => 0.0,
        }
    }
}

/// Where the code of row n, column k is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Order {
    /// Rows of codes; of two in a byte the even column is in the low nibble.
    Rows,
    /// AWQ: `[K, N / 8]` words; nibble i of a word is column 0, 2, 4, 6, 1, 3, 5, 7 of its eight rows n.
    Awq,
    /// GPTQ: `[K / 8, N]` words of neighbours along K, zeros `[K / group, N / 8]`. `zero_offset` is what has to be
    /// added to a stored zero: 1, or 0 in the second version of the format.
    Gptq {
        /// See above.
        zero_offset: u8,
    },
}

impl fmt::Display for Coding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let blocks = match self {
            Coding::Ggml(format) => return write!(f, "GGUF {format}"),
            Coding::Blocks(blocks) => blocks,
        };
        let name = match (blocks.element, blocks.order, blocks.columns) {
            (Element::E4M3, ..) => "FP8 e4m3",
            (Element::E5M2, ..) => "FP8 e5m2",
            (Element::E2M1, _, 16) => "NVFP4",
            (Element::E2M1, ..) => "MXFP4",
            (_, Order::Awq, _) => "AWQ",
            (_, Order::Gptq { .. }, _) => "GPTQ",
            (Element::U4, ..) => "INT4",
            (Element::U8 | Element::I8, ..) => "INT8",
        };
        write!(f, "{name} in blocks of {} × {}", blocks.rows, blocks.columns)?;
        if blocks.zeros { f.write_str(" with zeros") } else { Ok(()) }
    }
}

/// What a configuration says that tensors cannot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Hints {
    /// Rows and columns of a block of FP8; needed where they are no powers of two.
    pub block: Option<[usize; 2]>,
    /// Columns of a group of integers.
    pub group: Option<usize>,
    /// GPTQ's zeros are stored as they are, not less one.
    pub gptq_v2: bool,
    /// GPTQ's columns are in an order of their own: the groups of neighbours differ.
    pub act_order: bool,
}

/// A coded tensor in a checkpoint: the tensors it is made of, seen as one of `[.., N, K]` weights.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CodedTensor {
    pub(crate) name: String,
    /// Matrices on top of each other, rows and columns of one.
    pub(crate) shape: [usize; 3],
    pub(crate) coding: Coding,
    pub(crate) codes: StoredMatrix,
    pub(crate) scales: Option<StoredMatrix>,
    /// Rows of scales of one matrix; 0 if all matrices share them.
    pub(crate) scale_rows: usize,
    pub(crate) zeros: Option<StoredMatrix>,
    pub(crate) global: Option<Global>,
    pub(crate) groups: Option<StoredMatrix>,
    /// Whether neighbours along K are in different groups.
    pub(crate) act_order: bool,
    /// Where the shape of the weights is written down, if it is.
    pub(crate) stated_shape: Option<StoredMatrix>,
    /// Tensors that belong to it and are not needed to decode it.
    beside: Vec<String>,
}

/// A scale of the whole tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Global {
    pub(crate) scale: StoredMatrix,
    /// Whether weights are divided by it.
    pub(crate) inverse: bool,
}

impl CodedTensor {
    /// The tensor that a plain checkpoint would keep under `name` with this shape, if it is coded. `find` tells which
    /// tensors there are. None if there is no such tensor, or a plain one.
    pub fn detect(
        name: &str,
        shape: &[usize],
        hints: &Hints,
        find: impl Fn(&str) -> Option<StoredTensor>,
    ) -> Result<Option<CodedTensor>, QuantError> {
        let [.., n, k] = *shape else { return Ok(None) };
        let matrices = shape[..shape.len() - 2].iter().product();
        let stem = name.strip_suffix(".weight").unwrap_or(name);
        let detector = Detector { name, stem, shape: [matrices, n, k], full: shape, hints, find: &find };
        let Some(coded) = detector.detect()? else { return Ok(None) };
        let stated_shape = detector.stated_shape()?;
        Ok(Some(CodedTensor { stated_shape, beside: detector.beside(), ..coded }))
    }

    /// Names of the tensors that it is made of, and of those that belong to it.
    pub fn tensors(&self) -> impl Iterator<Item = &str> {
        let global = self.global.as_ref().map(|global| &global.scale);
        let shape = self.stated_shape.as_ref();
        let parts = [self.scales.as_ref(), self.zeros.as_ref(), global, self.groups.as_ref(), shape];
        let parts = [Some(&self.codes)].into_iter().chain(parts).flatten().map(|part| part.name.as_str());
        parts.chain(self.beside.iter().map(String::as_str))
    }

    /// How its weights are coded.
    pub fn coding(&self) -> Coding {
        self.coding
    }

    /// Name of the tensor that holds the fixed scale of what is multiplied with it, if there is one.
    pub fn activation_scale(&self) -> Option<&str> {
        let fixed = |name: &&String| ACTIVATION_SCALES.iter().any(|ending| name.ends_with(ending));
        self.beside.iter().find(fixed).map(String::as_str)
    }
}

struct Detector<'a> {
    name: &'a str,
    stem: &'a str,
    /// Matrices, rows, columns.
    shape: [usize; 3],
    full: &'a [usize],
    hints: &'a Hints,
    find: &'a dyn Fn(&str) -> Option<StoredTensor>,
}

/// A stored tensor with its name.
struct Found {
    name: String,
    tensor: StoredTensor,
}

impl Detector<'_> {
    fn detect(&self) -> Result<Option<CodedTensor>, QuantError> {
        if let Some(codes) = self.named(self.name) {
            return match codes.tensor.dtype {
                StoredType::Ggml(format) => self.ggml(codes, format).map(Some),
                StoredType::F32 | StoredType::F16 | StoredType::BF16 => Ok(None),
                StoredType::E4M3 | StoredType::E5M2 | StoredType::I8 | StoredType::U8 => {
                    self.weight(codes).map(Some)
                }
                other => Err(self.error(format!("{other} holds no weights; {DAMAGED}"))),
            };
        }
        if let Some(codes) = self.named(&format!("{}.weight_packed", self.stem)) {
            return self.weight_packed(codes).map(Some);
        }
        if let Some(codes) = self.named(&format!("{}.qweight", self.stem)) {
            return self.qweight(codes).map(Some);
        }
        for (blocks, scales) in [("_blocks", "_scales"), (".blocks", ".scales")] {
            if let Some(codes) = self.named(&format!("{}{blocks}", self.name)) {
                return self.mxfp4_blocks(codes, &format!("{}{scales}", self.name)).map(Some);
            }
        }
        Ok(None)
    }

    /// `X.weight` of bytes: FP8, signed bytes or pairs of FP4, as their scales tell.
    fn weight(&self, codes: Found) -> Result<CodedTensor, QuantError> {
        let (name, stem) = (self.name, self.stem);
        let names = [
            format!("{name}_scale_inv"),
            format!("{name}_scale"),
            format!("{stem}.scale"),
            format!("{name}.scale"),
        ];
        let Some(scales) = names.iter().find_map(|name| self.named(name)) else {
            return Err(self.error(format!(
                "it is {}, but there is no `{}` beside it; {DAMAGED}",
                codes.tensor.dtype, names[0]
            )));
        };
        let element = match (codes.tensor.dtype, scales.tensor.dtype) {
            (StoredType::E4M3, _) => Element::E4M3,
            (StoredType::E5M2, _) => Element::E5M2,
            (StoredType::I8, StoredType::F32 | StoredType::BF16 | StoredType::F16) => Element::I8,
            _ => Element::E2M1,
        };
        match element {
            Element::E2M1 => self.fp4(codes, scales, (&format!("{name}_scale_2"), false)),
            Element::I8 => {
                let zeros = self.named(&format!("{stem}.weight_zero_point"));
                self.scaled(codes, element, scales, zeros)
            }
            _ => self.scaled(codes, element, scales, None),
        }
    }

    /// `X.weight_packed`: pairs of FP4, or words of integers.
    fn weight_packed(&self, codes: Found) -> Result<CodedTensor, QuantError> {
        let scales = self.required(&format!("{}.weight_scale", self.stem))?;
        if codes.tensor.dtype == StoredType::U8 {
            return self.fp4(codes, scales, (&format!("{}.weight_global_scale", self.stem), true));
        }
        if self.named(&format!("{}.weight_g_idx", self.stem)).is_some() {
            return Err(self.error(ACT_ORDER));
        }
        let [_, _, k] = self.shape;
        let words = codes.tensor.shape.last().copied().unwrap_or(0);
        let element =
            if words == k.div_ceil(4) && words != k.div_ceil(8) { Element::U8 } else { Element::U4 };
        let zeros = self.named(&format!("{}.weight_zero_point", self.stem));
        self.scaled(codes, element, scales, zeros)
    }

    /// Rows of codes with scales `[⌈N / rows⌉, ⌈K / columns⌉]`, or one scale for each row or for all.
    fn scaled(
        &self,
        codes: Found,
        element: Element,
        scales: Found,
        zeros: Option<Found>,
    ) -> Result<CodedTensor, QuantError> {
        let [matrices, n, k] = self.shape;
        let codes = match codes.tensor.dtype {
            StoredType::I32 => {
                self.component(codes, &[StoredType::I32], &[n, k.div_ceil(32 / element.bits())])?
            }
            dtype => self.component(codes, &[dtype], &[n, k])?,
        };
        let lead = &self.full[..self.full.len() - 2];
        let grid = match *scales.tensor.shape.as_slice() {
            [] | [1] => [1, 1],
            [rows] if rows == n && matrices == 1 => [n, 1],
            [ref of @ .., rows, columns] if of == lead => [rows, columns],
            [ref of @ .., rows] if of == lead && rows == n => [n, 1],
            ref of if of == lead => [1, 1],
            _ => [0, 0],
        };
        let hint = match element {
            Element::E4M3 | Element::E5M2 => self.hints.block.map(|[rows, columns]| (rows, columns)),
            _ => self.hints.group.map(|group| (1, group)),
        };
        let fitted = block_length(n, grid[0], hint.map(|hint| hint.0)).zip(block_length(
            k,
            grid[1],
            hint.map(|hint| hint.1),
        ));
        let Some((rows, columns)) = fitted else {
            return Err(self.misfit(&scales, "one scale for each block, row or the whole tensor"));
        };
        let blocks = Blocks { element, rows, columns, order: Order::Rows, zeros: zeros.is_some() };
        // A scale of the whole tensor serves every matrix in it.
        let scale_rows = if matches!(*scales.tensor.shape.as_slice(), [] | [1]) { 0 } else { grid[0] };
        let scales = self.floats(scales, grid[1])?;
        let zeros = zeros.map(|zeros| self.zeros(zeros, element, grid)).transpose()?;
        let coded = self.coded(blocks, codes, scales);
        Ok(CodedTensor { zeros, scale_rows, ..coded })
    }

    /// Zeros of rows of integers: signed bytes like the scales, or words that hold neighbours along N.
    fn zeros(&self, zeros: Found, element: Element, grid: [usize; 2]) -> Result<StoredMatrix, QuantError> {
        match (zeros.tensor.dtype, element) {
            (StoredType::I8, Element::I8) => {
                let columns = grid[1];
                let found =
                    zeros.tensor.shape.iter().try_fold(1usize, |all, &length| all.checked_mul(length));
                if found != grid[0].checked_mul(grid[1]) {
                    return Err(self.misfit(&zeros, &format!("{grid:?}")));
                }
                Ok(StoredMatrix { name: zeros.name, dtype: StoredType::I8, columns })
            }
            _ => {
                let words = grid[0].div_ceil(32 / element.bits());
                self.component(zeros, &[StoredType::I32], &[words, grid[1]])
            }
        }
    }

    /// Pairs of FP4 along K: with a power of two for each 32, or an e4m3 for each 16 and one scale of the tensor.
    /// `global` is that one's name, and whether it divides.
    fn fp4(&self, codes: Found, scales: Found, global: (&str, bool)) -> Result<CodedTensor, QuantError> {
        let [_, n, k] = self.shape;
        if k % 2 != 0 {
            return Err(self.error(format!("FP4 needs an even number of columns, of which it has {k}")));
        }
        let codes = self.component(codes, &[StoredType::U8, StoredType::I8], &[n, k / 2])?;
        let (kinds, columns): (&[StoredType], _) = match scales.tensor.dtype {
            StoredType::E4M3 => (&[StoredType::E4M3], 16),
            _ => (&[StoredType::E8M0, StoredType::U8], 32),
        };
        let scales = self.component(scales, kinds, &[n, k.div_ceil(columns)])?;
        let global = match columns {
            16 => {
                let (name, inverse) = global;
                let scale = self.required(name)?;
                if !matches!(*scale.tensor.shape.as_slice(), [] | [1]) {
                    return Err(self.misfit(&scale, "one number"));
                }
                Some(Global { scale: self.floats(scale, 1)?, inverse })
            }
            _ => None,
        };
        let blocks = Blocks { element: Element::E2M1, rows: 1, columns, order: Order::Rows, zeros: false };
        Ok(CodedTensor { global, ..self.coded(blocks, codes, scales) })
    }

    /// `[.., N, K / 32, 16]` bytes and `[.., N, K / 32]` scales.
    fn mxfp4_blocks(&self, codes: Found, scales: &str) -> Result<CodedTensor, QuantError> {
        let scales = self.required(scales)?;
        let [_, n, k] = self.shape;
        if k % 32 != 0 {
            return Err(self.error(format!("MXFP4 needs whole blocks of 32 columns, of which it has {k}")));
        }
        let mut codes = self.component(codes, &[StoredType::U8], &[n, k / 32, 16])?;
        codes.columns = k / 2;
        let scales = self.component(scales, &[StoredType::U8, StoredType::E8M0], &[n, k / 32])?;
        let blocks =
            Blocks { element: Element::E2M1, rows: 1, columns: 32, order: Order::Rows, zeros: false };
        Ok(self.coded(blocks, codes, scales))
    }

    /// `X.qweight` of AWQ or GPTQ, whose shapes differ.
    fn qweight(&self, codes: Found) -> Result<CodedTensor, QuantError> {
        let [_, n, k] = self.shape;
        let gptq = codes.tensor.shape.last() == Some(&n);
        let zero_offset = if self.hints.gptq_v2 { 0 } else { 1 };
        let (order, words) =
            if gptq { (Order::Gptq { zero_offset }, [k / 8, n]) } else { (Order::Awq, [k, n / 8]) };
        if n % 8 != 0 || (gptq && k % 8 != 0) {
            return Err(self.error(format!("words of eight weights do not fill [{n}, {k}]; {DAMAGED}")));
        }
        let codes = self.component(codes, &[StoredType::I32], &words)?;
        let scales = self.required(&format!("{}.scales", self.stem))?;
        let zeros = self.required(&format!("{}.qzeros", self.stem))?;
        let groups = scales.tensor.shape.first().copied().unwrap_or(0);
        let Some(columns) = block_length(k, groups, self.hints.group) else {
            return Err(self.misfit(&scales, "one row for each group of columns"));
        };
        let kinds = [StoredType::F16, StoredType::BF16, StoredType::F32];
        let scales = self.component(scales, &kinds, &[groups, n])?;
        let zeros = self.component(zeros, &[StoredType::I32], &[groups, n / 8])?;
        let index = if gptq { self.named(&format!("{}.g_idx", self.stem)) } else { None };
        let index = index.map(|index| self.component(index, &[StoredType::I32], &[k])).transpose()?;
        let blocks = Blocks { element: Element::U4, rows: 1, columns, order, zeros: true };
        let act_order = self.hints.act_order && index.is_some() && groups > 1;
        let coded = self.coded(blocks, codes, scales);
        Ok(CodedTensor { zeros: Some(zeros), groups: index, act_order, ..coded })
    }

    fn ggml(&self, codes: Found, format: GgmlType) -> Result<CodedTensor, QuantError> {
        let [_, n, k] = self.shape;
        let codes = self.component(codes, &[StoredType::Ggml(format)], &[n, k])?;
        if k % format.block() != 0 {
            let block = format.block();
            return Err(self.error(format!("{format} needs whole blocks of {block} columns, not {k}")));
        }
        Ok(CodedTensor {
            name: self.name.to_owned(),
            shape: self.shape,
            coding: Coding::Ggml(format),
            codes,
            scales: None,
            scale_rows: 0,
            zeros: None,
            global: None,
            groups: None,
            act_order: false,
            stated_shape: None,
            beside: Vec::new(),
        })
    }

    fn coded(&self, blocks: Blocks, codes: StoredMatrix, scales: StoredMatrix) -> CodedTensor {
        CodedTensor {
            name: self.name.to_owned(),
            shape: self.shape,
            coding: Coding::Blocks(blocks),
            codes,
            scales: Some(scales),
            scale_rows: self.shape[1],
            zeros: None,
            global: None,
            groups: None,
            act_order: false,
            stated_shape: None,
            beside: Vec::new(),
        }
    }

    /// `X.weight_shape`: rows and columns of `compressed-tensors`.
    fn stated_shape(&self) -> Result<Option<StoredMatrix>, QuantError> {
        let Some(found) = self.named(&format!("{}.weight_shape", self.stem)) else { return Ok(None) };
        self.component(found, &[StoredType::I64, StoredType::I32], &[2]).map(Some)
    }

    fn beside(&self) -> Vec<String> {
        let endings = ACTIVATION_SCALES.into_iter().chain(["k_scale", "v_scale", "output_scale"]);
        let names = endings.map(|ending| format!("{}.{ending}", self.stem));
        names.filter(|name| (self.find)(name).is_some()).collect()
    }

    /// A tensor of one of some formats whose shape is that of the matrices on top of each other, then `inner`.
    fn component(
        &self,
        found: Found,
        kinds: &[StoredType],
        inner: &[usize],
    ) -> Result<StoredMatrix, QuantError> {
        let lead = if inner.len() < 2 { &[][..] } else { &self.full[..self.full.len() - 2] };
        let due = [lead, inner].concat();
        if !kinds.contains(&found.tensor.dtype) {
            return Err(self.misfit(&found, &format!("{} of shape {due:?}", kinds[0])));
        }
        if found.tensor.shape != due {
            return Err(self.misfit(&found, &format!("{due:?}")));
        }
        let columns = inner.last().copied().unwrap_or(1);
        Ok(StoredMatrix { name: found.name, dtype: found.tensor.dtype, columns })
    }

    /// Scales, whatever format they are in.
    fn floats(&self, found: Found, columns: usize) -> Result<StoredMatrix, QuantError> {
        let dtype = match found.tensor.dtype {
            StoredType::U8 => StoredType::E8M0,
            dtype if dtype.is_plain() || dtype == StoredType::E8M0 => dtype,
            _ => return Err(self.misfit(&found, "F32, BF16, F16 or F8_E8M0")),
        };
        Ok(StoredMatrix { name: found.name, dtype, columns })
    }

    fn named(&self, name: &str) -> Option<Found> {
        (self.find)(name).map(|tensor| Found { name: name.to_owned(), tensor })
    }

    fn required(&self, name: &str) -> Result<Found, QuantError> {
        self.named(name)
            .ok_or_else(|| self.error(format!("there is no `{name}` beside its codes; {DAMAGED}")))
    }

    fn misfit(&self, found: &Found, due: &str) -> QuantError {
        let [_, n, k] = self.shape;
        let (dtype, shape) = (found.tensor.dtype, &found.tensor.shape);
        self.error(format!(
            "`{}` is {dtype} of shape {shape:?}, where weights [{n}, {k}] need {due}; config.json and weights are of \
             different models, or {DAMAGED}",
            found.name
        ))
    }

    fn error(&self, problem: impl fmt::Display) -> QuantError {
        QuantError::new(format!("tensor `{}`: {problem}", self.name))
    }
}

const ACT_ORDER: &str = "its columns are quantised in an order of their own (act-order), which is not \
                                    read; use a version quantised without it, or an unquantised one";

/// What follows a module's name in that of the fixed scale of its input.
const ACTIVATION_SCALES: [&str; 2] = ["input_scale", "activation_scale"];

/// How long blocks are if `count` of them cover `length`: one for all, one for each, as told, or where nothing is told
/// the power of two that fits.
fn block_length(length: usize, count: usize, told: Option<usize>) -> Option<usize> {
    if length == 0 || count == 0 || count > length {
        return None;
    }
    let fits = |&block: &usize| block > 0 && length.div_ceil(block) == count;
    let powers = (0..usize::BITS - 1).map(|power| 1usize << power);
    match told.filter(|_| count != 1 && count != length) {
        Some(told) => Some(told).filter(fits),
        None => powers.into_iter().find(|block| length.div_ceil(*block) <= count).filter(fits),
    }
}
