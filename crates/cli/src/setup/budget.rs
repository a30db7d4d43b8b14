//! What the memory of a processor is taken up by: weights, what is computed in, and the KV cache, which gets what is
//! left.

use super::{Processor, Setup};
use crate::args::CacheArgs;
use crate::memory;
use anyhow::{Result, bail};
use epsmoe_base::{Bytes, count};
use epsmoe_device::cuda;
use epsmoe_engine::{EngineOptions, Parallel};
use epsmoe_model::{BLOCK_SIZE, ModelOptions};
use std::fmt::Display;

/// The cache is sized before the model is loaded, by an estimate of what that will take: this share of what is free, in
/// percent, stays out of the sum.
const SPARE_PERCENT: u64 = 3;

/// States that are kept take at most one part in so many of the memory that is left for caches, unless somebody says how
/// many.
const KEPT_SHARE: u64 = 4;

/// Memory of a processor, which some ranks share.
struct Room {
    owner: &'static str,
    /// If nobody else used any.
    total: u64,
    available: u64,
}

/// What a model takes up in it, all of these ranks together.
struct Needs {
    weights: u64,
    buffers: u64,
    caches: u64,
}

impl Needs {
    fn total(&self) -> u64 {
        self.weights.saturating_add(self.buffers).saturating_add(self.caches)
    }
}

impl Setup {
    /// Refuses a model that the machine has too little memory for.
    pub(crate) fn check_memory(&self, options: &[EngineOptions]) -> Result<()> {
        let models: Vec<ModelOptions> = options.iter().map(EngineOptions::model).collect();
        // They may be there from an engine before.
        self.check_room_for(&models, self.gpu_weights.get().is_some())
    }

    /// Refuses models that all ranks of this machine run, if they have too little memory for them; unless they hold the
    /// weights already.
    pub(super) fn check_room_for(&self, options: &[ModelOptions], held: bool) -> Result<()> {
        // A host's memory is taken as it is touched, and experts' rows spread over the ranks.
        let on_gpu = matches!(self.processor, Processor::Cuda(_));
        let needs = self.needs(options, on_gpu || self.emulated.is_some(), held)?;
        let Some(room) = self.room()? else { return Ok(()) };
        let allowed = if on_gpu { (room.total as f64 * self.utilization) as u64 } else { room.total };
        if needs.total() <= room.available.min(allowed) {
            return Ok(());
        }
        let needed = format!(
            "{} needs {} for its weights ({}), {} for its caches and {} to compute in{}",
            self.model.name,
            Bytes(needs.weights),
            self.held,
            Bytes(needs.caches),
            Bytes(needs.buffers),
            self.processor.sharing().map_or(String::new(), |ranks| format!(" on {ranks} ranks")),
        );
        if needs.total() <= room.available {
            bail!(
                "{needed}, but may have {} of the {} of {}: raise --gpu-memory-utilization, which is {}",
                Bytes(allowed),
                Bytes(room.total),
                room.owner,
                self.utilization
            );
        }
        bail!(
            "{needed}, but {} has {} left of {}: {}",
            room.owner,
            Bytes(room.available),
            Bytes(room.total),
            match on_gpu {
                true =>
                    "use more GPUs, a smaller model, shorter contexts or fewer sequences, or end what else runs there",
                false => "use a smaller model, shorter contexts or fewer sequences",
            }
        )
    }

    /// Refuses what a command keeps beside the model, if this process may not have so much.
    pub(crate) fn check_room(&self, what: impl Display, bytes: u64) -> Result<()> {
        match memory::look() {
            Some(memory) if bytes > memory.available => bail!(
                "{what} need {}, but {} has {} left: ask for fewer tokens",
                Bytes(bytes),
                memory.bound.owner(),
                Bytes(memory.available)
            ),
            _ => Ok(()),
        }
    }

