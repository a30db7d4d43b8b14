//! One line for each request when its answer has gone out, or its client.

use axum::body::{Body, Bytes, HttpBody};
use axum::extract::Request;
use axum::http::{Method, StatusCode};
use axum::middleware::Next;
use axum::response::Response;
use hyper::body::{Frame, SizeHint};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Instant;
use tower_http::request_id::RequestId;

/// Writes the line of a request.
pub(crate) async fn log(request: Request, next: Next) -> Response {
    let id = request.extensions().get::<RequestId>().and_then(|id| id.header_value().to_str().ok());
    let entry = Entry {
        id: id.unwrap_or_default().to_owned(),
        method: request.method().clone(),
        path: request.uri().path().to_owned(),
        begun: Instant::now(),
        status: None,
        sent: 0,
        whole: false,
    };
    let mut guard = Guard(entry);
    let response = next.run(request).await;
    guard.0.status = Some(response.status());
    guard.0.whole = response.body().is_end_stream();
    response.map(|body| Body::new(Logged { body, guard }))
}

/// What is known of a request.
struct Entry {
    id: String,
    method: Method,
    path: String,
    begun: Instant,
    /// Nothing if the client went before there was an answer.
    status: Option<StatusCode>,
    /// Bytes of the answer's body.
    sent: usize,
    whole: bool,
}

/// Writes when it is dropped.
struct Guard(Entry);

impl Drop for Guard {
    fn drop(&mut self) {
        let Entry { id, method, path, begun, status, sent, whole } = &self.0;
        tracing::info!(
            target: "epsmoe::access",
            request_id = id,
            %method,
            path,
            status = status.map(|status| status.as_u16()),
            seconds = begun.elapsed().as_secs_f64(),
            bytes = sent,
            outcome = if *whole { "answered" } else { "client gone" },
        );
    }
}

struct Logged {
    body: Body,
    guard: Guard,
}

impl HttpBody for Logged {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(context));
        match &frame {
            Some(Ok(frame)) => self.guard.0.sent += frame.data_ref().map_or(0, Bytes::len),
            Some(Err(_)) => {}
            None => self.guard.0.whole = true,
        }
        // Bodies of known length are not asked again after their end.
        self.guard.0.whole |= self.body.is_end_stream();
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
