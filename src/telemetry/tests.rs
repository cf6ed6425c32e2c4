use std::{
    env,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{TcpListener, TcpStream},
    process::Command,
};

use figment::providers::{Format as _, Toml};

use super::{
    metrics::{
        Counter, Dropped, Gauge, Histogram, Metric, count, counted, gauge_add, name_hooks,
        name_workers,
    },
    *,
};
use crate::{
    config::Config,
    protocol::{Close, Codec},
};

/// Long enough for a busy machine; nothing waits for it to pass.
const PATIENCE: Duration = Duration::from_secs(30);

fn config(toml: &str) -> config::Telemetry {
    Config::with_defaults(Toml::string(toml)).unwrap().telemetry
}

#[test]
fn the_text_has_every_metric_with_its_help_and_what_was_counted() {
    // Those of workers and hooks have a series for each of them.
    name_workers(["translate"]);
    name_hooks(["crm"]);
    count(Counter::MessageDropped(Dropped::BadSubject), 3);
    count(Counter::SessionClosed(Close::TooSlow), 1);
    gauge_add(Gauge::OutboxBytes, 7);
    let built = exporters::build(&config(""), "edge", "e1").unwrap();
    assert!(built.tracer.is_none());
    built
        .metrics
        .record(Histogram::JoinDuration, Duration::from_millis(3));
    let text = built.metrics.text();
    let dropped = counted(Counter::MessageDropped(Dropped::BadSubject));
    for line in [
        format!("natter_message_dropped_total{{reason=\"bad_subject\"}} {dropped}"),
        "# TYPE natter_message_dropped_total counter".to_owned(),
        "# TYPE natter_session_active gauge".to_owned(),
        "natter_outbox_size_bytes 7".to_owned(),
        "natter_join_duration_seconds_bucket{le=\"0.005\"} 1".to_owned(),
        "natter_join_duration_seconds_bucket{le=\"0.0025\"} 0".to_owned(),
    ] {
        assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
    }
    for name in ["service_name=\"edge\"", "service_instance_id=\"e1\""] {
        assert!(text.contains(name), "{name} is not in\n{text}");
    }
    for Metric { name, help, .. } in Counter::LIST.iter().chain(Gauge::LIST) {
        let name = name.replace('.', "_");
        assert!(
            text.lines().any(|line| {
                line.strip_prefix("# HELP ")
                    .and_then(|rest| rest.split_once(' '))
                    .is_some_and(|(found, shown)| {
                        ["", "_total", "_bytes", "_seconds"]
                            .iter()
                            .any(|end| *found == format!("{name}{end}"))
                            && shown == *help
                    })
            }),
            "{name} is not in\n{text}"
        );
    }
}

#[test]
fn every_exported_label_value_is_of_its_closed_set() {
    name_workers(["translate"]);
    name_hooks(["crm"]);
    let text = exporters::build(&config(""), "edge", "e1")
        .unwrap()
        .metrics
        .text();
    let mut series = 0;
    for line in text.lines().filter(|line| line.starts_with("natter_")) {
        let Some((name, rest)) = line.split_once('{') else {
            continue;
        };
        let (label, _) = rest.split_once('}').unwrap();
        let (label, value) = label.split_once('=').unwrap();
        if label == "le" {
            continue;
        }
        let name = name.trim_end_matches("_total").trim_end_matches("_seconds");
        let metric = Counter::LIST
            .iter()
            .chain(Gauge::LIST)
            .find(|metric| metric.name.replace('.', "_") == name)
            .unwrap();
        let set = metric.label.as_ref().unwrap();
        assert_eq!(set.name, label, "{line}");
        assert!(set.values().contains(&value.trim_matches('"')), "{line}");
        series += 1;
    }
    let expected: usize = Counter::LIST
        .iter()
        .chain(Gauge::LIST)
        .filter_map(|metric| metric.label.as_ref())
        .map(|label| label.values().len())
        .sum();
    assert_eq!(series, expected, "a series of each value, from the start");
}