    /// The same options with a cache that fits: of the size that was asked for, or else of all the memory that is left,
    /// but no more than the most sequences of the greatest length need.
    pub(crate) fn with_cache(&self, options: EngineOptions, args: &CacheArgs) -> Result<EngineOptions> {
        let options = self.with_kept_states(options, args)?;
        let block = self.block_bytes(&options.parallel).max(1);
        let most = most_blocks(&options);
        let (fitting, from) = match (args.kv_cache_memory_bytes, self.left(&options)?) {
            (Some(asked), _) => (asked.0 / block, "--kv-cache-memory-bytes".to_owned()),
            (None, Some((left, from))) => ((left / block).min(most), from),
            (None, None) => (most, String::new()),
        };
        let blocks = (fitting as usize).min(u32::MAX as usize / BLOCK_SIZE);
        let (tokens, length) = (blocks * BLOCK_SIZE, options.max_model_len);
        if tokens < length {
            bail!(
                "the KV cache would hold {} ({from}), but one sequence may have {length}: lower --max-model-len{}",
                count(tokens, "token"),
                match args.kv_cache_memory_bytes {
                    Some(_) => ", or raise --kv-cache-memory-bytes",
                    None => ", or raise --gpu-memory-utilization",
                }
            );
        }
        Ok(EngineOptions { kv_blocks: Some(blocks), ..options })
    }

    /// The same options with slots for states that are kept: as many as were asked for, or else one for each sequence that
    /// may run.
    fn with_kept_states(&self, options: EngineOptions, args: &CacheArgs) -> Result<EngineOptions> {
        let spec = &self.model.spec;
        if !spec.has_states() || !options.prefix_caching {
            return match args.kept_states {
                Some(asked) if asked > 0 => bail!(
                    "--kept-states is {asked}, but sequences of {} carry no state along: leave it out",
                    self.model.name
                ),
                _ => Ok(options),
            };
        }
        let state = spec.state_bytes(self.dtype, options.parallel.tensor).max(1) as u64;
        let kept_states = match (args.kept_states, self.left(&options)?) {
            (Some(asked), _) => asked,
            (None, Some((left, _))) => options.max_sequences.min((left / KEPT_SHARE / state) as usize),
            (None, None) => options.max_sequences,
        };
        Ok(EngineOptions { kept_states, ..options })
    }

    /// The memory that each rank has for blocks of its cache beside all that these options reserve, and where it comes from;
    /// where that is known.
    fn left(&self, options: &EngineOptions) -> Result<Option<(u64, String)>> {
        let Some(room) = self.room()? else { return Ok(None) };
        let model = EngineOptions { kv_blocks: Some(0), ..options.clone() }.model();
        let needs = self.needs(&[model], true, self.gpu_weights.get().is_some())?;
        let all = share(&room, self.utilization);
        let from = format!(
            "what is left of {} of {} beside {} for weights and {} to compute in",
            Bytes(all),
            room.owner,
            Bytes(needs.weights),
            Bytes(needs.buffers)
        );
        Ok(Some((all.saturating_sub(needs.total()) / self.sharing_ranks() as u64, from)))
    }

    /// The cache of these options, in a few words.
    pub(crate) fn describe_cache(&self, options: &EngineOptions) -> String {
        let (spec, blocks) = (&self.model.spec, options.model().cache_blocks);
        let groups = self.ranks / options.parallel.tensor.max(1);
        let bytes = self.block_bytes(&options.parallel).saturating_mul(blocks as u64);
        let tokens = blocks * BLOCK_SIZE;
        let each = if groups > 1 { " for each group of ranks" } else { "" };
        let state = spec.state_bytes(self.dtype, options.parallel.tensor) as u64;
        let states = match spec.has_states() {
            true => format!(
                ", each of which carries {} along, and {} kept for prompts that begin alike",
                Bytes(state),
                count(options.kept_states, "such state")
            ),
            false => String::new(),
        };
        format!(
            "KV cache of {tokens} tokens{each} ({} a rank): {:.1} sequences of {} at once{states}",
            Bytes(bytes),
            tokens as f64 / options.max_model_len.max(1) as f64,
            options.max_model_len
        )
    }

