//! Memory of one GPU in pieces that never move: cut from larger slabs, given back together at the end.

use super::driver::{Context, CudaError, DeviceMemory, Stream};
use crate::threaded::Fill;
use cudarc::driver::sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY;
use std::sync::Arc;

/// Every piece starts on so many bytes: what the widest copies and TMA ask for.
const ALIGNMENT: usize = 256;

/// Slabs, the ends of some of which are still free.
pub(super) struct Pool {
    context: Arc<Context>,
    slabs: Vec<DeviceMemory>,
    room: Room,
    fill: Option<Fill>,
}

impl Pool {
    /// A pool whose pieces hold `fill`, or nothing defined.
    pub(super) fn new(context: &Arc<Context>, fill: Option<Fill>) -> Self {
        Pool { context: Arc::clone(context), slabs: Vec::new(), room: Room::default(), fill }
    }

    /// Address of a fresh piece; `None` if the GPU has not so much. `stream` fills it and is waited for.
    pub(super) fn take(&mut self, bytes: usize, stream: &Stream) -> Result<Option<u64>, CudaError> {
        let Some(bytes) = bytes.max(1).checked_next_multiple_of(ALIGNMENT) else { return Ok(None) };
        if self.room.fits(bytes).is_none() {
            // Where the GPU has no room for a slab, it may have some for the piece.
            let sizes = [self.room.next_slab(bytes), Some(bytes)].into_iter().flatten();
            for size in sizes {
                if self.slab(size, stream)? {
                    self.room.add(self.slabs.len() - 1, size);
                    break;
                }
            }
        }
        let taken = self.room.take(bytes);
        Ok(taken.map(|(slab, offset)| self.slabs[slab].start + offset as u64))
    }

    /// Allocates a slab, if the GPU has so much.
    fn slab(&mut self, bytes: usize, stream: &Stream) -> Result<bool, CudaError> {
        let slab = match DeviceMemory::new(&self.context, bytes) {
            Ok(slab) => slab,
            Err(error) if error.code == CUDA_ERROR_OUT_OF_MEMORY => return Ok(false),
            Err(error) => return Err(error),
        };
        if let Some(fill) = self.fill {
            let byte = if fill == Fill::Poison { 0xff } else { 0 };
            // SAFETY: the slab was just allocated with that size, and nobody else has it yet.
            unsafe { stream.fill(slab.start, byte, slab.bytes) }?;
            stream.synchronize()?;
        }
        self.slabs.push(slab);
        Ok(true)
    }
}

/// Which ends of slabs are free, and how large the next slab is to be.
///
/// A piece goes where it leaves the least behind; so the ends that large pieces leave are filled by small ones. Slabs grow
/// with what there is, so that small models stay small and what is lost at the ends of slabs stays a few hundredths.
#[derive(Default)]
struct Room {
    /// Slab, first free byte and free bytes.
    ends: Vec<(usize, usize, usize)>,
    /// Bytes of all slabs.
    total: usize,
}

impl Room {
    /// The driver's own granularity: what it allocates is a multiple of this.
    const PAGE: usize = 2 << 20;
    const SMALLEST: usize = 16 << 20;
    const LARGEST: usize = 512 << 20;
    /// Ends that are remembered: small ones are tried for every piece, and hardly any piece is as small.
    const MOST_ENDS: usize = 64;

    /// The end that a piece leaves the least of.
    fn fits(&self, bytes: usize) -> Option<usize> {
        let ends = self.ends.iter().enumerate().filter(|(_, (_, _, free))| *free >= bytes);
        ends.min_by_key(|(_, (_, _, free))| *free).map(|(index, _)| index)
    }

    /// Size of the slab that a piece which fits nowhere is to begin; `None` if there is no such number.
    fn next_slab(&self, bytes: usize) -> Option<usize> {
        let shared = (self.total / 16).clamp(Self::SMALLEST, Self::LARGEST);
        bytes.max(shared).checked_next_multiple_of(Self::PAGE)
    }

