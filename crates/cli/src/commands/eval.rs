//! `epsmoe eval`: how well a model predicts a text, and how far its predictions are from another's.

use crate::args::{EvalArgs, EvalCommand, PerplexityArgs};
use crate::output;
use crate::setup::{Demand, Setup};
use anyhow::{Context, Result, bail};
use epsmoe_base::count;
use epsmoe_base::files::read_plain_text;
use epsmoe_engine::{Engine, Request};
use serde::Serialize;

/// Bytes of a text: hours of any model.
const MOST_BYTES: u64 = 256 << 20;

pub(crate) fn run(args: &EvalArgs) -> Result<()> {
    match &args.command {
        EvalCommand::Perplexity(args) => perplexity(args),
    }
}

/// What `--json` prints.
#[derive(Serialize)]
struct Report<'a> {
    model: &'a str,
    /// Tokens that were predicted.
    tokens: usize,
    chunks: usize,
    context: usize,
    /// Mean of the negative logarithms of their probabilities, in nats.
    nll: f64,
    perplexity: f64,
    /// Standard error of the perplexity.
    standard_error: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    reference: Option<Comparison<'a>>,
}

#[derive(Serialize)]
struct Comparison<'a> {
    model: &'a str,
    nll: f64,
    perplexity: f64,
    /// Mean of the KL divergence of the model from the reference, in nats.
    kl_divergence: f64,
    /// The largest one of a token.
    largest_kl_divergence: f64,
    /// Share of tokens whose most likely prediction is the same.
    top_1_agreement: f64,
}

/// Sums over predicted tokens.
#[derive(Default)]
struct Sums {
    tokens: usize,
    nll: f64,
    /// Of the squares.
    squared: f64,
    reference_nll: f64,
    kl: f64,
    largest_kl: f64,
    agreed: usize,
}

fn perplexity(args: &PerplexityArgs) -> Result<()> {
    let mut setup = Setup::new(&args.run)?;
    let reference = args.reference.as_ref().map(|model| Setup::with_model(&args.run, model)).transpose()?;
    let (chunks, vocabulary) = (chunks(args, &mut setup)?, setup.model.spec.vocab);
    if let Some(other) = reference.as_ref().filter(|other| other.model.spec.vocab != vocabulary) {
        bail!(
            "{} has {vocabulary} tokens, but the reference {} has {}: give a reference with the same vocabulary",
            setup.model.name,
            other.model.name,
            other.model.spec.vocab
        );
    }
    let longest = chunks.iter().map(Vec::len).max().unwrap_or(0);
    let bytes = (longest as u64).saturating_mul(vocabulary as u64).saturating_mul(8);
    setup.check_room(format_args!("logits of {}", count(longest, "token")), bytes.saturating_mul(2))?;
    let start = |setup: &Setup| -> Result<Engine> {
        let demand = Demand { sequences: 1, tokens: longest, step: longest };
        let options = setup.engine_options(demand, setup.parallel, &setup.policy)?;
        Ok(setup.start(options)?.0)
    };
    let mut engine = start(&setup)?;
    let mut other = reference.as_ref().map(start).transpose()?;
    let progress = output::step_bar("predicting", chunks.len());
    let mut sums = Sums::default();
    for chunk in &chunks {
        let logits = logits(&mut engine, chunk)?;
        let of_reference = other.as_mut().map(|engine| self::logits(engine, chunk)).transpose()?;
        sums.add(chunk, &logits, of_reference.as_deref(), vocabulary);
        progress.inc(1);
    }
    progress.finish_and_clear();
    setup.write_routing(&engine)?;
    setup.explain(&engine);
    let report = sums.report(&setup.model.name, args.reference.as_deref(), chunks.len(), longest);
    if args.json { output::show_json(&report) } else { output::show(&report.text()) }
}

/// The tokens of the text, in pieces of at least two.
fn chunks(args: &PerplexityArgs, setup: &mut Setup) -> Result<Vec<Vec<u32>>> {
    let file = args.file.display();
    let text = read_plain_text(&args.file, MOST_BYTES).with_context(|| format!("cannot read {file}"))?;
    let tokenizer = setup.model.tokenizer()?;
    let tokenizer =
        tokenizer.with_context(|| format!("{} has no tokenizer: give a model that has", setup.model.name))?;
    let tokens = tokenizer.encode_special(&text)?;
    let context = args.context.min(setup.context());
    let chunks = tokens.chunks(context).filter(|chunk| chunk.len() > 1).map(<[u32]>::to_vec);
    let chunks: Vec<Vec<u32>> = chunks.take(args.chunks.unwrap_or(usize::MAX)).collect();
    if chunks.is_empty() {
        bail!(
            "{file} has {}, of which none can be predicted: give a longer text",
            count(tokens.len(), "token")
        );
    }
    Ok(chunks)
}