    /// What models with these options take up together: with all that ranks reserve for the `worst` routing, or with
    /// what each would compute alone; without their weights where those are `held`.
    fn needs(&self, options: &[ModelOptions], worst: bool, held: bool) -> Result<Needs> {
        let (spec, dtype) = (&self.model.spec, self.dtype);
        let ranks = self.sharing_ranks();
        // What there is beside weights and buffers.
        let beside = match &self.processor {
            Processor::Cuda(_) => cuda::RANK_BYTES.saturating_mul(ranks as u64),
            // The largest weight is there twice while it is loaded.
            _ => spec.largest_part().saturating_mul(dtype.bytes() as u64),
        };
        let numbers = match ranks == self.ranks {
            _ if held => 0,
            // Processes share none.
            _ if self.launch.is_some() => {
                let of = |options: &ModelOptions| spec.parameters_of_rank(&options.parallel, self.ranks);
                options.iter().map(of).max().unwrap_or(0).saturating_mul(ranks as u64)
            }
            true => spec.parameters().total,
            // Ways to run the model that differ share what they can.
            false => {
                let of = |options: &ModelOptions| spec.parameters_of_rank(&options.parallel, self.ranks);
                options.iter().map(of).max().unwrap_or(0)
            }
        };
        let weights = self.held.bytes_of(numbers);
        let mut needs = Needs { weights, buffers: beside, caches: 0 };
        for model in options {
            let of_all = |bytes: u64| bytes.saturating_mul(ranks as u64);
            let all = of_all(match worst {
                true => model.reserved_bytes(spec, self.ranks, dtype, self.fp8_rows())?,
                false => {
                    let alone = ModelOptions { parallel: Parallel::default(), ..model.clone() };
                    alone.reserved_bytes(spec, 1, dtype, self.fp8_rows())?
                }
            });
            let cache = of_all(self.block_bytes(&model.parallel).saturating_mul(model.cache_blocks as u64));
            let made = of_all(if held { 0 } else { model.made_bytes(spec, dtype) });
            let buffers = all.saturating_sub(cache).saturating_add(made);
            needs.buffers = needs.buffers.saturating_add(buffers);
            needs.caches = needs.caches.saturating_add(cache);
        }
        if matches!(self.processor, Processor::Cuda(_)) {
            needs.buffers = needs.buffers.saturating_add(cuda::beside_pieces(needs.total()));
        }
        Ok(needs)
    }

    /// Numbers that are loaded for the ranks of this process.
    pub(super) fn numbers_here(&self) -> u64 {
        let (spec, here) = (&self.model.spec, self.here().len());
        if here == self.ranks {
            return spec.parameters().total;
        }
        spec.parameters_of_rank(&self.parallel, self.ranks).saturating_mul(here as u64)
    }

    /// Bytes of a block of the cache on the rank that has the most of it.
    fn block_bytes(&self, parallel: &Parallel) -> u64 {
        let token = self.model.spec.cache_bytes_per_token(self.cache.of(self.dtype), parallel.tensor);
        (token * BLOCK_SIZE) as u64
    }

    /// Ranks whose memory is the same: all of a host's or of one GPU, or else one.
    fn sharing_ranks(&self) -> usize {
        match &self.processor {
            Processor::Cuda(_) => self.processor.sharing().unwrap_or(1),
            _ => self.launch.as_ref().map_or(self.here().len(), |launch| launch.neighbours),
        }
    }

    /// The memory that ranks may use, where that is known: of several GPUs the one that has least left.
    fn room(&self) -> Result<Option<Room>> {
        let Processor::Cuda(devices) = &self.processor else {
            return Ok(memory::look().map(|memory| Room {
                owner: memory.bound.owner(),
                total: memory.total,
                available: memory.available,
            }));
        };
        let memories = devices.iter().map(|device| device.memory_bytes()).collect::<Result<Vec<_>, _>>()?;
        let owner = if devices.len() > 1 { "the fullest of the GPUs" } else { "the GPU" };
        Ok(memories.into_iter().min().map(|(available, total)| Room { owner, total, available }))
    }
}

/// What a model and its caches may take: a share of all memory, as far as it is free.
fn share(room: &Room, utilization: f64) -> u64 {
    let share = (room.total as f64 * utilization) as u64;
    share.min(room.available - room.available / 100 * SPARE_PERCENT)
}

/// Blocks that the most sequences of the greatest length need.
fn most_blocks(options: &EngineOptions) -> u64 {
    EngineOptions { kv_blocks: None, ..options.clone() }.model().cache_blocks as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn others_keep_what_they_have() {
        let room = |available| Room { owner: "", total: 1000, available };
        assert_eq!(share(&room(1000), 0.9), 900);
        assert_eq!(share(&room(500), 0.9), 485);
        assert_eq!(share(&room(500), 0.2), 200);
        assert_eq!(share(&room(0), 1.0), 0);
    }
}
