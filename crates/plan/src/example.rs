//! The worked example of [`traffic`](crate::traffic), for tests.

use crate::*;

/// The layer.
pub(crate) struct Layer {
    pub(crate) map: SlotMap,
    pub(crate) counts: LayerHistograms,
    pub(crate) table: StageTable,
    pub(crate) traffic: Traffic,
}

pub(crate) fn layer() -> Layer {
    let map = SlotMap::contiguous(5, 2).unwrap();
    let routing = |experts: &[u32]| Routing::new(5, 2, experts.to_vec(), vec![0.5; experts.len()]).unwrap();
    let routings = [routing(&[2, 0, 1, 3, 0, 4]), routing(&[2, 3, 4, 3])];
    let ranks = routings.iter().map(|routing| TokenHistograms::of(&routing.assign(&map).unwrap()));
    let counts = LayerHistograms::new(&map, 2, ranks.collect()).unwrap();
    let table = StageTable::sized(&map, &[1, 2], GemmKind::Grouped).unwrap();
    let traffic = Traffic::of(&map, &counts, &table);
    Layer { map, counts, table, traffic }
}
