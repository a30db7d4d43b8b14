//! What the ranks tell each other before anything moves: the layer's only blocking exchange.

use crate::dispatch::Outgoing;
use crate::run::MoeLayer;
use crate::{ExpertPipeline, HostTimes, PipelineError};
use epsmoe_base::{Fault, FaultKind, Place, Rank, hash_bytes};
use epsmoe_device::Backend;
use epsmoe_plan::{Feedback, LayerHistograms, StageTable, TokenHistograms, Traffic};
use std::time::Instant;

/// What every rank knows after the rendezvous: the same on all of them.
pub(crate) struct Plan {
    pub(crate) counts: LayerHistograms,
    pub(crate) table: StageTable,
    pub(crate) traffic: Traffic,
}

impl<B: Backend> ExpertPipeline<B> {
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
        let placement = &self.options.placement;
        let learned = self.scheduler.as_ref().and_then(|scheduler| scheduler.borrow_mut().take_feedback());
        let learned = learned.map_or_else(Vec::new, |feedback| feedback.encode());
        let news = [outgoing.counts.encode(), learned].concat();
        let messages = self.meet(layer, self.digest(layer, table), &news, times)?;
        let counts = self.counts(layer, &messages, 0)?;
        let learned =
            messages.iter().filter_map(|news| news.get(TokenHistograms::encoded_len(placement.experts())..));
        let feedback: Vec<Feedback> = learned.filter_map(Feedback::decode).collect();
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

    /// The rendezvous of two micro-batches: one message tells both ones' counts, and both tables are known.
    pub(crate) fn rendezvous_of_both(
        &self,
        layer: &MoeLayer,
        [first, second]: [&Outgoing; 2],
        times: &mut HostTimes,
    ) -> Result<[Plan; 2], PipelineError> {
        let placement = &self.options.placement;
        let news = [first.counts.encode(), second.counts.encode()].concat();
        let messages = self.meet(layer, self.digest(layer, None), &news, times)?;
        let plan = |position: usize, table: StageTable| -> Result<Plan, PipelineError> {
            let counts = self.counts(layer, &messages, position)?;
            let traffic = Traffic::of(placement, &counts, &table);
            Ok(Plan { counts, table, traffic })
        };
        let [first, second] = self.options.policy.micro_batches(placement)?;
        let plans = [plan(0, first)?, plan(1, second)?];
        times.planned = Some(Instant::now());
        Ok(plans)
    }

    /// Gathers what every rank has to tell, each behind the same digest; whoever has another would plan another layer,
    /// and is named.
    fn meet(
        &self,
        layer: &MoeLayer,
        digest: u64,
        news: &[u8],
        times: &mut HostTimes,
    ) -> Result<Vec<Vec<u8>>, PipelineError> {
        let (place, digest) = (Place::layer(layer.layer), digest.to_le_bytes());
        let message = [digest.as_slice(), news].concat();
        let messages = self.fabric.control.exchange("rendezvous", place, message)?;
        times.met = Some(Instant::now());
        let stripped = messages.into_iter().enumerate().map(|(rank, message)| {
            let news = message.strip_prefix(digest.as_slice()).map(<[u8]>::to_vec);
            news.ok_or_else(|| disagreement(self.fabric.rank(), place, Rank(rank)).into())
        });
        stripped.collect()
    }

    /// All ranks' counts, out of what they told: those at `position` if there are several.
    fn counts(
        &self,
        layer: &MoeLayer,
        messages: &[Vec<u8>],
        position: usize,
    ) -> Result<LayerHistograms, PipelineError> {
        let placement = &self.options.placement;
        let len = TokenHistograms::encoded_len(placement.experts());
        let own = |news: &Vec<u8>| {
            let rest = news.get(position * len..).unwrap_or_default();
            TokenHistograms::decode(&rest[..len.min(rest.len())], placement.experts())
        };
        let ranks = messages.iter().map(own).collect::<Result<_, _>>()?;
        Ok(LayerHistograms::new(placement, layer.gate.top_k, ranks)?)
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
