//! `epsmoe chat`: a conversation with a server, in a terminal.

use crate::args::ChatArgs;
use crate::client::Client;
use crate::output;
use anyhow::Result;
use epsmoe_base::text::printable;
use serde_json::{Value, json};
use std::io::{self, BufRead, IsTerminal};

/// Talks until nothing more is said.
pub(crate) fn run(args: &ChatArgs) -> Result<()> {
    let client = Client::connect(&args.server)?;
    let asks = io::stdin().is_terminal();
    if asks {
        output::remark(format_args!("{}; an empty line ends", printable(&client.model)));
    }
    let mut said: Vec<Value> = Vec::new();
    said.extend(args.system.as_ref().map(|text| json!({"role": "system", "content": text})));
    let mut lines = io::stdin().lock().lines();
    loop {
        if asks {
            output::show("> ")?;
        }
        let Some(line) = lines.next().transpose()?.filter(|line| !line.trim().is_empty()) else {
            return Ok(());
        };
        said.push(json!({"role": "user", "content": line}));
        let answer = answer(&client, args, &said)?;
        said.push(json!({"role": "assistant", "content": answer}));
    }
}

/// Text as a terminal may have it: in lines, and without orders to the terminal.
fn shown(text: &str) -> String {
    let lines = text.split('\n').map(|line| line.split('\t').map(printable).collect::<Vec<_>>().join("\t"));
    lines.collect::<Vec<_>>().join("\n")
}

/// Shows an answer as it comes, and returns it.
fn answer(client: &Client, args: &ChatArgs, said: &[Value]) -> Result<String> {
    let mut body =
        json!({"model": client.model, "messages": said, "stream": true, "max_tokens": args.max_tokens});
    if let Some(temperature) = args.temperature {
        body["temperature"] = temperature.into();
    }
    let mut answer = String::new();
    if let Some(kwargs) = &args.chat_template_kwargs {
        body["chat_template_kwargs"] = kwargs.0.clone().into();
    }
    if !args.stop.is_empty() {
        body["stop"] = args.stop.clone().into();
    }
    client.stream("/v1/chat/completions", &body, |event| {
        let piece = event["choices"][0]["delta"]["content"].as_str().unwrap_or_default();
        answer.push_str(piece);
        output::show(&shown(piece))
    })?;
    output::show("\n")?;
    Ok(answer)
}
