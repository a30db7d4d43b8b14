//! What a client's request asks of the engine.

use crate::app::App;
use crate::auth::Caller;
use crate::guide::Guide;
use crate::openai::ApiError;
use crate::openai::sampling::SamplingFields;
use epsmoe_base::Mix;
use epsmoe_engine::{Constraint, Request, Sampling};

/// Below this a temperature takes the most likely token, as anything else would by rounding.
const LEAST_TEMPERATURE: f64 = 1e-5;

/// Prompts, how they are continued, and what is wanted of each token.
pub(crate) struct Job {
    pub(crate) prompts: Vec<Vec<u32>>,
    /// Choices of each prompt.
    pub(crate) n: usize,
    /// Most new tokens; nothing for as many as there is room for.
    pub(crate) max_tokens: Option<usize>,
    pub(crate) min_tokens: usize,
    pub(crate) ignore_eos: bool,
    pub(crate) stop_token_ids: Vec<u32>,
    pub(crate) stop: Vec<String>,
    /// Whether stop texts and tokens are part of the text.
    pub(crate) keep_stop: bool,
    /// Whether special tokens are left out of the text.
    pub(crate) skip_special: bool,
    /// Alternatives of each new token, if log-probabilities are wanted.
    pub(crate) logprobs: Option<usize>,
    /// The same of each token of the prompt.
    pub(crate) prompt_logprobs: Option<usize>,
    pub(crate) guide: Option<Guide>,
    sampling: Sampling,
    cache_salt: Option<u64>,
    max_model_len: usize,
}

impl Job {
    /// The job of `prompts`, whose lengths are refused by the name of the field `param` they came from.
    pub(crate) fn new(
        app: &App,
        caller: Caller,
        prompts: Vec<Vec<u32>>,
        fields: &SamplingFields,
        param: &str,
    ) -> Result<Self, ApiError> {
        let count = |number: Option<i64>| number.map(|number| number.max(0) as usize);
        let max_tokens = count(fields.max_tokens);
        let min_tokens = count(fields.min_tokens).unwrap_or(0);
        if let Some(max_tokens) = max_tokens.filter(|&most| min_tokens > most) {
            let problem = format!("{min_tokens} is more than max_tokens, which is {max_tokens}");
            return Err(ApiError::field("min_tokens", problem));
        }
        let most = app.model.max_model_len;
        for prompt in &prompts {
            check_prompt(prompt, app.model.vocab, param)?;
            let least = prompt.len() + usize::from(max_tokens != Some(0));
            if least > most {
                let asked =
                    format!("your prompt has {} tokens, which leaves no room for an answer", prompt.len());
                return Err(ApiError::context_length(most, param, asked));
            }
        }
        let job = Job {
            prompts,
            n: count(fields.n).unwrap_or(1),
            max_tokens,
            min_tokens,
            ignore_eos: fields.ignore_eos.unwrap_or(false),
            stop_token_ids: fields.stop_token_ids.clone().unwrap_or_default(),
            stop: fields.stop_texts(),
            keep_stop: fields.include_stop_str_in_output.unwrap_or(false),
            skip_special: fields.skip_special_tokens.unwrap_or(true),
            logprobs: None,
            prompt_logprobs: None,
            guide: None,
            sampling: sampling(app, fields)?,
            cache_salt: caller.cache_salt(fields.cache_salt.as_deref()),
            max_model_len: most,
        };
        if !job.stop.is_empty() && app.model.tokenizer.is_none() {
            return Err(ApiError::field("stop", "this model has no tokenizer, so texts cannot be found"));
        }
        Ok(job)
    }

    /// What the engine is asked for one answer to one prompt.
    pub(super) fn engine_request(&self, prompt: usize, answer: usize, guide: Option<Guide>) -> Request {
        let ids = &self.prompts[prompt];
        let room = self.max_model_len.saturating_sub(ids.len());
        let max_tokens = self.max_tokens.unwrap_or(room).min(room);
        let seed = self.sampling.seed;
        let seed = if answer == 0 { seed } else { Mix::keyed(seed, &[answer as u64]).next_u64() };
        Request {
            prompt: ids.clone(),
            max_tokens,
            min_tokens: self.min_tokens.min(max_tokens),
            ignore_eos: self.ignore_eos,
            stop_token_ids: self.stop_token_ids.clone(),
            sampling: Sampling { seed, ..self.sampling.clone() },
            logprobs: self.logprobs,
            prompt_logprobs: self.prompt_logprobs,
            constraint: guide.map(|guide| Box::new(guide) as Box<dyn Constraint>),
            cache_salt: self.cache_salt,
            ..Request::default()
        }
    }
}

fn check_prompt(prompt: &[u32], vocab: usize, param: &str) -> Result<(), ApiError> {
    if prompt.is_empty() {
        return Err(ApiError::field(param, "the prompt is empty: give at least one token"));
    }
    match prompt.iter().find(|&&id| id as usize >= vocab) {
        Some(id) => {
            Err(ApiError::field(param, format!("{id} is no token: the vocabulary ends at {}", vocab - 1)))
        }
        None => Ok(()),
    }
}

/// What the request says, then what the model's makers want, then plain draws.
fn sampling(app: &App, fields: &SamplingFields) -> Result<Sampling, ApiError> {
    let wanted = &app.model.generation;
    let or = |field: Option<f64>, wanted: Option<f32>, plain: f32| {
        field.map(|number| number as f32).or(wanted).unwrap_or(plain)
    };
    let temperature = fields.temperature.or(wanted.temperature.map(f64::from)).unwrap_or(1.0);
    let temperature =
        if temperature < LEAST_TEMPERATURE { 0.0 } else { temperature.min(f64::from(f32::MAX)) };
    Ok(Sampling {
        temperature: temperature as f32,
        top_k: fields.top_k.map(|k| k.max(0) as usize).or(wanted.top_k).unwrap_or(0),
        top_p: or(fields.top_p, wanted.top_p, 1.0).max(f32::MIN_POSITIVE),
        min_p: or(fields.min_p, wanted.min_p, 0.0),
        repetition_penalty: or(fields.repetition_penalty, wanted.repetition_penalty, 1.0)
            .max(f32::MIN_POSITIVE),
        presence_penalty: or(fields.presence_penalty, None, 0.0),
        frequency_penalty: or(fields.frequency_penalty, None, 0.0),
        logit_bias: fields.biases()?,
        seed: fields.seed.map_or_else(random, |seed| seed as u64),
    })
}

/// A number that nobody can guess from others.
fn random() -> u64 {
    uuid::Uuid::new_v4().as_u64_pair().0
}
