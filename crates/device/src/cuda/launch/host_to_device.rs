//! Words of the host, copied through the staging ring.

use super::{Launch, Refusal};
use crate::DeviceError;
use crate::cuda::driver::{Copy2d, End};
use crate::cuda::staging::Staging;
use crate::op::HostToDevice;

impl Launch<'_> {
    pub(super) fn host_to_device(&mut self, op: &HostToDevice) -> Result<(), Refusal> {
        let width = op.out.width;
        if op.words.is_empty() {
            return Ok(());
        }
        if self.kept.is_some() {
            let message =
                format!("{:?} is brought along by work that is to be repeated. This is a bug.", op.out);
            return Err(DeviceError::Unsupported(message).into());
        }
        let to = self.rows(&op.out)?;
        let longest = Staging::LONGEST / size_of::<u32>();
        // Rows without gaps are one long row, which may be cut anywhere; others are cut between rows.
        let (width, stride, piece) = if op.out.stride == width || op.out.rows == 1 {
            (1, 1, longest)
        } else {
            (width, op.out.stride, longest / width * width)
        };
        if piece == 0 {
            return Err(
                DeviceError::Shape(format!("host_to_device: the rows of {:?} are too long", op.out)).into()
            );
        }
        for (index, words) in op.words.chunks(piece).enumerate() {
            let staged = self.stage(bytemuck::cast_slice(words))?;
            let (bytes, rows) = (width * size_of::<u32>(), words.len() / width);
            let start = to.start + (index * (piece / width) * stride * size_of::<u32>()) as u64;
            let copy = match width {
                1 if stride == 1 => Copy2d {
                    from: End::Host(staged.host.cast()),
                    from_pitch: bytes * rows,
                    to: End::Device(start),
                    to_pitch: bytes * rows,
                    width: bytes * rows,
                    rows: 1,
                },
                _ => Copy2d {
                    from: End::Host(staged.host.cast()),
                    from_pitch: bytes,
                    to: End::Device(start),
                    to_pitch: stride * size_of::<u32>(),
                    width: bytes,
                    rows,
                },
            };
            // SAFETY: the ring's piece is ours until `sent`'s event; the target is declared by the operation and
            // ordered by the hazard check.
            unsafe { self.stream.copy(&copy) }?;
            self.sent(&staged)?;
        }
        Ok(())
    }
}
