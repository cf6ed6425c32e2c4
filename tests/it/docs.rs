//! README.md says what is so: its tables are compared with the code.

#![expect(
    clippy::string_slice,
    reason = "cut at what was found in the same text"
)]

use std::collections::{BTreeMap, BTreeSet};

use natter::testing::{
    auth::{Claims, MAX_TOKEN, Right},
    config::DEFAULT_TOML,
    model::{MAX_REGIONS, MAX_USER},
    protocol::{Close, ErrorCode, HistoryOf, PageOf},
    telemetry::metrics::{Counter, Gauge, Histogram, Label as _, Op},
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

#[test]
fn every_metric_has_its_label_in_the_table_and_nothing_else_is_there() {
    let rows = rows(section("## Telemetry"));
    let metrics = [Counter::LIST, Gauge::LIST, Histogram::LIST].concat();
    for metric in &metrics {
        let name = format!("`{}`", metric.name);
        let row = rows.iter().find(|row| row[0].contains(&name));
        let row = row.unwrap_or_else(|| panic!("{name}"));
        let Some(label) = metric.label else { continue };
        let told = row[1];
        assert!(
            told.contains(&format!("`{}`", label.name)),
            "{name}: {told}"
        );
        // These are the words of tables of their own.
        if label.name == "code" || label.name == "op" {
            continue;
        }
        for value in label.values() {
            assert!(
                told.contains(&format!("`{value}`")),
                "{name}, {value}: {told}"
            );
        }
    }
    for row in &rows[1..] {
        for name in quoted(row[0]).filter(|name| name.starts_with("natter.")) {
            assert!(metrics.iter().any(|metric| metric.name == name), "{name}");
        }
    }
}

/// What stands between back quotes in `text`.
fn quoted(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

#[test]
fn every_command_of_a_client_is_in_the_table() {
    let rows = rows(section("### Commands of a client"));
    let documented: BTreeSet<&str> = rows.iter().filter_map(|row| code(row[0])).collect();
    let known = Op::ALL.iter().map(|op| op.value());
    let known: BTreeSet<&str> = known.filter(|op| *op != "unknown").collect();
    assert_eq!(documented, known);
}

#[test]
fn every_route_is_in_the_table() {
    let api: serde_json::Value =
        serde_json::from_str(&natter::testing::edge::openapi_json()).unwrap();
    let mut routes: BTreeSet<String> = BTreeSet::new();
    for (path, methods) in api["paths"].as_object().unwrap() {
        for method in methods.as_object().unwrap().keys() {
            routes.insert(format!("{} {path}", method.to_uppercase()));
        }
    }
    // No part of the interface for programs.
    routes.insert("GET /".to_owned());
    let rows = rows(section("## HTTP"));
    let documented: BTreeSet<String> = rows
        .iter()
        .filter_map(|row| Some(code(row[0])?.to_owned()))
        .collect();
    assert_eq!(documented, routes);
}

#[test]
fn every_claim_and_right_of_a_token_is_there() {
    let tokens = section("## Tokens");
    let mut claims = Claims::new("kim", 1);
    claims.iss = Some("i".to_owned());
    claims.aud = vec!["a".to_owned()];
    (claims.nbf, claims.iat) = (Some(1), Some(1));
    claims.jti = Some("t".to_owned());
    claims.info = Some(serde_json::Map::new());
    let claims = serde_json::to_value(claims).unwrap();
    let rows = rows(tokens);
    for claim in claims.as_object().unwrap().keys() {
        let row = rows
            .iter()
            .find(|row| quoted(row[0]).any(|name| name == claim));
        let row = row.unwrap_or_else(|| panic!("{claim}"));
        assert!(!row[1].contains("not used"), "{claim}: {}", row[1]);
    }
    for right in Right::ALL {
        assert!(
            tokens.contains(&format!("`{}` = ", right.as_str())),
            "{right}"
        );
    }
}

#[test]
fn limits_are_those_of_the_code() {
    let rows = rows(section("## Limits"));
    for (what, limit) in [
        ("a page of users", "1,000".to_owned()),
        ("origins in a cursor", MAX_REGIONS.to_string()),
        (
            "user, token",
            format!("{MAX_USER} bytes, {} KiB", MAX_TOKEN / 1024),
        ),
    ] {
        let row = rows.iter().find(|row| row[0] == what);
        let row = row.unwrap_or_else(|| panic!("{what}"));
        assert_eq!(row[1], limit, "{what}");
    }
    assert_eq!(PageOf::MAX, 1000);
    let history = rows
        .iter()
        .find(|row| row[0].starts_with("a page of history"));
    assert!(history.unwrap()[1].starts_with(&HistoryOf::MAX.to_string()));
}

/// What `natter … --help` says.
fn help(command: &[&str]) -> String {
    let mut natter = std::process::Command::new(crate::support::natter());
    let output = natter.args(command).arg("--help").output().unwrap();
    assert!(output.status.success(), "{command:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// The long flags in a help text, but those that every command has.
fn flags(help: &str) -> BTreeSet<String> {
    let words = help
        .lines()
        .map(str::trim_start)
        .filter(|line| line.starts_with('-'));
    let words = words.flat_map(|line| line.split([' ', ',', '=']).take(3));
    let flags = words.filter_map(|word| word.strip_prefix("--"));
    let own = flags.filter(|flag| !["help", "config", "version"].contains(flag));
    own.map(str::to_owned).collect()
}

#[test]
fn every_command_of_the_command_line_is_there_with_its_flags() {
    let section = section("## Commands");
    let rows = rows(section);
    let all = help(&[]);
    let commands = all.split("Commands:").nth(1).unwrap();
    let commands = commands.split("Options:").next().unwrap().lines();
    let commands: BTreeSet<&str> = commands
        .filter(|line| line.starts_with("  ") && !line.starts_with("   "))
        .filter_map(|line| line.split_whitespace().next())
        .filter(|command| *command != "help")
        .collect();
    let named = |cell: &'static str| {
        let words = quoted(cell).filter_map(|words| words.strip_prefix("natter "));
        words.filter_map(|words| words.split(' ').next())
    };
    let documented: BTreeSet<&str> = rows.iter().flat_map(|row| named(row[0])).collect();
    assert_eq!(documented, commands);

    for row in &rows {
        for command in named(row[0]) {
            let known = flags(&help(&[command]));
            // What stands there of another command begins with its name.
            let told = quoted(row[1]).filter(|words| words.starts_with("--"));
            let told = told.flat_map(|words| words.split(' '));
            let told = told.filter_map(|word| word.strip_prefix("--"));
            let told: BTreeSet<String> = told.map(str::to_owned).collect();
            assert!(told.is_subset(&known), "{command}: {told:?}, {known:?}");
            for flag in &known {
                let there = section.contains(&format!("--{flag}"));
                assert!(there, "{command}: --{flag} is not there");
            }
        }
    }
    // The flags of `up` have a table.
    let table = rows
        .iter()
        .filter_map(|row| code(row[0])?.strip_prefix("--"));
    let table: BTreeSet<String> = table
        .map(|words| words.split(' ').next().unwrap().to_owned())
        .collect();
    assert_eq!(table, flags(&help(&["up"])));
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