#[test]
fn the_text_is_there_before_telemetry_is_set_up() {
    count(Counter::SessionOpened(Codec::Native), 1);
    let name = "natter_session_opened_total{protocol=\"natter.v1\"} ";
    assert!(prometheus_text().contains(name));
}

#[test]
fn wrong_settings_are_named() {
    let error = |toml: &str| {
        exporters::build(&config(toml), "edge", "e1")
            .unwrap_err()
            .to_string()
    };
    for url in ["127.0.0.1:4318", "https://collector", "http://", "ftp://x"] {
        let error = error(&format!("[telemetry]\notlp_endpoint = '{url}'"));
        assert!(
            error.contains("telemetry.otlp_endpoint") && error.contains(url),
            "{error}"
        );
    }
    let error = logs(&config("[telemetry]\nlog = 'natter=loud'"))
        .err()
        .unwrap()
        .to_string();
    assert!(
        error.contains("telemetry.log") && error.contains("natter=loud"),
        "{error}"
    );
}

/// Reads one request, passes on its path and body, and only then answers, since the sender may check for them at once.
/// Returns whether they are still received.
fn serve(mut stream: TcpStream, requests: &mpsc::Sender<(String, Vec<u8>)>) -> io::Result<bool> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let path = line.split(' ').nth(1).unwrap_or_default().to_owned();
    let mut length = 0;
    loop {
        let mut header = String::new();
        reader.read_line(&mut header)?;
        let Some((name, value)) = header.split_once(':') else {
            break;
        };
        if name.eq_ignore_ascii_case("content-length") {
            length = value.trim().parse().unwrap();
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body)?;
    let heard = requests.send((path, body)).is_ok();
    stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")?;
    Ok(heard)
}

fn contains(body: &[u8], text: &str) -> bool {
    body.windows(text.len())
        .any(|window| window == text.as_bytes())
}

/// A collector: its URL, and the requests it gets.
fn collector() -> (String, mpsc::Receiver<(String, Vec<u8>)>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/", listener.local_addr().unwrap());
    let (requests, received) = mpsc::channel();
    thread::spawn(move || {
        for stream in listener.incoming() {
            if !serve(stream.unwrap(), &requests).unwrap() {
                break;
            }
        }
    });
    (url, received)
}

#[test]
fn metrics_and_spans_reach_a_collector_and_shutdown_sends_the_rest() {
    let (url, received) = collector();
    let config = config(&format!(
        "[telemetry]\notlp_endpoint = '{url}'\notlp_interval = '50ms'"
    ));
    let built = exporters::build(&config, "edge", "e1").unwrap();
    let tracer = built.tracer.unwrap();
    let subscriber = Registry::default().with(spans(&tracer));
    let remote = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    tracing::subscriber::with_default(subscriber, || {
        let span = tracing::debug_span!("command");
        trace::adopt(&span, remote);
        let parent = trace::traceparent(&span).unwrap();
        assert!(
            parent.starts_with("00-0af7651916cd43dd8448eb211c80319c-"),
            "{parent}"
        );
        assert!(parent.ends_with("-01") && parent != remote, "{parent}");
        let foreign = tracing::info_span!(target: "hyper", "foreign");
        assert_eq!(trace::traceparent(&foreign), None);
        let fresh = tracing::debug_span!(parent: None, "replay");
        trace::adopt(&fresh, "garbage");
        assert_eq!(trace::traceparent(&fresh).unwrap().len(), remote.len());
    });
    let telemetry = Telemetry {
        otlp: Some((tracer, built.metrics.provider().clone())),
    };
    // At each interval, without a request for it …
    let (path, body) = received.recv_timeout(PATIENCE).unwrap();
    assert_eq!(path, "/v1/metrics");
    assert!(contains(&body, "natter.message.delivered") && contains(&body, "reset_epoch"));
    assert!(contains(&body, "service.instance.id"));
    // … and the spans at the latest at the end.
    assert!(telemetry.shutdown(PATIENCE));
    let mut requests = Vec::new();
    while let Ok(request) = received.try_recv() {
        requests.push(request);
    }
    let spans: Vec<_> = requests
        .iter()
        .filter(|(path, _)| path == "/v1/traces")
        .collect();
    assert!(
        spans.iter().any(|(_, body)| contains(body, "command")),
        "{} requests",
        requests.len()
    );
    assert!(!spans.iter().any(|(_, body)| contains(body, "foreign")));
}

