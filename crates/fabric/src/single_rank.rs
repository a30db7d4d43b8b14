//! A world of one rank.

use crate::{Exchange, Fabric};
use epsmoe_base::{DType, Fault, Lane, Place, Rank};
use epsmoe_device::op::Copy;
use epsmoe_device::{Backend, Buffer, DeviceError};

/// The fabric of a rank that is alone: what it sends comes back to it, by a copy on its own device.
#[derive(Clone, Copy, Debug, Default)]
pub struct SingleRank;

impl<B: Backend> Fabric<B> for SingleRank {
    fn rank(&self) -> Rank {
        Rank(0)
    }

    fn size(&self) -> usize {
        1
    }

    fn all_to_all_v(
        &self,
        device: &B,
        lane: Lane,
        place: Place,
        exchange: Exchange,
    ) -> Result<(), DeviceError> {
        let ([x], [out]) = (exchange.send.as_slice(), exchange.receive.as_slice()) else {
            return Err(DeviceError::Shape(format!("{}: a world of one rank has one part", exchange.name)));
        };
        device.enqueue(lane, place, Copy { x: bits(x), out: bits(out) })
    }

    fn all_gather(
        &self,
        _name: &'static str,
        _place: Place,
        message: Vec<u8>,
    ) -> Result<Vec<Vec<u8>>, Fault> {
        Ok(vec![message])
    }
}

/// A copy moves bits, whatever they mean: words are copied as floats of their size.
fn bits(buffer: &Buffer) -> Buffer {
    let dtype = if buffer.dtype == DType::U32 { DType::F32 } else { buffer.dtype };
    Buffer { dtype, ..buffer.clone() }
}
