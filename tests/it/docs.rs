//! The documents say what is so: their tables are compared with the code, their links with the files, and the names of
//! functions in `docs/architecture` with the sources.

#![expect(
    clippy::string_slice,
    reason = "cut at what was found in the same text"
)]

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
};

use natter::testing::{
    auth::{Claims, MAX_TOKEN, Right},
    config::DEFAULT_TOML,
    model::{MAX_REGIONS, MAX_USER},
    protocol::{Close, ErrorCode, HistoryOf, PageOf},
    telemetry::metrics::{Counter, Gauge, Histogram, Label as _, Op},
};

const README: &str = include_str!("../../README.md");
const PROTOCOL: &str = include_str!("../../docs/protocol.md");
const ERRORS: &str = include_str!("../../docs/errors.md");
const TOKENS: &str = include_str!("../../docs/tokens.md");
const HTTP: &str = include_str!("../../docs/http.md");
const LIMITS: &str = include_str!("../../docs/limits.md");
const TELEMETRY: &str = include_str!("../../docs/telemetry.md");
const COMMANDS: &str = include_str!("../../docs/commands.md");

/// Most bytes of the README: it is read in one sitting, and the rest is in `docs/`.
const README_BYTES: usize = 12_000;

/// Between these lines of `docs/configuration.md` stands what is made from the defaults.
const BEGIN: &str = "<!-- made from config/default.toml: begin -->\n";
const END: &str = "<!-- made from config/default.toml: end -->\n";

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The lines of a page that are not in a fenced block.
fn prose(page: &str) -> impl Iterator<Item = &str> {
    let mut fenced = false;
    page.split_inclusive('\n').filter(move |line| {
        let fence = line.starts_with("```");
        fenced ^= fence;
        !fenced && !fence
    })
}

/// The part of a page from a heading to the next one of the same or a higher level.
fn section<'p>(page: &'p str, heading: &str) -> &'p str {
    let level = heading.split(' ').next().unwrap().len();
    let start = page
        .find(&format!("\n{heading}\n"))
        .unwrap_or_else(|| panic!("the page has no {heading:?}"));
    let body = &page[start + heading.len() + 2..];
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

/// The anchors of a page, as GitHub makes them from its headings: a repeated one has a number.
fn anchors(page: &str) -> Vec<String> {
    let mut anchors: Vec<String> = Vec::new();
    for line in prose(page).filter(|line| line.starts_with('#')) {
        let heading = line.trim_start_matches('#').trim().to_lowercase();
        let kept = heading
            .chars()
            .filter(|c| c.is_alphanumeric() || [' ', '-', '_'].contains(c));
        let anchor = kept.collect::<String>().replace(' ', "-");
        let before = anchors.iter().filter(|other| **other == anchor).count();
        anchors.push(match before {
            0 => anchor,
            n => format!("{anchor}-{n}"),
        });
    }
    anchors
}

/// All files below a folder whose names end in `extension`, but for what is built or fetched.
fn files(folder: &Path, extension: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap();
            if path.is_dir() && !name.starts_with('.') && !matches!(name, "target" | "node_modules")
            {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == extension) {
                found.push(path);
            }
        }
    }
    found.sort();
    found
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

/// The tables of keys: a heading a section of `config/default.toml`, and the comment above a key as its description.
fn tables_of_keys() -> String {
    let mut text = "\n### The top level\n".to_owned();
    let head = "\n| key | default | meaning |\n|---|---|---|\n";
    let mut prefix = String::new();
    let mut comment: Vec<&str> = Vec::new();
    text.push_str(head);
    for line in DEFAULT_TOML.lines() {
        if let Some(words) = line.strip_prefix('#') {
            comment.push(words.trim());
            continue;
        }
        let meaning = comment.join(" ");
        let name = line.strip_prefix('[').and_then(|l| l.strip_suffix(']'));
        if let Some(name) = name {
            prefix = format!("{name}.");
            write!(text, "\n### `[{name}]`\n\n{meaning}\n{head}").unwrap();
        } else if let Some((key, value)) = line.split_once(" = ") {
            let key = format!("{prefix}{key}");
            assert!(!meaning.is_empty(), "no comment stands above {key}");
            assert!(!meaning.contains('|'), "{key}: it would end the cell");
            writeln!(text, "| `{key}` | `{value}` | {meaning} |").unwrap();
        }
        comment.clear();
    }
    text.push('\n');
    text
}

