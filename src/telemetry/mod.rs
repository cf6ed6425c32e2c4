//! Logs and spans (tracing), metrics (OpenTelemetry), and their exporters.
//!
//! Logs go to stderr. Metrics are always available to Prometheus ([`prometheus_text`]); with `telemetry.otlp_endpoint`
//! metrics and spans also go to a collector. Logs, spans and metrics never contain a message's body, a token or an
//! address.
//!
//! The closed list of metrics is in [`metrics`].

mod collector;
mod exporters;
pub mod metrics;
mod trace;

use std::{
    io::{self, IsTerminal as _},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use opentelemetry::trace::TracerProvider as _;
use opentelemetry_sdk::{metrics::SdkMeterProvider, trace::SdkTracerProvider};
use tracing::{Level, Metadata, Subscriber};
use tracing_subscriber::{
    EnvFilter, Layer, Registry, filter::filter_fn, fmt, layer::SubscriberExt as _,
    registry::LookupSpan, util::SubscriberInitExt as _,
};

use crate::config::{self, LogFormat};

pub use exporters::prometheus_text;
pub use trace::{current_traceparent, set_remote_parent};

/// How long dropping [`Telemetry`] waits for the collector.
const DROP_DEADLINE: Duration = Duration::from_secs(3);

/// Telemetry can't be set up.
#[derive(Debug, thiserror::Error)]
pub enum InitError {
    /// `telemetry.log` is not a filter.
    #[error(
        "configuration: telemetry.log = {value:?}: is not a filter such as \"natter=debug,info\""
    )]
    Filter {
        /// The value.
        value: String,
        /// What is wrong with it.
        source: tracing_subscriber::filter::ParseError,
    },
    /// `telemetry.otlp_endpoint` can't be used.
    #[error(
        "configuration: telemetry.otlp_endpoint = {value:?}: must be a URL like \"http://127.0.0.1:4318\"; TLS is not built in"
    )]
    Endpoint {
        /// The value.
        value: String,
    },
    /// An exporter can't be built.
    #[error("the telemetry exporter can't be built")]
    Exporter(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// Telemetry can be set up only once per process.
    #[error("telemetry was set up before in this process")]
    Twice,
}

/// Telemetry of a process. It ends, and sends what is left, when it is shut down or dropped.
#[derive(Debug)]
#[must_use = "telemetry ends when this is dropped"]
pub struct Telemetry {
    /// The providers that send to a collector; none without `telemetry.otlp_endpoint`.
    otlp: Option<(SdkTracerProvider, SdkMeterProvider)>,
}

/// Sets up logs, metrics and traces of this process. `service` and `instance` identify it to a collector.
///
/// Call it from `main`, before a runtime is built: exporters block, on their own threads. The standard variables
/// `OTEL_RESOURCE_ATTRIBUTES` and `OTEL_EXPORTER_OTLP_HEADERS` are used.
///
/// # Errors
/// [`InitError`]; nothing is set up then.
pub fn init(
    config: &config::Telemetry,
    service: &str,
    instance: &str,
) -> Result<Telemetry, InitError> {
    let logs = logs(config)?;
    let exporters::Built { metrics, tracer } = exporters::build(config, service, instance)?;
    let spans = tracer.as_ref().map(spans);
    tracing_subscriber::registry()
        .with(logs)
        .with(spans)
        .try_init()
        .map_err(|_set_before| InitError::Twice)?;
    let meter = metrics.provider().clone();
    exporters::install(metrics)?;
    trace::switch(tracer.is_some());
    Ok(Telemetry {
        otlp: tracer.map(|tracer| (tracer, meter)),
    })
}

/// Log lines on stderr.
fn logs(config: &config::Telemetry) -> Result<Box<dyn Layer<Registry> + Send + Sync>, InitError> {
    let filter = EnvFilter::builder()
        .parse(&config.log)
        .map_err(|source| InitError::Filter {
            value: config.log.clone(),
            source,
        })?;
    let layer = fmt::layer().with_writer(io::stderr);
    Ok(match config.log_format {
        LogFormat::Human => layer
            .with_ansi(io::stderr().is_terminal())
            .with_filter(filter)
            .boxed(),
        LogFormat::Json => layer
            .json()
            .flatten_event(true)
            .with_span_list(false)
            .with_filter(filter)
            .boxed(),
    })
}

/// Spans for a collector: natter's own, whatever the filter of the log is, and the events in them from `info` up.
fn spans<S>(tracer: &SdkTracerProvider) -> impl Layer<S> + Send + Sync + use<S>
where
    S: Subscriber + for<'span> LookupSpan<'span> + Send + Sync,
{
    let exported = |metadata: &Metadata<'_>| {
        let own = metadata.target() == "natter" || metadata.target().starts_with("natter::");
        let level = if metadata.is_span() {
            Level::DEBUG
        } else {
            Level::INFO
        };
        own && *metadata.level() <= level
    };
    tracing_opentelemetry::layer()
        .with_tracer(tracer.tracer("natter"))
        .with_filter(filter_fn(exported))
}

impl Telemetry {
    /// Sends what is left and ends. Returns `false` if that was not done within `deadline`. It blocks, so do not call
    /// it on a thread of a runtime.
    ///
    /// Whatever is counted afterwards is not exported.
    pub fn shutdown(mut self, deadline: Duration) -> bool {
        self.finish(deadline)
    }

    fn finish(&mut self, deadline: Duration) -> bool {
        let Some((tracer, meter)) = self.otlp.take() else {
            return true;
        };
        trace::switch(false);
        // The SDK's own timeouts add up, and some are fixed. Threads that are late end with the process.
        let until = Instant::now() + deadline;
        let (done, results) = mpsc::channel();
        let spans_done = done.clone();
        let ends: [Box<dyn FnOnce() + Send>; 2] = [
            Box::new(move || {
                let ended = tracer.shutdown_with_timeout(deadline).is_ok();
                spans_done.send(ended).unwrap_or_default();
            }),
            Box::new(move || done.send(meter.shutdown().is_ok()).unwrap_or_default()),
        ];
        let mut pending = 0;
        for end in ends {
            let started = thread::Builder::new()
                .name("telemetry-end".to_owned())
                .spawn(end);
            pending += u32::from(started.is_ok());
        }
        let clean = (0..pending).all(|_| {
            let left = until.saturating_duration_since(Instant::now());
            results.recv_timeout(left).unwrap_or(false)
        });
        if !clean {
            tracing::warn!("the last metrics and spans did not reach the collector");
        }
        clean
    }
}

impl Drop for Telemetry {
    fn drop(&mut self) {
        self.finish(DROP_DEADLINE);
    }
}

#[cfg(test)]
mod tests;
