//! What all requests come to.

use super::request::Outcome;
use crate::args::{BenchServeArgs, Goal, GoalFigure};
use crate::commands::bench::quantile;
use anyhow::Result;
use serde::Serialize;
use std::fmt::Write;
use std::time::Duration;

/// The figures of a load.
#[derive(Debug, Serialize)]
pub(crate) struct Figures {
    completed: usize,
    failed: usize,
    duration_s: f64,
    request_rate: Option<f64>,
    max_concurrency: usize,
    total_input_tokens: usize,
    total_output_tokens: usize,
    request_throughput: f64,
    output_throughput: f64,
    total_token_throughput: f64,
    /// Requests a second that kept to all goals; nothing without goals.
    request_goodput: Option<f64>,
    ttft_ms: Spread,
    tpot_ms: Spread,
    itl_ms: Spread,
    e2el_ms: Spread,
}

/// Milliseconds; nothing where nothing was measured.
#[derive(Debug, Serialize)]
struct Spread {
    mean: Option<f64>,
    p50: Option<f64>,
    p90: Option<f64>,
    p99: Option<f64>,
}

impl Figures {
    pub(crate) fn of(outcomes: &[Result<Outcome>], wall: Duration, args: &BenchServeArgs) -> Self {
        let answered: Vec<&Outcome> = outcomes.iter().flatten().collect();
        let seconds = wall.as_secs_f64().max(f64::MIN_POSITIVE);
        let input: usize = answered.iter().map(|outcome| outcome.prompt_tokens).sum();
        let output: usize = answered.iter().map(|outcome| outcome.new_tokens).sum();
        let good =
            answered.iter().filter(|outcome| args.goodput.iter().all(|goal| goal.is_met(outcome))).count();
        Figures {
            completed: answered.len(),
            failed: outcomes.len() - answered.len(),
            duration_s: seconds,
            request_rate: Some(args.request_rate).filter(|rate| rate.is_finite()),
            max_concurrency: args.max_concurrency,
            total_input_tokens: input,
            total_output_tokens: output,
            request_throughput: answered.len() as f64 / seconds,
            output_throughput: output as f64 / seconds,
            total_token_throughput: (input + output) as f64 / seconds,
            request_goodput: (!args.goodput.is_empty()).then(|| good as f64 / seconds),
            ttft_ms: Spread::of(answered.iter().map(|outcome| outcome.first)),
            tpot_ms: Spread::of(answered.iter().filter_map(|outcome| outcome.per_token())),
            itl_ms: Spread::of(answered.iter().flat_map(|outcome| outcome.gaps.iter().copied())),
            e2el_ms: Spread::of(answered.iter().map(|outcome| outcome.whole)),
        }
    }

    /// For people.
    pub(crate) fn table(&self) -> String {
        let mut text = String::new();
        let mut line = |what: &str, value: String| {
            // Writing to a string cannot fail.
            let _ = writeln!(text, "{what:<38}{value:>12}");
        };
        line("requests answered", self.completed.to_string());
        line("requests failed", self.failed.to_string());
        line("seconds", format!("{:.2}", self.duration_s));
        line("prompt tokens", self.total_input_tokens.to_string());
        line("new tokens", self.total_output_tokens.to_string());
        line("requests a second", format!("{:.2}", self.request_throughput));
        line("new tokens a second", format!("{:.1}", self.output_throughput));
        line("prompt and new tokens a second", format!("{:.1}", self.total_token_throughput));
        if let Some(goodput) = self.request_goodput {
            line("good requests a second", format!("{goodput:.2}"));
        }
        let _ =
            writeln!(text, "\n{:<14}{:>12}{:>12}{:>12}{:>12}", "milliseconds", "mean", "p50", "p90", "p99");
        for (name, spread) in
            [("TTFT", &self.ttft_ms), ("TPOT", &self.tpot_ms), ("ITL", &self.itl_ms), ("E2EL", &self.e2el_ms)]
        {
            let [mean, p50, p90, p99] = [spread.mean, spread.p50, spread.p90, spread.p99]
                .map(|value| value.map_or_else(|| "-".to_owned(), |value| format!("{value:.2}")));
            let _ = writeln!(text, "{name:<14}{mean:>12}{p50:>12}{p90:>12}{p99:>12}");
        }
        text
    }
}

impl Spread {
    fn of(times: impl Iterator<Item = Duration>) -> Self {
        let values: Vec<f64> = times.map(|time| time.as_secs_f64() * 1e3).collect();
        let at = |share| quantile(values.iter().copied(), share);
        let mean = (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64);
        Spread { mean, p50: at(0.5), p90: at(0.9), p99: at(0.99) }
    }
}

impl Goal {
    /// Whether a request kept to it; what has no time of a token has none that is too long.
    fn is_met(&self, outcome: &Outcome) -> bool {
        let time = match self.figure {
            GoalFigure::Ttft => Some(outcome.first),
            GoalFigure::Tpot => outcome.per_token(),
            GoalFigure::E2el => Some(outcome.whole),
        };
        time.is_none_or(|time| time.as_secs_f64() * 1e3 <= self.milliseconds)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worked_example() {
        let ms = Duration::from_millis;
        // Three tokens, at 100, 120 and 160 ms.
        let outcome = Outcome {
            prompt_tokens: 7,
            new_tokens: 3,
            first: ms(100),
            whole: ms(160),
            gaps: vec![ms(20), ms(40)],
        };
        assert_eq!(outcome.per_token(), Some(ms(30)));
        let goal = |figure, milliseconds| Goal { figure, milliseconds }.is_met(&outcome);
        assert!(goal(GoalFigure::Ttft, 100.0) && !goal(GoalFigure::Ttft, 99.0));
        assert!(goal(GoalFigure::Tpot, 30.0) && !goal(GoalFigure::Tpot, 29.0));
        assert!(goal(GoalFigure::E2el, 160.0) && !goal(GoalFigure::E2el, 159.0));
        let single = Outcome { new_tokens: 1, ..outcome };
        assert_eq!(single.per_token(), None);
    }
}
