//! What the ranks tell each other before anything moves: the layer's only blocking exchange.

use crate::batch::{Batch, Packed, Rows, Travel};
use crate::count_message::CountMessage;
use crate::run::Call;
use crate::{ExpertPipeline, HostTimes, PipelineError};
use epsmoe_base::{Fault, FaultKind, Place, Rank, hash_bytes};
use epsmoe_device::Backend;
use epsmoe_plan::{Feedback, LayerHistograms, LayerPlan, PlanError, TokenHistograms, Traffic};
use std::time::Instant;

impl<B: Backend> ExpertPipeline<B> {
    /// Gathers every rank's counts of every batch and plans the layer. Each message leads with a digest of everything
    /// the plan depends on besides the counts; ranks that disagree would plan different layers, so they stop here, by
    /// name.
    pub(crate) fn exchange_counts(
        &self,
        call: &Call<'_>,
        packed: Vec<Packed>,
        times: &mut HostTimes,
    ) -> Result<Vec<Batch>, PipelineError> {
        let map = &*call.layer.slots;
        let own = CountMessage {
            digest: self.digest(call),
            counts: packed.iter().map(|batch| batch.counts.clone()).collect(),
            feedback: self.planner.borrow_mut().take_feedback(),
        };
        let messages = self.gather(call, &own, times)?;
        let of_batch = |number: usize| -> Result<LayerHistograms, PlanError> {
            let of_rank =
                |message: &CountMessage| message.counts.get(number).cloned().unwrap_or_else(nothing);
            LayerHistograms::of_fanout(map, call.layer.fanout(), messages.iter().map(of_rank).collect())
        };
        let counts = (0..packed.len()).map(of_batch).collect::<Result<Vec<_>, _>>()?;
        let feedback: Vec<Feedback> = messages.into_iter().filter_map(|message| message.feedback).collect();
        let plan = match call.table {
            Some(table) => {
                table.validate(map)?;
                LayerPlan { tables: vec![table.clone(); packed.len()] }
            }
            None => self.planner.borrow_mut().plan(call.layer.layer, map, &counts, &feedback)?,
        };
        times.planned = Some(Instant::now());
        let batches = packed.into_iter().zip(counts).zip(plan.tables);
        let batch =
            |((packed, counts), table): ((Packed, LayerHistograms), _)| -> Result<Batch, PipelineError> {
                let traffic = Traffic::of(map, &counts, &table);
                let Packed { tokens, buffers, .. } = packed;
                let (x, y) = (call.x.rows(tokens.clone())?, call.y.rows(tokens.clone())?);
                let rows = Rows::Travel(Box::new(Travel { counts, traffic }));
                Ok(Batch { tokens, x, y, buffers, table, rows })
            };
        batches.map(batch).collect()
    }

    /// Gathers what every rank has to tell; whoever has another digest would plan another layer, and is named.
    fn gather(
        &self,
        call: &Call<'_>,
        own: &CountMessage,
        times: &mut HostTimes,
    ) -> Result<Vec<CountMessage>, PipelineError> {
        let (place, slots) = (Place::layer(call.layer.layer), call.layer.slots.slots());
        let messages = self.fabric.control.exchange("count exchange", place, own.encode())?;
        times.exchanged = Some(Instant::now());
        let read = |(rank, message): (usize, &Vec<u8>)| match CountMessage::digest_of(message) {
            Some(digest) if digest == own.digest => Ok(CountMessage::decode(message, slots)?),
            _ => Err(disagreement(self.fabric.rank(), place, Rank(rank)).into()),
        };
        messages.iter().enumerate().map(read).collect()
    }

    fn digest(&self, call: &Call<'_>) -> u64 {
        let (layer, planner) = (call.layer, self.planner.borrow().digest());
        let common = (self.settings, layer.layer, layer.router, layer.slots.digest(), planner, call.table);
        hash_bytes(format!("{common:?}").as_bytes())
    }
}

/// What a rank announced of a batch that it does not have: contradicted where counts are checked.
fn nothing() -> TokenHistograms {
    TokenHistograms { tokens: 0, assignments: Vec::new(), first: Vec::new(), last: Vec::new() }
}

/// Two ranks that would compute different layers.
pub fn disagreement(rank: Rank, place: Place, other: Rank) -> Fault {
    let message = format!(
        "{rank} and {other} were started with different settings or models; give every rank the same \
         checkpoint and the same flags"
    );
    Fault { kind: FaultKind::Mismatch, rank, place, message }
}
