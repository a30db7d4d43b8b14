//! `epsmoe tokenize`: what a model is given for a text.

use crate::args::TokenizeArgs;
use crate::{output, prompt, setup};
use anyhow::Result;
use epsmoe_base::text::printable;
use epsmoe_text::Tokenizer;
use serde_json::json;

/// Prints the tokens of a text, one a line, or as JSON.
pub(crate) fn run(args: &TokenizeArgs) -> Result<()> {
    let place = setup::text(&args.model)?;
    let tokenizer = place.as_deref().map(Tokenizer::open).transpose()?.flatten();
    let ids = prompt::encode(place.as_deref(), &args.model.model, tokenizer.as_ref(), &args.text)?;
    let token = |id: u32| tokenizer.as_ref().and_then(|tokenizer| tokenizer.token(id)).unwrap_or_default();
    if args.json {
        let tokens: Vec<String> = ids.iter().map(|&id| token(id)).collect();
        return output::show_json(&json!({ "count": ids.len(), "ids": ids, "tokens": tokens }));
    }
    ids.iter().try_for_each(|&id| output::show_line(format_args!("{id:>7}  {}", printable(&token(id)))))
}
