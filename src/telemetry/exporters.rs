//! Exporters: Prometheus always, OTLP over HTTP when an endpoint is configured.

use std::{
    fmt,
    sync::{
        OnceLock,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use opentelemetry::{KeyValue, metrics::Histogram as OtelHistogram, metrics::MeterProvider as _};
use opentelemetry_otlp::{
    MetricExporter, Protocol, SpanExporter, WithExportConfig as _, WithHttpConfig as _,
};
use opentelemetry_sdk::{
    Resource,
    error::OTelSdkResult,
    metrics::{
        PeriodicReader, SdkMeterProvider, Temporality, data::ResourceMetrics,
        exporter::PushMetricExporter,
    },
    trace::{SdkTracerProvider, SpanData, SpanExporter as SpanExport},
};
use prometheus::{Registry, TextEncoder};

use super::{
    InitError,
    collector::Collector,
    metrics::{self, Histogram},
};
use crate::config;

/// Timeout of one export, retries included.
const EXPORT_TIMEOUT: Duration = Duration::from_secs(5);

static INSTALLED: OnceLock<Metrics> = OnceLock::new();

/// The instruments of the list, and their readers.
pub(super) struct Metrics {
    provider: SdkMeterProvider,
    registry: Registry,
    histograms: Vec<OtelHistogram<f64>>,
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Metrics").finish_non_exhaustive()
    }
}

/// An exporter that logs when its collector fails and when it works again: once each, not at every attempt. (The SDK's
/// own messages are not compiled in.)
#[derive(Debug)]
struct Watched<E> {
    exporter: E,
    signal: &'static str,
    failing: AtomicBool,
}

impl<E> Watched<E> {
    fn new(signal: &'static str, exporter: E) -> Self {
        Self {
            exporter,
            signal,
            failing: AtomicBool::new(false),
        }
    }

    fn watch(&self, result: OTelSdkResult) -> OTelSdkResult {
        let signal = self.signal;
        let failed = self.failing.swap(result.is_err(), Relaxed);
        match &result {
            Err(error) if !failed => {
                tracing::warn!(signal, %error, "the OTLP collector can't be reached or refuses: exports are lost until it works");
            }
            Ok(()) if failed => tracing::info!(signal, "the OTLP collector works again"),
            Ok(()) | Err(_) => {}
        }
        result
    }
}

impl PushMetricExporter for Watched<MetricExporter> {
    async fn export(&self, metrics: &ResourceMetrics) -> OTelSdkResult {
        self.watch(self.exporter.export(metrics).await)
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.exporter.force_flush()
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.exporter.shutdown_with_timeout(timeout)
    }

    fn temporality(&self) -> Temporality {
        self.exporter.temporality()
    }
}

impl SpanExport for Watched<SpanExporter> {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        self.watch(self.exporter.export(batch).await)
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.exporter.shutdown_with_timeout(timeout)
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.exporter.force_flush()
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.exporter.set_resource(resource);
    }
}

/// The exporters that [`build`] made; not installed yet.
#[derive(Debug)]
pub(super) struct Built {
    pub(super) metrics: Metrics,
    /// Only with an endpoint.
    pub(super) tracer: Option<SdkTracerProvider>,
}

impl Metrics {
    fn build(
        resource: Resource,
        push: Option<PeriodicReader<Watched<MetricExporter>>>,
    ) -> Result<Self, InitError> {
        let registry = Registry::new();
        let pull = opentelemetry_prometheus::exporter()
            .with_registry(registry.clone())
            .scope_info_enabled(false)
            .build()
            .map_err(|source| InitError::Exporter(Box::new(source)))?;
        let mut provider = SdkMeterProvider::builder()
            .with_resource(resource)
            .with_reader(pull);
        if let Some(push) = push {
            provider = provider.with_reader(push);
        }
        let provider = provider.build();
        let histograms = metrics::instruments(&provider.meter("natter"));
        Ok(Self {
            provider,
            registry,
            histograms,
        })
    }

    pub(super) fn provider(&self) -> &SdkMeterProvider {
        &self.provider
    }

    pub(super) fn record(&self, histogram: Histogram, duration: Duration) {
        if let Some(instrument) = self.histograms.get(histogram as usize) {
            instrument.record(duration.as_secs_f64(), &[]);
        }
    }

    pub(super) fn text(&self) -> String {
        TextEncoder::new()
            .encode_to_string(&self.registry.gather())
            .unwrap_or_else(|error| {
                tracing::error!(%error, "the metrics can't be written as text");
                String::new()
            })
    }
}

fn resource(service: &str, instance: &str) -> Resource {
    Resource::builder()
        .with_service_name(service.to_owned())
        .with_attribute(KeyValue::new("service.instance.id", instance.to_owned()))
        .with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")))
        .build()
}

/// Builds the exporters of `config`.
pub(super) fn build(
    config: &config::Telemetry,
    service: &str,
    instance: &str,
) -> Result<Built, InitError> {
    let resource = resource(service, instance);
    let base = config.otlp_endpoint.trim_end_matches('/');
    if base.is_empty() {
        return Ok(Built {
            metrics: Metrics::build(resource, None)?,
            tracer: None,
        });
    }
    // An unreachable URL is the collector's fault and is logged. An invalid one is an error of the configuration.
    let valid = base
        .strip_prefix("http://")
        .is_some_and(|rest| !rest.starts_with('/') && !rest.is_empty());
    if !valid {
        return Err(InitError::Endpoint {
            value: config.otlp_endpoint.clone(),
        });
    }
    let failed = |source| InitError::Exporter(Box::new(source));
    let spans = SpanExporter::builder()
        .with_http()
        .with_http_client(Collector {
            within: EXPORT_TIMEOUT,
        })
        .with_protocol(Protocol::HttpBinary)
        .with_endpoint(format!("{base}/v1/traces"))
        .with_timeout(EXPORT_TIMEOUT)
        .build()
        .map_err(failed)?;
    let tracer = SdkTracerProvider::builder()
        .with_resource(resource.clone())
        .with_batch_exporter(Watched::new("traces", spans))
        .build();
    let exporter = MetricExporter::builder()
        .with_http()
        .with_http_client(Collector {
            within: EXPORT_TIMEOUT,
        })
        .with_protocol(Protocol::HttpBinary)
        .with_endpoint(format!("{base}/v1/metrics"))
        .with_timeout(EXPORT_TIMEOUT)
        .build()
        .map_err(failed)?;
    let push = PeriodicReader::builder(Watched::new("metrics", exporter))
        .with_interval(config.otlp_interval)
        .build();
    Ok(Built {
        metrics: Metrics::build(resource, Some(push))?,
        tracer: Some(tracer),
    })
}

/// Installs `metrics` as those of the process.
pub(super) fn install(metrics: Metrics) -> Result<(), InitError> {
    INSTALLED.set(metrics).map_err(|_second| InitError::Twice)
}

pub(super) fn installed() -> Option<&'static Metrics> {
    INSTALLED.get()
}

/// All metrics of this process in Prometheus' text format (version 0.0.4), for `/metrics`.
///
/// Also works before [`init`](super::init), then without histograms. The time it takes is proportional to the number of
/// series, some hundred.
#[must_use]
pub fn prometheus_text() -> String {
    match installed() {
        Some(metrics) => metrics.text(),
        None => Metrics::build(resource("natter", ""), None)
            .map(|metrics| metrics.text())
            .unwrap_or_default(),
    }
}