#[test]
fn a_collector_that_never_answers_does_not_hold_up_the_end() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let config = config(&format!("[telemetry]\notlp_endpoint = '{url}'"));
    let built = exporters::build(&config, "edge", "e1").unwrap();
    let telemetry = Telemetry {
        otlp: Some((built.tracer.unwrap(), built.metrics.provider().clone())),
    };
    let started = Instant::now();
    assert!(!telemetry.shutdown(Duration::from_millis(200)));
    // Without its own deadline, the export of metrics alone takes EXPORT_TIMEOUT.
    assert!(
        started.elapsed() < Duration::from_secs(4),
        "{:?}",
        started.elapsed()
    );
}

#[test]
fn without_exported_spans_there_is_no_traceparent() {
    let span = tracing::info_span!("command");
    let _entered = span.enter();
    assert_eq!(current_traceparent(), None);
}

/// Global settings need a process of their own: this test runs the next one in a child process.
#[test]
fn a_process_sets_telemetry_up_once_and_ends_it_inside_a_runtime() {
    let child = "telemetry::tests::in_a_process_of_its_own";
    let output = Command::new(env::current_exe().unwrap())
        .args([child, "--exact", "--ignored", "--nocapture"])
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    let stdout = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{stdout}\n{stderr}");
    assert!(stdout.contains("1 passed"), "{stdout}");
    let line = stderr
        .lines()
        .find(|line| line.contains("the life of the process"))
        .unwrap_or_else(|| panic!("no log line in {stderr}"));
    let line: serde_json::Value = serde_json::from_str(line).unwrap();
    assert_eq!(line["level"], "INFO");
    assert_eq!(line["edge.id"], "e1");
    assert_eq!(line["span"]["name"], "command");
    assert!(!stderr.contains("not in the log"), "{stderr}");
}

#[test]
#[ignore = "sets up the telemetry of its process: run by the test above"]
fn in_a_process_of_its_own() {
    let (url, received) = collector();
    let config = config(&format!(
        "[telemetry]\notlp_endpoint = '{url}'\nlog_format = 'json'"
    ));
    let telemetry = init(&config, "edge", "e1").unwrap();
    assert!(matches!(init(&config, "edge", "e1"), Err(InitError::Twice)));
    tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap()
        .block_on(async {
            let span = tracing::info_span!("command");
            span.in_scope(|| {
                tracing::info!(edge.id = "e1", "the life of the process");
                tracing::debug!("not in the log");
                assert!(current_traceparent().is_some());
            });
            drop(span);
            let remote = tracing::info_span!("remote");
            set_remote_parent(
                &remote,
                "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            );
            let parent = remote.in_scope(current_traceparent).unwrap();
            assert!(
                parent.contains("0af7651916cd43dd8448eb211c80319c"),
                "{parent}"
            );
            drop(remote);
            metrics::record(Histogram::ReplayDuration, Duration::from_millis(1));
            assert!(prometheus_text().contains("natter_replay_duration_seconds_count 1"));
            drop(telemetry);
        });
    assert_eq!(current_traceparent(), None);
    let requests: Vec<_> = received.try_iter().collect();
    for (path, text) in [
        ("/v1/metrics", "natter.replay.duration"),
        ("/v1/traces", "command"),
        ("/v1/traces", "remote"),
    ] {
        assert!(
            requests
                .iter()
                .any(|(p, body)| p == path && contains(body, text)),
            "{text} was not sent to {path}"
        );
    }
}
