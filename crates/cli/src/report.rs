//! A bench as a picture: one HTML page with everything in it, for people who would rather look than read.

use epsmoe_base::{Lane, Phase, Rank, Stage};
use epsmoe_plan::{Span, TimeBreakdown, Timeline};
use std::collections::BTreeSet;
use std::fmt::{self, Write};

/// What a page shows.
pub(crate) struct Report {
    /// Its heading.
    pub(crate) title: String,
    /// Lines under the heading: command, machine, load.
    pub(crate) notes: Vec<String>,
    /// One bar each.
    pub(crate) rows: Vec<Row>,
    /// One picture each: what it is, and what ran in one MoE layer.
    pub(crate) lanes: Vec<(String, Vec<Lanes>)>,
}

/// Lanes over time; several of them in one picture share its scale.
pub(crate) struct Lanes {
    /// What tells them from the others, if there are others.
    pub(crate) what: &'static str,
    /// What the stages of its spans are.
    pub(crate) parts: Parts,
    /// What ran.
    pub(crate) timeline: Timeline,
}

/// What a layer is cut into.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Parts {
    /// Experts into stages.
    Stages,
    /// Tokens into two micro-batches, A and B.
    MicroBatches,
}

impl Parts {
    fn mark(self, stage: Stage) -> String {
        match self {
            Parts::Stages => stage.0.to_string(),
            Parts::MicroBatches => if stage.0 == 0 { "A" } else { "B" }.into(),
        }
    }

    fn name(self, stage: Stage) -> String {
        match self {
            Parts::Stages => stage.to_string(),
            Parts::MicroBatches => format!("micro-batch {}", self.mark(stage)),
        }
    }
}

/// A measured configuration.
pub(crate) struct Row {
    /// What was run.
    pub(crate) label: String,
    /// Prompt tokens a second over all ranks.
    pub(crate) tokens_per_second: f64,
    /// Where the time of the slowest rank went.
    pub(crate) breakdown: TimeBreakdown,
}

const WIDTH: f64 = 1000.0;
const LABEL: f64 = 210.0;
const BAR: f64 = 26.0;
const LANE: f64 = 24.0;
/// Spans wider than this say which stage they are of.
const MARK: f64 = 12.0;

/// Parts of a time breakdown and kinds of spans, in colours that also differ in brightness.
const COLOURS: [(&str, &str); 12] = [
    ("gemm", "#2f5d8a"),
    ("attention", "#7a4f9a"),
    ("other", "#9aa5b1"),
    ("exposed transfer", "#d9822b"),
    ("count exchange", "#c9b458"),
    ("idle", "#e7e9ec"),
    ("dispatch", "#d9822b"),
    ("combine", "#b5432a"),
    ("metadata", "#c9b458"),
    ("pack, expand", "#6fa287"),
    ("reduce", "#3f7d5c"),
    ("route", "#8d6e63"),
];

const STYLE: &str = "body{font:15px/1.45 system-ui,sans-serif;max-width:1060px;margin:2em auto;padding:0 1em;\
    color:#1c2733}h1{font-size:1.5em}h2{font-size:1.15em;margin-top:2em}p{margin:.3em 0}\
    code{background:#f2f4f6;padding:.1em .3em}svg{width:100%;height:auto;font:12px system-ui,sans-serif}\
    .key span{display:inline-block;margin-right:1.2em}.key i{display:inline-block;width:.9em;height:.9em;\
    margin-right:.4em;vertical-align:-.1em}.mark{fill:#fff;text-anchor:middle;pointer-events:none}";

impl Report {
    /// The page.
    pub(crate) fn html(&self) -> String {
        let mut page = String::new();
        // Writing to a string cannot fail.
        let _ = self.write(&mut page);
        page
    }

