//! Handles into a rank's memory. A handle owns nothing and orders nothing: events do.

use crate::{DeviceError, Weight, WeightFormat};
use epsmoe_base::{DType, RowFormat};
use std::fmt;
use std::ops::Range;

/// One allocation of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct AllocationId(pub u32);

/// A two-dimensional view `[rows, width]` into an allocation; consecutive rows are `stride` elements apart.
///
/// Worked example: an allocation of 2 rows of 6 elements is `offset 0, rows 2, width 6, stride 6`; its
/// columns 4..6 are `offset 4, rows 2, width 2, stride 6`, the elements 4, 5, 10 and 11.
#[derive(Clone, PartialEq, Eq)]
pub struct Buffer {
    /// The allocation this is a view of.
    pub allocation: AllocationId,
    /// What the allocation was called, for messages.
    pub name: &'static str,
    /// Format of the elements.
    pub dtype: DType,
    /// First element of the first row.
    pub offset: usize,
    /// Number of rows.
    pub rows: usize,
    /// Elements of a row.
    pub width: usize,
    /// Elements between the starts of two consecutive rows.
    pub stride: usize,
}

impl Buffer {
    /// The rows in `range`.
    pub fn rows(&self, range: Range<usize>) -> Result<Buffer, DeviceError> {
        if range.start > range.end || range.end > self.rows {
            return Err(self.outside("rows", range, self.rows));
        }
        Ok(Buffer { offset: self.offset + range.start * self.stride, rows: range.len(), ..self.clone() })
    }

    /// The columns in `range` of every row.
    pub fn columns(&self, range: Range<usize>) -> Result<Buffer, DeviceError> {
        if range.start > range.end || range.end > self.width {
            return Err(self.outside("columns", range, self.width));
        }
        Ok(Buffer { offset: self.offset + range.start, width: range.len(), ..self.clone() })
    }

    /// The same elements seen as rows of `width`; needs rows without gaps.
    pub fn reshape(&self, width: usize) -> Result<Buffer, DeviceError> {
        let elements = self.rows * self.width;
        let gapless = self.stride == self.width || self.rows <= 1;
        if !gapless || width == 0 || !elements.is_multiple_of(width) {
            return Err(DeviceError::Shape(format!("{self:?} cannot be seen as rows of {width}")));
        }
        Ok(Buffer { rows: elements / width, width, stride: width, ..self.clone() })
    }

    /// The same bytes seen in another format of the same size.
    pub fn bits_as(&self, dtype: DType) -> Result<Buffer, DeviceError> {
        if dtype.bytes() != self.dtype.bytes() {
            return Err(DeviceError::Shape(format!("{self:?} cannot be seen as {dtype}")));
        }
        Ok(Buffer { dtype, ..self.clone() })
    }

    /// Where the same rows are as FP8 codes with their scales ([`RowFormat::Fp8`]): they fit where the numbers would be.
    pub fn as_fp8(&self) -> Result<Buffer, DeviceError> {
        let (dtype, width) = RowFormat::Fp8.elements(self.width);
        let words = |elements: usize| {
            let bytes = elements * self.dtype.bytes();
            bytes.is_multiple_of(dtype.bytes()).then_some(bytes / dtype.bytes())
        };
        match (words(self.offset), words(self.stride), words(self.width)) {
            (Some(offset), Some(stride), Some(room)) if width <= room => {
                Ok(Buffer { dtype, offset, stride, width, ..self.clone() })
            }
            _ => Err(DeviceError::Shape(format!(
                "{self:?} has no room for its rows as {width} words of codes"
            ))),
        }
    }

    /// Where rows go that `weight` is multiplied with next: as codes, if it takes them so.
    pub fn for_weight(&self, weight: &Weight) -> Result<Buffer, DeviceError> {
        if weight.format == WeightFormat::Fp8 { self.as_fp8() } else { Ok(self.clone()) }
    }

    /// Bytes from the first element to one past the last.
    pub fn byte_range(&self) -> Range<usize> {
        if self.rows == 0 || self.width == 0 {
            return 0..0;
        }
        let end = self.offset + (self.rows - 1) * self.stride + self.width;
        self.offset * self.dtype.bytes()..end * self.dtype.bytes()
    }

    fn outside(&self, what: &str, range: Range<usize>, limit: usize) -> DeviceError {
        DeviceError::Shape(format!(
            "{what} {}..{} asked of {:?}, which has {limit} {what}",
            range.start, range.end, self
        ))
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}[{}, {}] {}", self.name, self.rows, self.width, self.dtype)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example() -> Buffer {
        let allocation = AllocationId(0);
        Buffer { allocation, name: "x", dtype: DType::F32, offset: 0, rows: 2, width: 6, stride: 6 }
    }

    #[test]
    fn columns_of_the_worked_example() {
        let tail = example().columns(4..6).unwrap();
        assert_eq!((tail.offset, tail.rows, tail.width, tail.stride), (4, 2, 2, 6));
        assert_eq!(tail.byte_range(), 16..48);
        assert!(tail.reshape(1).is_err(), "its rows have gaps");
    }

    /// 384 numbers in bfloat16 are 192 words, their codes 96 and three scales.
    #[test]
    fn codes_fit_where_numbers_were() {
        let rows = Buffer { dtype: DType::BF16, offset: 800, width: 384, stride: 400, ..example() };
        let codes = rows.as_fp8().unwrap();
        assert_eq!((codes.dtype, codes.offset, codes.width, codes.stride), (DType::U32, 400, 99, 200));
        assert!(Buffer { offset: 801, ..rows.clone() }.as_fp8().is_err(), "not on a word");
        assert!(Buffer { width: 2, ..rows }.as_fp8().is_err(), "two numbers are a word, their codes two");
    }

    #[test]
    fn views_stay_inside() {
        assert_eq!(example().rows(1..2).unwrap().byte_range(), 24..48);
        assert_eq!(example().reshape(3).unwrap().rows, 4);
        let error = example().rows(1..3).unwrap_err().to_string();
        assert!(error.contains("rows 1..3") && error.contains("has 2 rows"), "{error}");
    }
}
