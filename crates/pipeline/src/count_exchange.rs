//! What the ranks tell each other before anything moves: the layer's only blocking exchange.

use crate::batch::{Batch, Packed, Rows, Travel};
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
        let learned = self.planner.borrow_mut().take_feedback().map(|feedback| feedback.encode());
        let own = packed.iter().map(|batch| batch.counts.encode()).chain(learned);
        let messages = self.gather(call, &own.collect::<Vec<_>>().concat(), times)?;
        let len = TokenHistograms::encoded_len(map.slots());
        let of_batch = |number: usize| -> Result<LayerHistograms, PlanError> {
            let of_rank = |message: &Vec<u8>| {
                let rest = message.get(number * len..).unwrap_or_default();
                TokenHistograms::decode(&rest[..len.min(rest.len())], map.slots())
            };
            let ranks = messages.iter().map(of_rank).collect::<Result<_, _>>()?;
            LayerHistograms::new(map, call.layer.gate.top_k, ranks)
        };
        let counts = (0..packed.len()).map(of_batch).collect::<Result<Vec<_>, _>>()?;
        let feedback = messages.iter().filter_map(|message| message.get(packed.len() * len..));
        let feedback: Vec<Feedback> = feedback.filter_map(Feedback::decode).collect();
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

    /// Gathers what every rank has to tell, each behind the same digest; whoever has another would plan another layer,
    /// and is named.
    fn gather(
        &self,
        call: &Call<'_>,
        own: &[u8],
        times: &mut HostTimes,
    ) -> Result<Vec<Vec<u8>>, PipelineError> {
        let (place, digest) = (Place::layer(call.layer.layer), self.digest(call).to_le_bytes());
        let message = [digest.as_slice(), own].concat();
        let messages = self.fabric.control.exchange("count exchange", place, message)?;
        times.exchanged = Some(Instant::now());
        let stripped = messages.into_iter().enumerate().map(|(rank, message)| {
            let told = message.strip_prefix(digest.as_slice()).map(<[u8]>::to_vec);
            told.ok_or_else(|| disagreement(self.fabric.rank(), place, Rank(rank)).into())
        });
        stripped.collect()
    }

    fn digest(&self, call: &Call<'_>) -> u64 {
        let (layer, planner) = (call.layer, self.planner.borrow().digest());
        let common = (self.settings, layer.layer, layer.gate, layer.slots.digest(), planner, call.table);
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