/// `docs/configuration.md` as it is, and as it should be; with `NATTER_TEST_WRITE_DOCS=1` it is written so.
fn configuration() -> (String, String) {
    let path = root().join("docs/configuration.md");
    let page = fs::read_to_string(&path).unwrap();
    let (before, rest) = page.split_once(BEGIN).unwrap();
    let (_, after) = rest.split_once(END).unwrap();
    let made = format!("{before}{BEGIN}{}{END}{after}", tables_of_keys());
    if std::env::var_os("NATTER_TEST_WRITE_DOCS").is_some() {
        fs::write(&path, &made).unwrap();
        return (made.clone(), made);
    }
    (page, made)
}

#[test]
fn the_tables_of_keys_are_made_from_the_defaults() {
    let (page, made) = configuration();
    assert!(
        page == made,
        "docs/configuration.md is out of date: NATTER_TEST_WRITE_DOCS=1 cargo test --test it docs:: writes it"
    );
}

#[test]
fn every_key_of_the_configuration_is_in_the_table_with_its_default() {
    let mut keys = BTreeMap::new();
    flatten("", &DEFAULT_TOML.parse().unwrap(), &mut keys);
    let (page, _) = configuration();
    let documented: BTreeMap<String, String> = rows(section(&page, "## Keys"))
        .iter()
        .filter_map(|row| Some((code(row[0])?.to_owned(), code(row[1])?.to_owned())))
        .collect();
    assert_eq!(documented, keys);
}

