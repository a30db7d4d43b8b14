//! Prompts, sampling, and the commands that take them.

use super::values::{JsonObject, TokenIds, TokenLimit, top_k};
use super::{ModelArgs, RunArgs};
use clap::builder::BoolishValueParser;
use clap::{ArgAction, ArgGroup, Args};
use std::path::PathBuf;

const SAMPLING: &str = "Sampling";

/// A prompt: token ids, a text, or a conversation.
#[derive(Args, Debug)]
#[command(group = ArgGroup::new("a prompt").args(["prompt", "messages", "ids"]).required(true).multiple(true))]
pub(crate) struct PromptArgs {
    /// The prompt as token ids, like 5,6,7
    #[arg(long, conflicts_with_all = ["prompt", "chat", "system", "messages", "chat_template_kwargs"])]
    pub(crate) ids: Option<TokenIds>,

    #[command(flatten)]
    pub(crate) text: TextArgs,
}

/// A text, or a conversation.
#[derive(Args, Debug)]
pub(crate) struct TextArgs {
    /// The prompt as text
    #[arg(long, value_name = "TEXT")]
    pub(crate) prompt: Option<String>,

    /// Make the prompt a message to the assistant, through the checkpoint's chat template
    #[arg(long, requires = "prompt", value_parser = BoolishValueParser::new())]
    pub(crate) chat: bool,

    /// A system message before it
    #[arg(long, value_name = "TEXT", requires = "chat")]
    pub(crate) system: Option<String>,

    /// A conversation, through the chat template: a file with a list of messages in OpenAI's format, or an object with
    /// `messages` and perhaps `tools`, `documents` and `chat_template_kwargs`
    #[arg(long, value_name = "FILE.json", conflicts_with_all = ["prompt", "chat", "system"])]
    pub(crate) messages: Option<PathBuf>,

    /// More variables of the chat template, like '{"enable_thinking": false}'
    #[arg(long, value_name = "OBJECT")]
    pub(crate) chat_template_kwargs: Option<JsonObject>,
}

#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  epsmoe generate --model ./Qwen3-30B-A3B --prompt 'Once upon a time' --max-tokens 100
  epsmoe generate --model Qwen/Qwen3-30B-A3B --chat --prompt Hello --temperature 0.7 --top-p 0.9 --seed 3
  epsmoe generate --model ./Qwen3-30B-A3B --messages turns.json --chat-template-kwargs '{\"enable_thinking\": false}'
  epsmoe generate --model ./model --ids 5,6,7 --max-tokens 16 --temperature 0 --ignore-eos --json")]
pub(crate) struct GenerateArgs {
    #[command(flatten)]
    pub(crate) prompt: PromptArgs,

    /// Most new tokens; -1 for as many as the context has room for [default: generation_config.json's, or 128]
    #[arg(long, value_name = "NUMBER", allow_negative_numbers = true)]
    pub(crate) max_tokens: Option<TokenLimit>,

    /// Print one line of JSON instead of the text as it comes
    #[arg(long, value_parser = BoolishValueParser::new())]
    pub(crate) json: bool,

    #[command(flatten)]
    pub(crate) sampling: SamplingArgs,

    #[command(flatten)]
    pub(crate) run: RunArgs,
}

/// How tokens are chosen; generation_config.json says what is left out.
#[derive(Args, Debug)]
#[command(next_help_heading = SAMPLING)]
pub(crate) struct SamplingArgs {
    /// 0 takes the most likely token [default: generation_config.json's, or 0, or 1 with a flag below that draws]
    #[arg(long, env = "EPSMOE_TEMPERATURE", value_name = "NUMBER", allow_negative_numbers = true)]
    pub(crate) temperature: Option<f32>,

    /// Draw from this many of the most likely tokens only; 0 or -1 for all
    #[arg(long, env = "EPSMOE_TOP_K", value_name = "NUMBER", value_parser = top_k, allow_negative_numbers = true)]
    pub(crate) top_k: Option<usize>,

    /// Draw from the most likely tokens that together have this probability
    #[arg(long, env = "EPSMOE_TOP_P", value_name = "NUMBER", allow_negative_numbers = true)]
    pub(crate) top_p: Option<f32>,

    /// Draw from tokens that have at least this share of the most likely one's probability
    #[arg(long, env = "EPSMOE_MIN_P", value_name = "NUMBER", allow_negative_numbers = true)]
    pub(crate) min_p: Option<f32>,

    /// Damp tokens that are there already; 1 leaves them
    #[arg(long, env = "EPSMOE_REPETITION_PENALTY", value_name = "NUMBER", allow_negative_numbers = true)]
    pub(crate) repetition_penalty: Option<f32>,

    /// End before this text; can be given several times
    #[arg(long, env = "EPSMOE_STOP", value_name = "TEXT")]
    pub(crate) stop: Vec<String>,

    /// End after any of these tokens too, like 5,6
    #[arg(long, env = "EPSMOE_STOP_TOKEN_IDS", value_name = "IDS")]
    pub(crate) stop_token_ids: Option<TokenIds>,

    /// Leave special tokens out of the text; --stop sees them either way
    #[arg(
        long,
        env = "EPSMOE_SKIP_SPECIAL_TOKENS",
        value_name = "YES|NO",
        default_value = "true",
        action = ArgAction::Set,
        value_parser = BoolishValueParser::new()
    )]
    pub(crate) skip_special_tokens: bool,

    /// Go on after a token that ends a text
    #[arg(long, env = "EPSMOE_IGNORE_EOS", value_parser = BoolishValueParser::new())]
    pub(crate) ignore_eos: bool,
}

#[derive(Args, Debug)]
pub(crate) struct LogitsArgs {
    /// The prompt as token ids, like 5,6,7
    #[arg(long)]
    pub(crate) ids: TokenIds,

    /// Where to write the tensor `logits` [tokens, vocabulary] in float32
    #[arg(long, value_name = "FILE.safetensors")]
    pub(crate) out: PathBuf,

    #[command(flatten)]
    pub(crate) run: RunArgs,
}

#[derive(Args, Debug)]
pub(crate) struct TokenizeArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,

    #[command(flatten)]
    pub(crate) text: TextArgs,

    /// Print one line of JSON
    #[arg(long, value_parser = BoolishValueParser::new())]
    pub(crate) json: bool,
}
