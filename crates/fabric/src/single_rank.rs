//! A world of one rank.

use crate::transport::{check_parts, check_subgroup};
use crate::{Control, Exchange, Transport};
use epsmoe_base::{DType, Fault, FaultCell, Lane, Place, Rank};
use epsmoe_device::op::Copy;
use epsmoe_device::{Backend, Buffer, DeviceError};
use std::sync::Arc;

/// Control and transport of a rank without others: what it sends comes back to it, by a copy on its own device.
#[derive(Clone, Debug, Default)]
pub struct SingleRank {
    faults: FaultCell,
}

impl Control for SingleRank {
    fn rank(&self) -> Rank {
        Rank(0)
    }

    fn size(&self) -> usize {
        1
    }

    fn exchange(&self, _what: &'static str, _place: Place, message: Vec<u8>) -> Result<Vec<Vec<u8>>, Fault> {
        Ok(vec![message])
    }

    fn faults(&self) -> &FaultCell {
        &self.faults
    }
}

impl<B: Backend> Transport<B> for SingleRank {
    fn ranks(&self) -> &[Rank] {
        &[Rank(0)]
    }

    fn all_to_all_v(
        &self,
        device: &B,
        lane: Lane,
        place: Place,
        exchange: Exchange,
    ) -> Result<(), DeviceError> {
        check_parts(&exchange, 1)?;
        let (x, out) = (bits(&exchange.send[0]), bits(&exchange.receive[0]));
        device.enqueue(lane, place, Copy { x, out })
    }

    fn subgroup(&self, ranks: &[Rank]) -> Result<Arc<dyn Transport<B>>, DeviceError> {
        check_subgroup(&[Rank(0)], Rank(0), ranks)?;
        Ok(Arc::new(self.clone()))
    }
}

/// A copy moves bits, whatever they mean: words are copied as floats of their size.
fn bits(buffer: &Buffer) -> Buffer {
    let dtype = if buffer.dtype == DType::U32 { DType::F32 } else { buffer.dtype };
    Buffer { dtype, ..buffer.clone() }
}
