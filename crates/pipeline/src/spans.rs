//! What a device recorded, as spans of a timeline.

use epsmoe_base::Phase;
use epsmoe_device::Backend;
use epsmoe_plan::Span;

/// What ran on a device since the last call, if that was recorded.
pub fn take_spans<B: Backend>(device: &B) -> Vec<Span> {
    let rank = device.rank();
    let span = |record: epsmoe_device::Record| Span {
        rank,
        layer: record.place.layer,
        stage: record.place.stage,
        lane: record.lane,
        phase: record.place.phase.unwrap_or(Phase::Other),
        name: record.name.into(),
        start_ns: record.start_ns,
        end_ns: record.end_ns,
    };
    device.take_records().into_iter().map(span).collect()
}
