//! What the ranks tell each other before anything moves: the layer's only blocking exchange.

use crate::dispatch::Outgoing;
use crate::run::MoeLayer;
use crate::{ExpertPipeline, HostTimes, PipelineError};
use epsmoe_base::{Fault, FaultKind, Place, Rank, hash_bytes};
use epsmoe_device::Backend;
use epsmoe_fabric::Fabric;
use epsmoe_plan::{Feedback, LayerCounts, RankCounts, StageTable, Traffic};
use std::time::Instant;

/// What every rank knows after the rendezvous: the same on all of them.
pub(crate) struct Plan {
    pub(crate) counts: LayerCounts,
    pub(crate) table: StageTable,
    pub(crate) traffic: Traffic,
}

impl<B: Backend, F: Fabric<B>> ExpertPipeline<B, F> {
    /// Gathers every rank's counts and plans the layer. Each message leads with a digest of everything the
    /// plan depends on besides the counts; ranks that disagree would plan different layers, so they stop
    /// here, by name.
    pub(crate) fn rendezvous(
        &self,
        layer: &MoeLayer,
        table: Option<&StageTable>,
        outgoing: &Outgoing,
        times: &mut HostTimes,
    ) -> Result<Plan, PipelineError> {
        let (place, placement) = (Place::layer(layer.layer), &self.options.placement);
        let digest = self.digest(layer, table).to_le_bytes();
        let learned = self.scheduler.as_ref().and_then(|scheduler| scheduler.borrow_mut().take_feedback());
        let learned = learned.map_or_else(Vec::new, |feedback| feedback.encode());
        let message = [digest.as_slice(), &outgoing.counts.encode(), &learned].concat();
        let messages = self.fabric.all_gather("rendezvous", place, message)?;
        times.met = Some(Instant::now());
        let (mut ranks, mut feedback) = (Vec::with_capacity(messages.len()), Vec::new());
        for (rank, message) in messages.iter().enumerate() {
            let (theirs, rest) = message.split_at_checked(digest.len()).unwrap_or_default();
            if theirs != digest {
                return Err(disagreement(self.fabric.rank(), place, Rank(rank)).into());
            }
            let counts = RankCounts::encoded_len(placement.experts()).min(rest.len());
            let (counts, learned) = rest.split_at(counts);
            ranks.push(RankCounts::decode(counts, placement.experts())?);
            feedback.extend(Feedback::decode(learned));
        }
        let counts = LayerCounts::new(placement, layer.gate.top_k, ranks)?;
        let table = match (table, &self.scheduler) {
            (Some(table), _) => {
                table.validate(placement)?;
                table.clone()
            }
            (None, Some(scheduler)) => scheduler.borrow_mut().next_table(layer.layer, &counts, &feedback),
            (None, None) => self.options.policy.table(placement, &counts)?,
        };
        let traffic = Traffic::of(placement, &counts, &table);
        times.planned = Some(Instant::now());
        Ok(Plan { counts, table, traffic })
    }

    fn digest(&self, layer: &MoeLayer, table: Option<&StageTable>) -> u64 {
        let decisions = self.scheduler.as_ref().map(|scheduler| scheduler.borrow().digest());
        let common = (self.settings, layer.layer, layer.gate, decisions, table);
        hash_bytes(format!("{common:?}").as_bytes())
    }
}

/// Two ranks that would compute different layers.
pub fn disagreement(rank: Rank, place: Place, other: Rank) -> Fault {
    let message = format!(
        "{rank} and {other} were started with different settings or models; give every rank the same \
         checkpoint and the same flags"
    );
    Fault { kind: FaultKind::Mismatch, rank, place, message }
}
