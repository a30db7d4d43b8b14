//! Handles into a rank's memory. A handle owns nothing and orders nothing: events do.

use crate::DeviceError;
use epsmoe_base::DType;
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

    #[test]
    fn views_stay_inside() {
        assert_eq!(example().rows(1..2).unwrap().byte_range(), 24..48);
        assert_eq!(example().reshape(3).unwrap().rows, 4);
        let error = example().rows(1..3).unwrap_err().to_string();
        assert!(error.contains("rows 1..3") && error.contains("has 2 rows"), "{error}");
    }
}