/// Of every token of a piece.
fn logits(engine: &mut Engine, chunk: &[u32]) -> Result<Vec<f32>> {
    let request = Request { prompt: chunk.to_vec(), prompt_logits: true, ..Request::default() };
    let answers = engine.run(vec![request], |_| {})?;
    Ok(answers.into_iter().next().context("no answer came. This is a bug")?.prompt_logits)
}

/// Natural logarithms of the probabilities.
fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let shifted = |&logit: &f32| f64::from(logit) - f64::from(largest);
    let sum: f64 = logits.iter().map(|logit| shifted(logit).exp()).sum();
    logits.iter().map(|logit| shifted(logit) - sum.ln()).collect()
}

/// The token with the largest logit, of equal ones the first.
fn best(logits: &[f32]) -> usize {
    (0..logits.len()).fold(0, |best, id| if logits[id] > logits[best] { id } else { best })
}

impl Sums {
    fn add(&mut self, chunk: &[u32], logits: &[f32], reference: Option<&[f32]>, vocabulary: usize) {
        for (at, &next) in chunk[1..].iter().enumerate() {
            let row = at * vocabulary..(at + 1) * vocabulary;
            let predicted = log_softmax(&logits[row.clone()]);
            let nll = -predicted[next as usize];
            self.tokens += 1;
            self.nll += nll;
            self.squared += nll * nll;
            let Some(reference) = reference else { continue };
            let wanted = log_softmax(&reference[row.clone()]);
            self.reference_nll -= wanted[next as usize];
            let kl: f64 = wanted.iter().zip(&predicted).map(|(p, q)| p.exp() * (p - q)).sum();
            self.kl += kl;
            self.largest_kl = self.largest_kl.max(kl);
            self.agreed += usize::from(best(&logits[row.clone()]) == best(&reference[row]));
        }
    }

    fn report<'a>(
        &self,
        model: &'a str,
        reference: Option<&'a str>,
        chunks: usize,
        context: usize,
    ) -> Report<'a> {
        let count = self.tokens as f64;
        let (nll, perplexity) = (self.nll / count, (self.nll / count).exp());
        let variance = (self.squared / count - nll * nll).max(0.0) / (count - 1.0).max(1.0);
        let reference = reference.map(|model| Comparison {
            model,
            nll: self.reference_nll / count,
            perplexity: (self.reference_nll / count).exp(),
            kl_divergence: self.kl / count,
            largest_kl_divergence: self.largest_kl,
            top_1_agreement: self.agreed as f64 / count,
        });
        let standard_error = perplexity * variance.sqrt();
        Report { model, tokens: self.tokens, chunks, context, nll, perplexity, standard_error, reference }
    }
}

impl Report<'_> {
    fn text(&self) -> String {
        let Report { tokens, chunks, perplexity, standard_error, .. } = self;
        let mut text = format!(
            "perplexity {perplexity:.4} ± {standard_error:.4} over {} in {}\n",
            count(*tokens, "token"),
            count(*chunks, "piece")
        );
        if let Some(other) = &self.reference {
            text += &format!(
                "reference {:.4}, ratio {:.4}\nKL divergence {:.6} nats, at most {:.4}\nsame most likely token {:.2} %\n",
                other.perplexity,
                perplexity / other.perplexity,
                other.kl_divergence,
                other.largest_kl_divergence,
                100.0 * other.top_1_agreement
            );
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_are_their_definitions() {
        let (logits, reference) = ([0.0, 2f32.ln(), 0.0, 0.0, 0.0, 0.0], [0.0; 6]);
        let mut sums = Sums::default();
        sums.add(&[0, 1], &logits, Some(&reference), 3);
        // Probabilities ¼, ½, ¼ where the reference has thirds.
        let report = sums.report("a", Some("b"), 1, 2);
        assert!((report.perplexity - 2.0).abs() < 1e-6, "{}", report.perplexity);
        let other = report.reference.unwrap();
        assert!((other.perplexity - 3.0).abs() < 1e-6);
        let kl = (2.0 * (4f64 / 3.0).ln() + (2f64 / 3.0).ln()) / 3.0;
        assert!((other.kl_divergence - kl).abs() < 1e-6, "{}", other.kl_divergence);
        assert_eq!(other.top_1_agreement, 0.0);
        assert_eq!(report.standard_error, 0.0);
    }
}
