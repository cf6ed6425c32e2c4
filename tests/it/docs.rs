//! README.md says what is so: its tables are compared with the code.

#![expect(
    clippy::string_slice,
    reason = "cut at what was found in the same text"
)]

use std::collections::BTreeMap;

use natter::{
    config::DEFAULT_TOML,
    protocol::{Close, ErrorCode},
    telemetry::metrics::{Counter, Gauge, Histogram},
};

const README: &str = include_str!("../../README.md");

/// The part of the README from a heading to the next one of the same or a higher level.
fn section(heading: &str) -> &'static str {
    let level = heading.split(' ').next().unwrap().len();
    let start = README
        .find(&format!("\n{heading}\n"))
        .unwrap_or_else(|| panic!("the README has no {heading:?}"));
    let body = &README[start + heading.len() + 2..];
    let mut end = body.len();
    let mut fenced = false;
    let mut at = 0;
    for line in body.split_inclusive('\n') {
        if line.starts_with("```") {
            fenced = !fenced;
        }
        let hashes = line.bytes().take_while(|b| *b == b'#').count();
        if !fenced && hashes > 0 && hashes <= level {
            end = at;
            break;
        }
        at += line.len();
    }
    &body[..end]
}

/// The rows of the tables in `text`, without their rulers, as cells.
fn rows(text: &str) -> Vec<Vec<&str>> {
    text.lines()
        .filter(|line| {
            line.starts_with('|') && !line.starts_with("|--") && !line.starts_with("| --")
        })
        .map(|line| line.trim_matches('|').split('|').map(str::trim).collect())
        .collect()
}

/// What stands between back quotes, if the whole cell does.
fn code(cell: &str) -> Option<&str> {
    cell.strip_prefix('`')?
        .strip_suffix('`')
        .filter(|inner| !inner.contains('`'))
}

fn flatten(prefix: &str, table: &toml::Table, into: &mut BTreeMap<String, String>) {
    for (key, value) in table {
        let key = if prefix.is_empty() {
            key.clone()
        } else {
            format!("{prefix}.{key}")
        };
        match value {
            toml::Value::Table(inner) => flatten(&key, inner, into),
            other => {
                into.insert(key, other.to_string());
            }
        }
    }
}

#[test]
fn every_key_of_the_configuration_is_in_the_table_with_its_default() {
    let mut keys = BTreeMap::new();
    flatten("", &DEFAULT_TOML.parse().unwrap(), &mut keys);
    let documented: BTreeMap<String, String> = rows(section("## Configuration"))
        .iter()
        .filter_map(|row| Some((code(row[0])?.to_owned(), code(row[1])?.to_owned())))
        .collect();
    assert_eq!(documented, keys);
}

#[test]
fn every_error_code_is_in_the_table() {
    let rows = rows(section("### Error codes"));
    for code in ErrorCode::ALL {
        let word = format!("`{}`", code.as_str());
        let row = rows
            .iter()
            .find(|row| row[0] == word)
            .unwrap_or_else(|| panic!("{word}"));
        assert_eq!(
            row[1],
            if code.retry() { "yes" } else { "no" },
            "{word}: retry"
        );
        assert_eq!(
            row[2],
            code.http_status().to_string(),
            "{word}: HTTP status"
        );
    }
    assert_eq!(rows.len() - 1, ErrorCode::ALL.len());
}

#[test]
fn every_close_code_is_in_the_table() {
    let rows = rows(section("### Close codes"));
    for close in Close::ALL {
        let (number, word) = (close.code().to_string(), format!("`{}`", close.reason()));
        assert!(
            rows.iter().any(|row| row[0] == number && row[1] == word),
            "{number} {word}"
        );
        assert!(close.reason().len() <= 123);
    }
    assert_eq!(rows.len() - 1, Close::ALL.len());
}

#[test]
fn every_metric_is_in_the_table() {
    let section = section("## Telemetry");
    for metric in [Counter::LIST, Gauge::LIST, Histogram::LIST].concat() {
        assert!(
            section.contains(&format!("`{}`", metric.name)),
            "{}",
            metric.name
        );
    }
}

/// Files that are linked or named as a link's target exist.
#[test]
fn links_lead_somewhere() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    for text in [
        README,
        include_str!("../../ARCHITECTURE.md"),
        include_str!("../../CHANGELOG.md"),
    ] {
        for target in text
            .split("](")
            .skip(1)
            .filter_map(|rest| rest.split(')').next())
        {
            let file = target.split('#').next().unwrap();
            if !file.is_empty() && !target.contains("://") {
                assert!(root.join(file).exists(), "{target}");
            }
        }
    }
}

#[test]
fn the_example_configurations_are_valid() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("config");
    let mut examples = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let text = std::fs::read_to_string(&path).unwrap();
        // Panics with the file's faults.
        crate::support::config(&text);
        examples += 1;
    }
    assert!(examples >= 2, "default.toml and at least one example");
}