#[test]
fn every_error_code_is_in_the_table() {
    let rows = rows(section(ERRORS, "## Error codes"));
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
    let rows = rows(section(ERRORS, "## Close codes"));
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

/// A message can link to `docs/errors.md#<code>`.
#[test]
fn every_code_has_a_heading_of_its_own() {
    let anchors = anchors(ERRORS);
    let words = ErrorCode::ALL.iter().map(|code| code.as_str());
    for word in words.chain(Close::ALL.iter().map(|close| close.reason())) {
        let there = anchors.iter().filter(|anchor| *anchor == word).count();
        assert_eq!(there, 1, "headings {word}");
    }
}

#[test]
fn every_metric_is_in_the_table() {
    let section = section(TELEMETRY, "## Metrics");
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
    let rows = rows(section(TELEMETRY, "## Metrics"));
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
    let rows = rows(section(PROTOCOL, "## Commands of a client"));
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
    routes.extend(["GET /", "GET /app", "GET /operate"].map(str::to_owned));
    let rows = rows(section(HTTP, "## Routes"));
    let documented: BTreeSet<String> = rows
        .iter()
        .filter_map(|row| Some(code(row[0])?.to_owned()))
        .collect();
    assert_eq!(documented, routes);
}

#[test]
fn every_claim_and_right_of_a_token_is_there() {
    let mut claims = Claims::new("kim", 1);
    claims.iss = Some("i".to_owned());
    claims.aud = vec!["a".to_owned()];
    (claims.nbf, claims.iat) = (Some(1), Some(1));
    claims.jti = Some("t".to_owned());
    claims.info = Some(serde_json::Map::new());
    let claims = serde_json::to_value(claims).unwrap();
    let rows = rows(TOKENS);
    for claim in claims.as_object().unwrap().keys() {
        let row = rows
            .iter()
            .find(|row| quoted(row[0]).any(|name| name == claim));
        let row = row.unwrap_or_else(|| panic!("{claim}"));
        assert!(!row[1].contains("not used"), "{claim}: {}", row[1]);
    }
    for right in Right::ALL {
        assert!(
            TOKENS.contains(&format!("`{}` = ", right.as_str())),
            "{right}"
        );
    }
}

#[test]
fn limits_are_those_of_the_code() {
    let rows = rows(LIMITS);
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
    let rows = rows(COMMANDS);
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
                let there = COMMANDS.contains(&format!("--{flag}"));
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

/// Files that are linked exist, in all documents, and so do the headings in them.
#[test]
fn links_lead_somewhere() {
    let pages = files(root(), "md");
    assert!(pages.len() > 30, "the documents were not found");
    let mut links = 0;
    for page in &pages {
        let text = fs::read_to_string(page).unwrap();
        let targets = text.split("](").skip(1);
        for target in targets.filter_map(|rest| rest.split(')').next()) {
            if target.contains("://") {
                continue;
            }
            links += 1;
            let (file, anchor) = target.split_once('#').unwrap_or((target, ""));
            let file = match file {
                "" => page.clone(),
                file => page.parent().unwrap().join(file),
            };
            assert!(file.exists(), "{}: {target}", page.display());
            if !anchor.is_empty() {
                let anchors = anchors(&fs::read_to_string(&file).unwrap());
                let there = anchors.iter().any(|other| other == anchor);
                assert!(there, "{}: {target}: {anchors:?}", page.display());
            }
        }
    }
    assert!(links > 100, "the links were not found");
}

#[test]
fn the_readme_is_short() {
    let bytes = README.len();
    assert!(
        bytes <= README_BYTES,
        "{bytes} bytes: the rest is for docs/"
    );
}

/// Each folder of `docs/` has a page that names all others in it.
#[test]
fn every_page_is_in_the_contents() {
    for folder in ["docs", "docs/architecture", "docs/decisions"] {
        let contents = fs::read_to_string(root().join(folder).join("README.md")).unwrap();
        let mut pages = 0;
        for entry in fs::read_dir(root().join(folder)).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            if name.ends_with(".md") && name != "README.md" {
                assert!(contents.contains(&format!("({name})")), "{folder}/{name}");
                pages += 1;
            }
        }
        assert!(pages > 5, "{folder}");
    }
}

/// Whether `text` defines an item of that name.
fn defines(text: &str, name: &str) -> bool {
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    text.match_indices(name).any(|(at, _)| {
        let kind = text[..at].strip_suffix(' ');
        let kind = kind.and_then(|before| before.rsplit(|c| !is_word(c)).next());
        let kinds = [
            "fn", "struct", "enum", "trait", "type", "const", "static", "mod",
        ];
        kind.is_some_and(|kind| kinds.contains(&kind))
            && !text[at + name.len()..].starts_with(is_word)
    })
}

/// `module::Type::function` in a page is a function that is defined below that module, and a type that is defined somewhere.
#[test]
fn names_in_the_architecture_are_those_of_the_sources() {
    let src = root().join("src");
    let sources: Vec<(Vec<String>, String)> = files(&src, "rs")
        .iter()
        .map(|file| {
            let below = file.strip_prefix(&src).unwrap().with_extension("");
            let parts = below.iter().map(|part| part.to_str().unwrap().to_owned());
            let module = parts.filter(|part| part != "mod").collect();
            (module, fs::read_to_string(file).unwrap())
        })
        .collect();
    let mut names = 0;
    for page in files(&root().join("docs/architecture"), "md") {
        let text = fs::read_to_string(&page).unwrap();
        let text: String = prose(&text).collect();
        let is_path = |name: &&str| {
            let mut parts = name.split("::");
            let is_word = |part: &str| {
                !part.is_empty() && part.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
            };
            name.contains("::") && parts.all(is_word)
        };
        for name in quoted(&text).filter(is_path) {
            names += 1;
            let parts: Vec<&str> = name.split("::").collect();
            let (last, path) = parts.split_last().unwrap();
            let is_type = |part: &&&str| part.starts_with(|c: char| c.is_uppercase());
            let modules: Vec<&str> = path
                .iter()
                .take_while(|part| !is_type(part))
                .copied()
                .collect();
            let below = |prefix: &[&str]| {
                let prefix: Vec<String> = prefix.iter().map(|&part| part.to_owned()).collect();
                let all = sources.iter();
                all.filter(move |(module, _)| module.starts_with(&prefix))
            };
            let types = &path[modules.len()..];
            let known = types
                .iter()
                .all(|part| sources.iter().any(|(_, text)| defines(text, part)));
            let is_item = below(&modules).any(|(_, text)| defines(text, last));
            let is_module = below(&parts).next().is_some();
            let place = page.display();
            assert!(
                known && (is_item || is_module),
                "{place}: `{name}` is not in src"
            );
        }
    }
    assert!(names > 100, "the names were not found");
}

#[test]
fn the_example_configurations_are_valid() {
    let folder = root().join("config");
    let mut examples = 0;
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let text = fs::read_to_string(&path).unwrap();
        // Panics with the file's faults.
        crate::support::config(&text);
        examples += 1;
    }
    assert!(examples >= 2, "default.toml and at least one example");
}
