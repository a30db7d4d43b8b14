//! How likely tokens were: natural logarithms, by the model's logits as they are.

use serde::Serialize;
use serde_json::{Map, Value};
use utoipa::ToSchema;

/// As `/v1/chat/completions` tells it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, ToSchema)]
pub(crate) struct ChatLogprobs {
    /// Of each token.
    pub(crate) content: Vec<ChatTokenLogprob>,
}

#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
pub(crate) struct ChatTokenLogprob {
    #[serde(flatten)]
    pub(crate) token: AlternativeToken,
    /// The most likely tokens in its place, in falling order.
    pub(crate) top_logprobs: Vec<AlternativeToken>,
}

#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
pub(crate) struct AlternativeToken {
    /// Text of the token.
    pub(crate) token: String,
    pub(crate) logprob: f64,
    /// Bytes of the text; several tokens may share a character.
    pub(crate) bytes: Vec<u8>,
}

/// As `/v1/completions` tells it: four lists with an element for each token.
#[derive(Clone, Debug, Default, PartialEq, Serialize, ToSchema)]
pub(crate) struct CompletionLogprobs {
    /// Texts of the tokens.
    pub(crate) tokens: Vec<String>,
    /// Nothing for the first token of a prompt.
    pub(crate) token_logprobs: Vec<Option<f64>>,
    /// Alternatives by their text, in falling order.
    #[schema(value_type = Vec<Option<Object>>)]
    pub(crate) top_logprobs: Vec<Option<Map<String, Value>>>,
    /// Characters before the token, in the text of the choice.
    pub(crate) text_offset: Vec<usize>,
}

impl CompletionLogprobs {
    pub(crate) fn extend(&mut self, more: CompletionLogprobs) {
        self.tokens.extend(more.tokens);
        self.token_logprobs.extend(more.token_logprobs);
        self.top_logprobs.extend(more.top_logprobs);
        self.text_offset.extend(more.text_offset);
    }
}
