//! Asking a server that speaks OpenAI's API, ours or another.

use crate::args::ServerArgs;
use anyhow::{Context, Result, bail};
use epsmoe_base::text::printable;
use serde_json::Value;
use std::io::{BufRead, BufReader, Read};
use std::time::Duration;
use ureq::Agent;

/// How long a connection may take to be made.
const CONNECT: Duration = Duration::from_secs(10);

/// The longest line of a stream, and the longest plain answer, that is read.
const LONGEST: u64 = 64 << 20;

/// A server, and which of its models is asked.
pub(crate) struct Client {
    agent: Agent,
    base: String,
    key: Option<String>,
    pub(crate) model: String,
}

impl Client {
    /// Looks whether the server is there and has the model.
    pub(crate) fn connect(args: &ServerArgs) -> Result<Self> {
        let base = args.base_url.trim_end_matches('/').trim_end_matches("/v1").to_owned();
        if base.starts_with("https://") {
            bail!(
                "--base-url {base}: this client has no TLS: name an http:// address, of a proxy that has if need be"
            );
        }
        if !base.starts_with("http://") {
            bail!("--base-url {base}: must begin with http://");
        }
        let config = Agent::config_builder().http_status_as_error(false).timeout_connect(Some(CONNECT));
        let agent = config.max_idle_connections_per_host(4096).max_idle_connections(4096).build().new_agent();
        let mut client = Client { agent, base, key: args.api_key.clone(), model: String::new() };
        let models = client.get("/v1/models")?;
        let names = models["data"].as_array().into_iter().flatten().filter_map(|model| model["id"].as_str());
        let names: Vec<&str> = names.collect();
        client.model = match &args.model {
            Some(model) if names.contains(&model.as_str()) => model.clone(),
            Some(model) => {
                bail!("{} has no model {model}: it has {}", client.base, printable(&names.join(", ")))
            }
            None => names.first().with_context(|| format!("{} serves no model", client.base))?.to_string(),
        };
        Ok(client)
    }

    fn get(&self, path: &str) -> Result<Value> {
        let url = format!("{}{path}", self.base);
        let mut request = self.agent.get(&url);
        if let Some(key) = &self.key {
            request = request.header("authorization", format!("Bearer {key}"));
        }
        answer(request.call().with_context(|| format!("cannot reach {url}: is the server running?"))?, &url)
    }

    /// A plain answer.
    pub(crate) fn post(&self, path: &str, body: &Value) -> Result<Value> {
        let url = format!("{}{path}", self.base);
        answer(self.send(&url, body)?, &url)
    }

    /// The events of a stream, until it says that it is done; `each` may end it early.
    pub(crate) fn stream(
        &self,
        path: &str,
        body: &Value,
        mut each: impl FnMut(Value) -> Result<()>,
    ) -> Result<()> {
        let url = format!("{}{path}", self.base);
        let response = self.send(&url, body)?;
        if !response.status().is_success() {
            return answer(response, &url).map(drop);
        }
        let mut lines = BufReader::new(response.into_body().into_reader());
        let mut line = String::new();
        loop {
            line.clear();
            let read = lines.by_ref().take(LONGEST).read_line(&mut line);
            if read.with_context(|| format!("{url}: the stream broke off"))? == 0 {
                bail!("{url}: the stream ended without [DONE]");
            }
            let Some(data) = line.trim_end().strip_prefix("data:").map(str::trim) else { continue };
            if data == "[DONE]" {
                return Ok(());
            }
            let event: Value =
                serde_json::from_str(data).with_context(|| format!("{url}: an event is no JSON"))?;
            if let Some(problem) = event["error"]["message"].as_str() {
                bail!("{url}: {}", printable(problem));
            }
            each(event)?;
        }
    }

    fn send(&self, url: &str, body: &Value) -> Result<ureq::http::Response<ureq::Body>> {
        let mut request = self.agent.post(url);
        if let Some(key) = &self.key {
            request = request.header("authorization", format!("Bearer {key}"));
        }
        request.send_json(body).with_context(|| format!("cannot reach {url}"))
    }
}

/// The JSON of a good answer; what a refusal says otherwise.
fn answer(response: ureq::http::Response<ureq::Body>, url: &str) -> Result<Value> {
    let status = response.status();
    let text = response.into_body().into_with_config().limit(LONGEST).read_to_string();
    let text = text.with_context(|| format!("{url}: the answer broke off"))?;
    let body: Value = serde_json::from_str(&text).unwrap_or_default();
    if status.is_success() {
        return Ok(body);
    }
    let message = body["error"]["message"].as_str().unwrap_or("it does not say why");
    bail!("{url} answers {status}: {}", printable(message))
}