    fn add(&mut self, slab: usize, bytes: usize) {
        self.total += bytes;
        self.ends.push((slab, 0, bytes));
        if self.ends.len() > Self::MOST_ENDS {
            let smallest = self.ends.iter().enumerate().min_by_key(|(_, (_, _, free))| *free);
            let index = smallest.map_or(0, |(index, _)| index);
            self.ends.swap_remove(index);
        }
    }

    /// Cuts a piece off an end: its slab, and where it begins there.
    fn take(&mut self, bytes: usize) -> Option<(usize, usize)> {
        let end = self.fits(bytes)?;
        let (slab, start, free) = &mut self.ends[end];
        let offset = *start;
        *start += bytes;
        *free -= bytes;
        Some((*slab, offset))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use epsmoe_base::{Mix, env::test_seed};

    /// Takes pieces as a pool does on a GPU without limits; gives where they lie and the bytes of all slabs.
    fn place(pieces: impl IntoIterator<Item = usize>) -> (Vec<(usize, usize, usize)>, usize) {
        let (mut room, mut slabs, mut placed) = (Room::default(), 0, Vec::new());
        for bytes in pieces {
            if room.fits(bytes).is_none() {
                let size = room.next_slab(bytes).unwrap();
                room.add(slabs, size);
                slabs += 1;
            }
            let (slab, offset) = room.take(bytes).unwrap();
            placed.push((slab, offset, bytes));
        }
        (placed, room.total)
    }

    #[test]
    fn models_lose_a_few_hundredths() {
        const MIB: usize = 1 << 20;
        // Pieces of an expert, of the attention and of the norms; experts and layers; table.
        let models = [
            (
                "DeepSeek-V2-Lite",
                [11 * MIB, 11 * MIB / 2],
                vec![12 * MIB, 9 * MIB, 4 * MIB, 8192],
                64,
                26,
                400 * MIB,
            ),
            ("OLMoE-1B-7B", [8 * MIB, 4 * MIB], vec![8 * MIB; 4], 64, 16, 196 * MIB),
            (
                "Qwen3-30B-A3B",
                [6 * MIB, 3 * MIB],
                vec![16 * MIB, 2 * MIB, 2 * MIB, 16 * MIB, 8192],
                128,
                48,
                594 * MIB,
            ),
            (
                "gpt-oss-20b",
                [33 * MIB, 16 * MIB + MIB / 2],
                vec![22 * MIB, 3 * MIB, 23040],
                32,
                24,
                1104 * MIB,
            ),
        ];
        for (name, expert, attention, experts, layers, table) in models {
            let layer = || attention.iter().copied().chain((0..experts).flat_map(|_| expert));
            let pieces: Vec<usize> =
                [table, table].into_iter().chain((0..layers).flat_map(|_| layer())).collect();
            let weights: usize = pieces.iter().sum();
            let (_, total) = place(pieces);
            let lost = total as f64 / weights as f64 - 1.0;
            assert!(lost < 0.03, "{name}: {:.1} % more than its weights", 100.0 * lost);
        }
    }

    #[test]
    fn pieces_lie_side_by_side() {
        let seed = test_seed();
        let mut mix = Mix::new(seed);
        let mut piece = || {
            let most = 1 << (8 + mix.below(18));
            (1 + mix.below(most)).next_multiple_of(ALIGNMENT)
        };
        let pieces: Vec<usize> = (0..2000).map(|_| piece()).collect();
        let (mut placed, total) = place(pieces);
        placed.sort_unstable();
        for pair in placed.windows(2) {
            let [(slab, offset, bytes), (next, after, _)] = *pair else { unreachable!() };
            assert!(slab != next || offset + bytes <= after, "seed {seed}: {pair:?}");
            assert_eq!(offset % ALIGNMENT, 0);
        }
        assert!(total >= placed.iter().map(|(_, _, bytes)| bytes).sum());
    }

    #[test]
    fn a_piece_too_large_for_numbers_has_no_slab() {
        assert_eq!(Room::default().next_slab(usize::MAX - 5), None);
        assert_eq!(Room::default().next_slab(1), Some(Room::SMALLEST));
    }
}
