//! Trace context across processes, as `traceparent` of W3C Trace Context.

use std::{
    collections::HashMap,
    sync::atomic::{AtomicBool, Ordering::Relaxed},
};

use opentelemetry::{propagation::TextMapPropagator as _, trace::TraceContextExt as _};
use opentelemetry_sdk::propagation::TraceContextPropagator;
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt as _;

/// Whether spans are exported: otherwise their context is not needed.
static ON: AtomicBool = AtomicBool::new(false);

pub(super) fn switch(on: bool) {
    ON.store(on, Relaxed);
}

/// `traceparent` of the current span, to be sent with a message. `None`, for the cost of one load, unless spans are
/// exported.
#[must_use]
pub fn current_traceparent() -> Option<String> {
    if ON.load(Relaxed) {
        traceparent(&Span::current())
    } else {
        None
    }
}

/// Makes the span that `traceparent` names the parent of `span`, which must not have been entered yet. A malformed text
/// is ignored: it comes from outside, and a trace is not worth an error.
pub fn set_remote_parent(span: &Span, traceparent: &str) {
    if !ON.load(Relaxed) {
        return;
    }
    adopt(span, traceparent);
}

pub(super) fn traceparent(span: &Span) -> Option<String> {
    let context = span.context();
    let span = context.span();
    let context = span.span_context();
    context.is_valid().then(|| {
        format!(
            "00-{}-{}-{:02x}",
            context.trace_id(),
            context.span_id(),
            context.trace_flags().to_u8()
        )
    })
}

pub(super) fn adopt(span: &Span, traceparent: &str) {
    let carrier = HashMap::from([("traceparent".to_owned(), traceparent.to_owned())]);
    let context = TraceContextPropagator::new().extract(&carrier);
    if context.span().span_context().is_valid()
        && let Err(error) = span.set_parent(context)
    {
        tracing::debug!(%error, "the trace of a message could not be continued");
    }
}
