//! `epsmoe generate`: one prompt, continued.

use crate::args::{GenerateArgs, SamplingArgs, TokenLimit};
use crate::output;
use crate::setup::{Demand, Setup};
use anyhow::{Result, bail};
use epsmoe_base::count;
use epsmoe_engine::{Completion, Engine, Event, Finish, Request, Sampling};
use epsmoe_text::{DecodeStream, Tokenizer};
use serde::Serialize;
use std::time::{Duration, Instant};

/// New tokens when neither the user nor the checkpoint says how many.
const MAX_TOKENS: usize = 128;

/// What `--json` prints.
#[derive(Serialize)]
struct Answer<'a> {
    model: &'a str,
    /// New ids only.
    ids: &'a [u32],
    /// Null without a tokenizer.
    text: Option<&'a str>,
    finish_reason: &'static str,
    usage: Usage,
    times: Times,
}

#[derive(Serialize)]
struct Usage {
    prompt_tokens: usize,
    completion_tokens: usize,
    total_tokens: usize,
}

#[derive(Serialize)]
struct Times {
    load_seconds: f64,
    /// Null if there is no token.
    time_to_first_token_ms: Option<f64>,
    /// After the first token; null if there is one at most.
    decode_tokens_per_second: Option<f64>,
    /// From the request to its last token.
    total_seconds: f64,
}

/// Continues a prompt; the text goes out as it comes.
pub(crate) fn run(args: &GenerateArgs) -> Result<()> {
    let mut setup = Setup::new(&args.run)?;
    let tokenizer = setup.model.tokenizer()?;
    let model = &setup.model;
    if tokenizer.is_none() && !args.sampling.stop.is_empty() {
        bail!("{} has no tokenizer, so the text of --stop cannot be found: leave it out", model.name);
    }
    let request = request(args, &setup, tokenizer.as_ref())?;
    let (step, tokens) = (request.prompt.len(), request.prompt.len().saturating_add(request.max_tokens));
    let options =
        setup.engine_options(Demand { sequences: 1, tokens, step }, setup.parallel, &setup.policy)?;
    request.check(model.spec.vocab, options.max_model_len)?;

    let (mut engine, load) = setup.start(options)?;
    let (stop, skip_special) = (&args.sampling.stop, args.sampling.skip_special_tokens);
    let stream = tokenizer
        .as_ref()
        .map(|tokenizer| DecodeStream::new(tokenizer, stop.clone(), skip_special).after(&request.prompt));
    let mut text = stream.map(|stream| AnswerText::new(stream, &request, &model.spec.eos, !args.json));
    let prompt_tokens = request.prompt.len();
    let completion = generate(&mut engine, request, text.as_mut())?;
    setup.write_routing(&engine)?;
    setup.explain(&engine);
    let text = text.as_ref().map(|text| text.all.as_str());
    let answer = Answer::new(&model.name, prompt_tokens, &completion, text, load);
    if args.json {
        return output::show_json(&answer);
    }
    match text {
        Some(_) => output::show("\n")?,
        None => output::show_line(completion.ids.iter().map(u32::to_string).collect::<Vec<_>>().join(" "))?,
    }
    output::remark(answer.summary());
    Ok(())
}

fn request(args: &GenerateArgs, setup: &Setup, tokenizer: Option<&Tokenizer>) -> Result<Request> {
    let prompt = match &args.prompt.ids {
        Some(ids) => ids.0.clone(),
        None => setup.model.encode(tokenizer, &args.prompt.text)?,
    };
    let room = setup.context().saturating_sub(prompt.len());
    let by_default = setup.model.generation.max_new_tokens.unwrap_or(MAX_TOKENS).min(room);
    Ok(Request {
        max_tokens: match args.max_tokens {
            Some(TokenLimit::At(number)) => number,
            Some(TokenLimit::Context) => room,
            None => by_default,
        },
        ignore_eos: args.sampling.ignore_eos,
        stop_token_ids: args.sampling.stop_token_ids.as_ref().map_or_else(Vec::new, |ids| ids.0.clone()),
        sampling: sampling(&args.sampling, setup),
        prompt,
        ..Request::default()
    })
}

