//! The table of tensors.

use super::cursor::Cursor;
use super::damaged;
use crate::{GgmlType, QuantError, StoredTensor, StoredType};
use std::collections::BTreeMap;

const MOST_TENSORS: u64 = 1 << 20;
const LONGEST_NAME: usize = 256;
const MOST_DIMENSIONS: u32 = 4;

/// Formats that exist but are not read, for messages.
const NOT_READ: [(u32, &str); 13] = [
    (9, "Q8_1"),
    (15, "Q8_K"),
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (28, "F64"),
    (29, "IQ1_M"),
    (34, "TQ1_0"),
    (35, "TQ2_0"),
    (40, "NVFP4"),
];

/// A tensor of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GgufTensor {
    /// Its format and shape, slowest dimension first.
    pub tensor: StoredTensor,
    /// Its first byte in the file.
    pub start: u64,
    /// Bytes that it takes.
    pub bytes: u64,
}

/// Reads the table and holds it against the file: tensors lie in it, aligned, and apart from each other.
pub(super) fn read<E, F>(
    cursor: &mut Cursor<F>,
    count: u64,
    alignment: u64,
) -> Result<BTreeMap<String, GgufTensor>, E>
where
    E: From<QuantError>,
    F: Fn(&mut [u8], u64) -> Result<(), E>,
{
    if count > MOST_TENSORS {
        return Err(damaged(format!("it claims {count} tensors, of at most {MOST_TENSORS}")).into());
    }
    let mut tensors = BTreeMap::new();
    for number in 0..count {
        let name = cursor.text(&format!("the name of tensor {number}"))?;
        if name.len() > LONGEST_NAME {
            let problem =
                format!("the name of tensor {number} has {} bytes, of at most {LONGEST_NAME}", name.len());
            return Err(damaged(problem).into());
        }
        let tensor = entry(cursor, &name)?;
        if tensors.insert(name.clone(), tensor).is_some() {
            return Err(damaged(format!("tensor `{name}` is there twice")).into());
        }
    }
    place(&mut tensors, cursor.position().next_multiple_of(alignment), cursor.length(), alignment)?;
    Ok(tensors)
}

/// One tensor, its first byte still counted from the first tensor's.
fn entry<E, F>(cursor: &mut Cursor<F>, name: &str) -> Result<GgufTensor, E>
where
    E: From<QuantError>,
    F: Fn(&mut [u8], u64) -> Result<(), E>,
{
    let dimensions = cursor.u32(name)?;
    if dimensions > MOST_DIMENSIONS {
        let problem = format!("tensor `{name}` has {dimensions} dimensions, of at most {MOST_DIMENSIONS}");
        return Err(damaged(problem).into());
    }
    let mut shape = Vec::new();
    for _ in 0..dimensions {
        shape.push(cursor.u64(name)?);
    }
    shape.reverse();
    let dtype = stored_type(cursor.u32(name)?, name)?;
    let start = cursor.u64(name)?;
    let bytes = size(dtype, &shape)
        .ok_or_else(|| damaged(format!("tensor `{name}` of {dtype} has the impossible shape {shape:?}")))?;
    let shape = shape.into_iter().map(|width| width as usize).collect();
    Ok(GgufTensor { tensor: StoredTensor { dtype, shape }, start, bytes })
}

fn stored_type(number: u32, name: &str) -> Result<StoredType, QuantError> {
    Ok(match number {
        0 => StoredType::F32,
        1 => StoredType::F16,
        24 => StoredType::I8,
        26 => StoredType::I32,
        27 => StoredType::I64,
        30 => StoredType::BF16,
        _ => match GgmlType::numbered(number) {
            Some(format) => StoredType::Ggml(format),
            None => return Err(not_read(number, name)),
        },
    })
}

fn not_read(number: u32, name: &str) -> QuantError {
    let known = NOT_READ.iter().find(|(of, _)| *of == number);
    let what = known.map_or_else(|| format!("of type {number}"), |(_, known)| (*known).to_owned());
    let read: Vec<String> = GgmlType::all().map(|format| format.to_string()).collect();
    QuantError::new(format!(
        "tensor `{name}` is {what}, which is not read; use a file whose tensors are F32, F16, BF16, {}",
        read.join(", ")
    ))
}

/// Bytes of a tensor, whose rows must be whole blocks.
fn size(dtype: StoredType, shape: &[u64]) -> Option<u64> {
    let (block, bytes) = dtype.block();
    let row = shape.last().copied().unwrap_or(1);
    let elements = shape.iter().try_fold(1u64, |all, &width| all.checked_mul(width))?;
    let fits = row.is_multiple_of(block as u64) && usize::try_from(elements).is_ok();
    (elements / block as u64).checked_mul(bytes as u64).filter(|_| fits)
}

fn place(
    tensors: &mut BTreeMap<String, GgufTensor>,
    first: u64,
    length: u64,
    alignment: u64,
) -> Result<(), QuantError> {
    let mut in_order: Vec<(&String, &mut GgufTensor)> = tensors.iter_mut().collect();
    in_order.sort_by_key(|(_, tensor)| (tensor.start, tensor.bytes));
    let mut end = first;
    for (name, tensor) in in_order {
        let within = tensor.start;
        if !within.is_multiple_of(alignment) {
            let problem =
                format!("tensor `{name}` starts at byte {within}, which is no multiple of {alignment}");
            return Err(damaged(problem));
        }
        let start = first.checked_add(within);
        let Some((start, stop)) = start.and_then(|start| Some((start, start.checked_add(tensor.bytes)?)))
        else {
            return Err(damaged(format!("tensor `{name}` starts at byte {within}, far beyond any file")));
        };
        if start < end {
            let problem = format!(
                "tensor `{name}` overlaps the one before it: it starts at byte {start}, before {end}"
            );
            return Err(damaged(problem));
        }
        if stop > length {
            return Err(damaged(format!("tensor `{name}` ends at byte {stop}, but the file has {length}")));
        }
        tensor.start = start;
        end = stop;
    }
    Ok(())
}