    fn write(&self, page: &mut String) -> fmt::Result {
        let title = escape(&self.title);
        writeln!(page, "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><title>{title}</title>")?;
        writeln!(page, "<style>{STYLE}</style><h1>{title}</h1>")?;
        for note in &self.notes {
            writeln!(page, "<p>{}</p>", escape(note))?;
        }
        writeln!(page, "<h2>Where the time goes</h2>")?;
        writeln!(
            page,
            "<p>One step of the slowest rank; shorter is faster. The figure is tokens a second.</p>"
        )?;
        key(page, &["gemm", "attention", "other", "exposed transfer", "count exchange", "idle"])?;
        self.bars(page)?;
        for (label, layers) in &self.lanes {
            writeln!(page, "<h2>One MoE layer: {}</h2>", escape(label))?;
            key(
                page,
                &["route", "metadata", "dispatch", "pack, expand", "gemm", "reduce", "combine", "other"],
            )?;
            lanes(page, layers)?;
        }
        writeln!(page, "</html>")
    }

    fn bars(&self, page: &mut String) -> fmt::Result {
        let longest = self.rows.iter().map(|row| row.breakdown.wall).max().unwrap_or(0).max(1) as f64;
        let scale = (WIDTH - LABEL - 110.0) / longest;
        writeln!(page, "<svg viewBox=\"0 0 {WIDTH} {}\" role=\"img\">", BAR * self.rows.len() as f64 + 4.0)?;
        for (index, row) in self.rows.iter().enumerate() {
            let y = BAR * index as f64;
            writeln!(page, "<text x=\"0\" y=\"{:.1}\">{}</text>", y + 16.0, escape(&row.label))?;
            let mut x = LABEL;
            for (name, time) in parts(&row.breakdown) {
                let width = time as f64 * scale;
                let title = format!("{name}: {:.2} ms", time as f64 / 1e6);
                rectangle(page, (x, y + 3.0), (width, BAR - 8.0), name, &title)?;
                x += width;
            }
            writeln!(
                page,
                "<text x=\"{:.1}\" y=\"{:.1}\">{:.0} tok/s</text>",
                x + 8.0,
                y + 16.0,
                row.tokens_per_second
            )?;
        }
        writeln!(page, "</svg>")
    }
}