/// What was typed goes before what the checkpoint wants. Whoever says which tokens may be drawn wants to draw.
fn sampling(args: &SamplingArgs, setup: &Setup) -> Sampling {
    let wanted = setup.model.generation.sampling();
    let draws = args.top_k.is_some() || args.top_p.is_some() || args.min_p.is_some();
    let temperature = if draws && wanted.temperature == 0.0 { 1.0 } else { wanted.temperature };
    Sampling {
        temperature: args.temperature.unwrap_or(temperature),
        top_k: args.top_k.unwrap_or(wanted.top_k),
        top_p: args.top_p.unwrap_or(wanted.top_p),
        min_p: args.min_p.unwrap_or(wanted.min_p),
        repetition_penalty: args.repetition_penalty.unwrap_or(wanted.repetition_penalty),
        seed: setup.seed,
        ..Sampling::default()
    }
}

/// The text of an answer as it comes.
struct AnswerText {
    stream: DecodeStream,
    all: String,
    /// Tokens that end the answer and are no part of its text.
    silent: Vec<u32>,
    /// Whether it is shown at once.
    aloud: bool,
}

impl AnswerText {
    fn new(stream: DecodeStream, request: &Request, eos: &[u32], aloud: bool) -> Self {
        let eos = if request.ignore_eos { &[] } else { eos };
        let silent = [eos, &request.stop_token_ids].concat();
        AnswerText { stream, all: String::new(), silent, aloud }
    }

    fn token(&mut self, id: u32) -> Result<()> {
        if self.silent.contains(&id) {
            return Ok(());
        }
        let piece = self.stream.push(id)?;
        self.say(&piece)
    }

    fn finish(&mut self) -> Result<()> {
        let piece = self.stream.finish()?;
        self.say(&piece)
    }

    fn say(&mut self, piece: &str) -> Result<()> {
        self.all.push_str(piece);
        if self.aloud { output::show_text(piece) } else { Ok(()) }
    }
}

/// Steps until the request has ended. A stop string ends it whatever else would.
fn generate(engine: &mut Engine, request: Request, mut text: Option<&mut AnswerText>) -> Result<Completion> {
    let begun = Instant::now();
    let id = engine.submit(request)?;
    let mut completion = Completion::default();
    while !engine.is_idle() {
        engine.step()?;
        for (_, event) in engine.take_events() {
            if let (Event::Token { id, .. }, Some(text)) = (&event, &mut text) {
                text.token(*id)?;
            }
            completion.hear(event, begun.elapsed())?;
        }
        if text.as_ref().is_some_and(|text| text.stream.stopped()) {
            engine.abort(id);
        }
    }
    if let Some(text) = text {
        text.finish()?;
        if text.stream.stopped() {
            completion.finish = Some(Finish::Stop);
        }
    }
    Ok(completion)
}

impl<'a> Answer<'a> {
    fn new(
        model: &'a str,
        prompt_tokens: usize,
        completion: &'a Completion,
        text: Option<&'a str>,
        load: Duration,
    ) -> Self {
        let completion_tokens = completion.ids.len();
        let first = completion.time_to_first_token.as_secs_f64();
        let total = completion.total_time.as_secs_f64();
        let decoded = completion_tokens.saturating_sub(1);
        Answer {
            model,
            ids: &completion.ids,
            text,
            finish_reason: match completion.finish {
                Some(Finish::Stop | Finish::StopToken(_)) => "stop",
                Some(Finish::Length | Finish::Abort) | None => "length",
            },
            usage: Usage {
                prompt_tokens,
                completion_tokens,
                total_tokens: prompt_tokens + completion_tokens,
            },
            times: Times {
                load_seconds: load.as_secs_f64(),
                time_to_first_token_ms: (completion_tokens > 0).then_some(first * 1e3),
                decode_tokens_per_second: (decoded > 0).then(|| decoded as f64 / (total - first)),
                total_seconds: total,
            },
        }
    }

    fn summary(&self) -> String {
        let (usage, times) = (&self.usage, &self.times);
        let decode = times.decode_tokens_per_second.map(|rate| format!(", then {rate:.1} tokens/s"));
        let first = times.time_to_first_token_ms.map(|first| format!(", the first after {first:.0} ms"));
        format!(
            "[{} + {} new{}{}; loaded in {:.1} s]",
            count(usage.prompt_tokens, "token"),
            usage.completion_tokens,
            first.unwrap_or_default(),
            decode.unwrap_or_default(),
            times.load_seconds
        )
    }
}
