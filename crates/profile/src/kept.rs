//! Runs of a profile whose time was over before it was whole, kept for the next attempt to go on from.

use crate::file::make_folder;
use crate::{Fingerprint, LayerRun, RankHost};
use epsmoe_base::files::{read_plain, write_whole};
use epsmoe_base::{Lane, Layer, Phase, Rank, Stage};
use epsmoe_plan::{Span, Timeline};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

/// Bytes of a file that is looked at: some ten times what a whole profile makes.
const MOST_BYTES: u64 = 1 << 30;

/// The runs of one attempt and those before it, by number of ranks and of the layer.
#[derive(Debug, Default)]
pub struct Kept {
    path: PathBuf,
    /// What they were measured on, and which layers there were.
    of: String,
    runs: BTreeMap<(usize, usize), Vec<LayerRun>>,
}

impl Kept {
    /// The runs beside a profile's file, if there are any of this hardware and these layers; a file that is damaged or
    /// of something else is as good as none.
    pub fn beside(profile: &Path, fingerprint: &Fingerprint, layers: &str) -> Self {
        let path = profile.with_extension("runs");
        let of = format!("{}, {}, {layers}", fingerprint.machine(), fingerprint.kernels());
        let read = read_plain(&path, MOST_BYTES).ok();
        let file = read.and_then(|bytes| serde_json::from_slice::<KeptFile>(&bytes).ok());
        let mut kept = Kept { path, of, runs: BTreeMap::new() };
        for run in file.filter(|file| file.of == kept.of).into_iter().flat_map(|file| file.runs) {
            let at = (run.ranks, run.layer);
            if let Some(run) = run.restored() {
                kept.runs.entry(at).or_default().push(run);
            }
        }
        kept
    }

    /// The runs of a layer over so many ranks.
    pub(crate) fn take(&mut self, ranks: usize, layer: usize) -> Vec<LayerRun> {
        self.runs.remove(&(ranks, layer)).unwrap_or_default()
    }

    /// Gives the runs of a layer back.
    pub(crate) fn put(&mut self, ranks: usize, layer: usize, runs: Vec<LayerRun>) {
        self.runs.insert((ranks, layer), runs);
    }

    /// Writes all runs down; says where.
    pub(crate) fn store(&self) -> io::Result<&Path> {
        let runs = self.runs.iter().flat_map(|(&at, runs)| runs.iter().map(move |run| KeptRun::of(at, run)));
        let file = KeptFile { of: self.of.clone(), runs: runs.collect() };
        make_folder(&self.path)?;
        write_whole(&self.path, |out| Ok(serde_json::to_writer(out, &file)?))?;
        Ok(&self.path)
    }

    /// The profile is whole: nothing is left to go on from.
    pub(crate) fn remove(&self) {
        // A file that stays is read again and told apart by what it is of.
        let _ = std::fs::remove_file(&self.path);
    }
}

#[derive(Serialize, Deserialize)]
struct KeptFile {
    of: String,
    runs: Vec<KeptRun>,
}

/// A [`LayerRun`] as it is written. Lanes are places in the list of all.
#[derive(Serialize, Deserialize)]
struct KeptRun {
    ranks: usize,
    layer: usize,
    layer_ns: u64,
    weights: usize,
    hosts: Vec<[u64; 5]>,
    spans: Vec<KeptSpan>,
}

#[derive(Serialize, Deserialize)]
struct KeptSpan(usize, Option<usize>, Option<usize>, usize, Phase, String, [u64; 2]);

impl KeptRun {
    fn of((ranks, layer): (usize, usize), run: &LayerRun) -> Self {
        let host = |host: &RankHost| [host.counted, host.packed, host.exchanged, host.planned, host.enqueued];
        let span = |span: &Span| {
            KeptSpan(
                span.rank.0,
                span.layer.map(|layer| layer.0),
                span.stage.map(|stage| stage.0),
                span.lane.index(),
                span.phase,
                span.name.to_string(),
                [span.start_ns, span.end_ns],
            )
        };
        KeptRun {
            ranks,
            layer,
            layer_ns: run.layer_ns,
            weights: run.weights,
            hosts: run.hosts.iter().map(host).collect(),
            spans: run.timeline.spans.iter().map(span).collect(),
        }
    }

    /// The run, unless it names what does not exist.
    fn restored(self) -> Option<LayerRun> {
        let host = |[counted, packed, exchanged, planned, enqueued]: [u64; 5]| RankHost {
            counted,
            packed,
            exchanged,
            planned,
            enqueued,
        };
        let ranks = self.ranks;
        let span = |KeptSpan(rank, layer, stage, lane, phase, name, [start_ns, end_ns]): KeptSpan| {
            Some(Span {
                rank: (rank < ranks).then_some(Rank(rank))?,
                layer: layer.map(Layer),
                stage: stage.map(Stage),
                lane: *Lane::ALL.get(lane)?,
                phase,
                name: name.into(),
                start_ns,
                end_ns,
            })
        };
        let spans = self.spans.into_iter().map(span).collect::<Option<_>>()?;
        let hosts: Vec<RankHost> = self.hosts.into_iter().map(host).collect();
        (hosts.len() == ranks).then_some(LayerRun {
            timeline: Timeline { spans },
            hosts,
            layer_ns: self.layer_ns,
            weights: self.weights,
            bits: 0,
        })
    }
}
