//! Advice in words.

use crate::{Advice, Row, Running, Strategy};
use epsmoe_base::{Bytes, count};
use epsmoe_plan::{GemmKind, StageTable};
use std::fmt;

/// A table in a line.
pub(crate) fn short(table: &StageTable, ranks: usize) -> String {
    let sizes = |cut: &Vec<usize>| {
        cut.windows(2).map(|ends| (ends[1] - ends[0]).to_string()).collect::<Vec<_>>().join("+")
    };
    let cuts = table.cuts.first().map(sizes).unwrap_or_default();
    let which = if ranks > 1 { " on rank 0" } else { "" };
    let gemm = table.gemm.iter().map(GemmKind::to_string).collect::<Vec<_>>().join(" ");
    format!("{}: {cuts} experts{which}, {gemm}", count(table.stages(), "stage"))
}

/// Why the best row is the best.
pub(crate) fn why(rows: &[Row], best: Option<usize>, fastest: Option<usize>) -> String {
    let Some(row) = best.map(|index| &rows[index]) else {
        let least = rows.iter().map(|row| row.bytes.total()).min().unwrap_or(0);
        return format!("nothing fits: the smallest plan needs {} a GPU", Bytes(least));
    };
    let of = |strategy| rows.iter().filter(move |row| row.strategy == strategy);
    let mut reasons = vec![format!("{} {} is fastest of what fits", row.strategy, row.running)];
    if let Some(fastest) =
        fastest.map(|index| &rows[index]).filter(|fastest| fastest.prefill_ns < row.prefill_ns)
    {
        reasons.push(format!(
            "{} would be faster but needs {} a GPU",
            fastest.strategy,
            Bytes(fastest.bytes.total())
        ));
    }
    for other in Strategy::ALL.into_iter().filter(|&strategy| strategy != row.strategy) {
        let Some(rival) = of(other).min_by_key(|rival| rival.prefill_ns) else { continue };
        let longer = |theirs: u64, ours: u64| theirs as i64 / 1000 - ours as i64 / 1000;
        reasons.push(format!(
            "{other} spends {:+} µs a layer on attention, {:+} on collectives, {:+} on experts and their exchanges",
            longer(rival.attention_ns, row.attention_ns),
            longer(rival.collective_ns, row.collective_ns),
            longer(rival.experts_ns, row.experts_ns),
        ));
    }
    if let Some(one) = of(row.strategy).find(|one| one.running == Running::Kernel && one.stages == 1) {
        let gain = (one.experts_ns as f64 / row.experts_ns.max(1) as f64 - 1.0) * 100.0;
        reasons.push(match row.stages {
            1 => "more stages do not pay".into(),
            stages => format!("{stages} stages make the experts {gain:.1} % faster than one"),
        });
    }
    reasons.join("; ")
}

impl fmt::Display for Advice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{} on {}, batch {} x sequence {}, {} a GPU, {}, experts in {}",
            self.model,
            self.machine,
            self.batch,
            self.sequence,
            Bytes(self.memory_bytes),
            self.wire,
            self.experts
        )?;
        writeln!(
            f,
            "{:<8} {:<7} {:>6} {:>10} {:>10} {:>11} {:>10} {:>11} {:>10} {:>10}",
            "strategy",
            "run",
            "stages",
            "layer µs",
            "attention",
            "collectives",
            "experts",
            "tokens/s",
            "moved",
            "GPU bytes"
        )?;
        for (index, row) in self.rows.iter().enumerate() {
            let micros = |ns: u64| ns / 1000;
            let mark = if Some(index) == self.best { "  <- best" } else { "" };
            let mark = if row.fits { mark } else { "  does not fit" };
            writeln!(
                f,
                "{:<8} {:<7} {:>6} {:>10} {:>10} {:>11} {:>10} {:>11} {:>10} {:>10}{mark}",
                row.strategy,
                row.running,
                row.stages,
                micros(row.layer_ns),
                micros(row.attention_ns),
                micros(row.collective_ns),
                micros(row.experts_ns),
                row.tokens_per_second,
                Bytes(row.moved_bytes).to_string(),
                Bytes(row.bytes.total()).to_string(),
            )?;
        }
        if let Some(explanation) = self.best.and_then(|best| self.rows[best].explanation.as_ref()) {
            writeln!(f, "{explanation}")?;
        }
        writeln!(f, "{}", self.why)?;
        self.left_out.as_ref().map_or(Ok(()), |left_out| writeln!(f, "{left_out}"))
    }
}