fn parts(breakdown: &TimeBreakdown) -> [(&'static str, u64); 6] {
    [
        ("gemm", breakdown.gemm),
        ("attention", breakdown.attention),
        ("other", breakdown.other),
        ("exposed transfer", breakdown.exposed_transfer),
        ("count exchange", breakdown.count_exchange),
        ("idle", breakdown.idle),
    ]
}

/// A strip for each rank and lane over time, with a scale in milliseconds. Each timeline begins at the left.
fn lanes(page: &mut String, layers: &[Lanes]) -> fmt::Result {
    let extents = layers.iter().filter_map(|layer| Some((layer, layer.timeline.extent()?)));
    let longest = extents.clone().map(|(_, extent)| extent.end - extent.start).max().unwrap_or(0).max(1);
    let ranks: BTreeSet<Rank> =
        layers.iter().flat_map(|layer| &layer.timeline.spans).map(|span| span.rank).collect();
    let lanes = ranks.into_iter().flat_map(|rank| Lane::ALL.map(|lane| (rank, lane)));
    let strips: Vec<_> = lanes.flat_map(|lane| extents.clone().map(move |extent| (lane, extent))).collect();
    let scale = (WIDTH - LABEL) / longest as f64;
    let height = LANE * strips.len() as f64;
    writeln!(page, "<svg viewBox=\"0 0 {WIDTH} {}\" role=\"img\">", height + 24.0)?;
    for (index, ((rank, lane), (layer, extent))) in strips.into_iter().enumerate() {
        let y = LANE * index as f64;
        writeln!(page, "<text x=\"0\" y=\"{:.1}\">{rank}, {lane}{}</text>", y + 15.0, layer.what)?;
        for span in layer.timeline.spans.iter().filter(|span| (span.rank, span.lane) == (rank, lane)) {
            let x = LABEL + (span.start_ns - extent.start) as f64 * scale;
            let width = span.duration_ns() as f64 * scale;
            rectangle(
                page,
                (x, y + 2.0),
                (width.max(0.3), LANE - 5.0),
                kind(span.phase),
                &describe(span, layer.parts),
            )?;
            if let Some(stage) = span.stage.filter(|_| width > MARK) {
                let (x, y, mark) = (x + width / 2.0, y + 15.0, layer.parts.mark(stage));
                writeln!(page, "<text class=\"mark\" x=\"{x:.1}\" y=\"{y:.1}\">{mark}</text>")?;
            }
        }
    }
    let milliseconds = longest as f64 / 1e6;
    for tick in 0..=5 {
        let part = f64::from(tick) / 5.0;
        let (x, time) = (LABEL + (WIDTH - LABEL) * part, milliseconds * part);
        let anchor = ["start", "middle", "middle", "middle", "middle", "end"][tick as usize];
        let y = height + 16.0;
        writeln!(
            page,
            "<text x=\"{x:.1}\" y=\"{y:.1}\" fill=\"#667\" text-anchor=\"{anchor}\">{time:.2} ms</text>"
        )?;
    }
    writeln!(page, "</svg>")
}

fn describe(span: &Span, parts: Parts) -> String {
    let stage = span.stage.map(|stage| format!(", {}", parts.name(stage))).unwrap_or_default();
    format!("{}{stage}: {:.3} ms", span.name, span.duration_ns() as f64 / 1e6)
}

fn rectangle(page: &mut String, at: (f64, f64), size: (f64, f64), name: &str, title: &str) -> fmt::Result {
    let ((x, y), (width, height)) = (at, size);
    let (fill, title) = (colour(name), escape(title));
    writeln!(
        page,
        "<rect x=\"{x:.2}\" y=\"{y:.2}\" width=\"{width:.2}\" height=\"{height:.2}\" fill=\"{fill}\">\
         <title>{title}</title></rect>"
    )
}

fn key(page: &mut String, names: &[&str]) -> fmt::Result {
    write!(page, "<p class=\"key\">")?;
    for name in names {
        write!(page, "<span><i style=\"background:{}\"></i>{name}</span>", colour(name))?;
    }
    writeln!(page, "</p>")
}

/// What a phase of an MoE layer is shown as.
fn kind(phase: Phase) -> &'static str {
    match phase {
        Phase::Route => "route",
        Phase::Metadata => "metadata",
        Phase::Dispatch => "dispatch",
        Phase::Combine => "combine",
        Phase::Pack | Phase::Expand => "pack, expand",
        Phase::Reduce | Phase::Sum => "reduce",
        phase if phase.is_product() => "gemm",
        _ => "other",
    }
}

/// The colour of a name; that of `other` for the rest.
fn colour(name: &str) -> &'static str {
    let found = COLOURS.iter().find(|(known, _)| *known == name);
    found.map_or("#9aa5b1", |(_, colour)| colour)
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use epsmoe_base::Layer;

    #[test]
    fn a_page_shows_rows_and_lanes_and_escapes_names() {
        let span = |lane, name: &'static str, start_ns, end_ns| Span {
            rank: Rank(0),
            layer: Some(Layer(1)),
            stage: Some(Stage(0)),
            lane,
            phase: Phase::Other,
            name: name.into(),
            start_ns,
            end_ns,
        };
        let spans = vec![
            span(Lane::Transfer, "dispatch", 0, 1_000_000),
            span(Lane::Compute, "gemm", 1_000_000, 3_000_000),
        ];
        let timeline = Timeline { spans };
        let breakdown = TimeBreakdown::of(&timeline, Rank(0));
        let page = Report {
            title: "bench <x>".into(),
            notes: vec!["a & b".into()],
            rows: vec![Row { label: "staged 4".into(), tokens_per_second: 1234.0, breakdown }],
            lanes: vec![
                (
                    "staged 4".into(),
                    vec![Lanes { what: ", measured", parts: Parts::Stages, timeline: timeline.clone() }],
                ),
                ("two-batch".into(), vec![Lanes { what: "", parts: Parts::MicroBatches, timeline }]),
            ],
        }
        .html();
        assert!(page.contains("bench &lt;x&gt;") && page.contains("a &amp; b"));
        assert!(page.contains("1234 tok/s") && page.contains("dispatch, stage 0: 1.000 ms"));
        assert!(page.contains("dispatch, micro-batch A: 1.000 ms") && page.contains(">A</text>"));
        assert!(!page.contains("http"), "the page is whole in itself");
    }
}
