//! The structure that `src/lib.rs` promises, read from the sources.

#![expect(
    clippy::string_slice,
    reason = "cut at what was found in the same text"
)]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

/// Crates that only some modules may name.
const ONLY: &[(&str, &[&str])] = &[
    // `mesh`: a tool's connection ends with its first failure, and requests of mirrors are repeated byte for byte.
    ("async_nats", &["bus", "mesh", "servers"]),
    ("jsonwebtoken", &["auth"]),
    // Web Push alone needs them in the open.
    ("p256", &["notifier"]),
    ("ring", &["notifier"]),
    ("mongodb", &["servers", "store"]),
    ("fastwebsockets", &["wire", "edge", "client"]),
    ("axum", &["edge", "history", "web"]),
    ("clap", &["cli"]),
    ("anyhow", &["cli"]),
];

/// Uses within one line of the table, each with its reason.
const SIDEWAYS: &[(&str, &str)] = &[
    // Its own section: what to export, and how.
    ("telemetry", "config"),
    // Values are what frames and subjects are made of; `model` itself uses nothing.
    ("protocol", "model"),
    ("subject", "model"),
];

/// A source file: its path below `src`, its module, its code without comments.
struct Source {
    path: String,
    module: String,
    code: String,
}

fn sources() -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut found = Vec::new();
    let mut folders = vec![root.clone()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let path: PathBuf = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let below = path.strip_prefix(&root).unwrap().to_str().unwrap();
                let module = below.split('/').next().unwrap().trim_end_matches(".rs");
                let text = fs::read_to_string(&path).unwrap();
                let code: Vec<&str> = text
                    .lines()
                    .map(|line| line.split_once("//").map_or(line, |(code, _)| code))
                    .collect();
                found.push(Source {
                    path: below.to_owned(),
                    module: module.to_owned(),
                    code: code.join("\n"),
                });
            }
        }
    }
    assert!(found.len() > 50, "the sources were not found");
    found
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// Whether `code` names the crate: in a path or a `use`.
fn names(code: &str, name: &str) -> bool {
    code.match_indices(name).any(|(at, _)| {
        let before = code[..at].chars().next_back();
        let after = &code[at + name.len()..];
        let in_path = after.starts_with("::");
        let in_use = code[..at].ends_with("use ") && !after.starts_with(is_word);
        before.is_none_or(|c| !is_word(c) && c != ':') && (in_path || in_use)
    })
}

/// First words of what comes after `crate::`, in a path or within the braces of a `use`.
fn modules_used(code: &str) -> BTreeSet<String> {
    let mut used = BTreeSet::new();
    for (at, _) in code.match_indices("crate::") {
        if code[..at].ends_with(is_word) {
            continue;
        }
        let after = &code[at + "crate::".len()..];
        let Some(group) = after.strip_prefix('{') else {
            used.insert(after.split(|c| !is_word(c)).next().unwrap().to_owned());
            continue;
        };
        let (mut depth, mut word, mut first) = (1, String::new(), true);
        for c in group.chars() {
            match c {
                '{' => depth += 1,
                '}' => depth -= 1,
                ',' if depth == 1 => first = true,
                c if depth == 1 && first && is_word(c) => {
                    word.push(c);
                    continue;
                }
                _ => {}
            }
            if !word.is_empty() {
                used.insert(std::mem::take(&mut word));
                first = false;
            }
            if depth == 0 {
                break;
            }
        }
    }
    used
}

/// The lines of the table at the top of `src/lib.rs`, and for each of its modules the number of its line.
fn layers() -> BTreeMap<String, usize> {
    let text = include_str!("../../src/lib.rs");
    let table = text.split("//! ```text\n").nth(1).unwrap();
    let table = table.split("//! ```").next().unwrap();
    let mut layers = BTreeMap::new();
    for (number, line) in table.lines().enumerate() {
        let cells = line.trim_start_matches("//!").split("  ").map(str::trim);
        for cell in cells.filter(|cell| !cell.is_empty() && cell.chars().all(is_word)) {
            layers.insert(cell.to_owned(), number);
        }
    }
    let modules = text.lines().filter_map(|line| line.strip_prefix("mod "));
    for module in modules.map(|module| module.trim_end_matches(';')) {
        assert!(
            layers.contains_key(module) || module == "checks",
            "{module} is not in the table of src/lib.rs"
        );
    }
    layers
}

#[test]
fn modules_use_only_what_is_below_them() {
    let layers = layers();
    let mut breaches = Vec::new();
    for source in sources() {
        let Some(own) = layers.get(&source.module) else {
            assert!(
                ["lib", "main", "testing"].contains(&source.module.as_str()),
                "{}",
                source.path
            );
            continue;
        };
        for used in modules_used(&source.code) {
            let Some(theirs) = layers.get(&used) else {
                continue;
            };
            let allowed = used == source.module
                || theirs > own
                || SIDEWAYS.contains(&(source.module.as_str(), used.as_str()));
            if !allowed {
                breaches.push(format!("{} uses {used}", source.path));
            }
        }
    }
    assert!(breaches.is_empty(), "{breaches:#?}");
}

/// Of a module that is public the compiler takes all for used.
#[test]
fn modules_are_private() {
    let text = include_str!("../../src/lib.rs");
    let public = text.lines().filter(|line| line.starts_with("pub "));
    let public: Vec<&str> = public.collect();
    assert_eq!(public, ["pub mod testing;", "pub use cli::main;"]);
}

#[test]
fn foreign_crates_stay_in_their_modules() {
    let mut breaches = Vec::new();
    for source in sources() {
        for (name, modules) in ONLY {
            if names(&source.code, name) && !modules.contains(&source.module.as_str()) {
                breaches.push(format!(
                    "{} names {name}, which is for {modules:?}",
                    source.path
                ));
            }
        }
    }
    assert!(breaches.is_empty(), "{breaches:#?}");
}

/// How a client protocol spells its words is known in `codec` alone: nobody else writes frames, or looks into them.
#[test]
fn only_codecs_write_frames() {
    let mut breaches = Vec::new();
    for source in sources() {
        let knows_words = ["room", "session", "presence", "read_marker", "history"];
        if !knows_words.contains(&source.module.as_str()) || source.path.ends_with("tests.rs") {
            continue;
        }
        let words: BTreeSet<&str> = source.code.split(|c| !is_word(c)).collect();
        for word in ["text_frame", "text_of", "FrameBuilder", "Writer"] {
            if words.contains(word) {
                breaches.push(format!("{} names {word}", source.path));
            }
        }
    }
    assert!(breaches.is_empty(), "{breaches:#?}");
}

/// No lock, no consumer and no watcher on the path of a message: sessions, rooms and sockets belong to one thread, and live
/// messages and replay need neither.
#[test]
fn the_path_of_a_message_has_no_lock_consumer_or_watcher() {
    let mut breaches = Vec::new();
    for source in sources() {
        let shard = ["codec", "room", "session", "wire"].contains(&source.module.as_str());
        // What accounts may do is only spelled there.
        let path = shard
            || ["bus", "edge", "mesh"].contains(&source.module.as_str())
                && source.path != "mesh/accounts.rs";
        let forbidden: &[&str] = match (shard, path) {
            (true, _) => &[
                "Mutex",
                "RwLock",
                "consumer::",
                "CONSUMER.",
                "jetstream::kv",
                ".watch_all(",
            ],
            (false, true) => &["consumer::", "CONSUMER.", "jetstream::kv", ".watch_all("],
            (false, false) => &[],
        };
        for word in forbidden.iter().filter(|word| source.code.contains(**word)) {
            breaches.push(format!("{} has {word}", source.path));
        }
    }
    assert!(breaches.is_empty(), "{breaches:#?}");
}

/// Consumers belong to the history service, to workers and to notifiers: nobody else takes messages from one.
#[test]
fn only_history_workers_and_hooks_have_consumers() {
    let mut users = BTreeSet::new();
    // What accounts may do is only spelled there.
    let apart = ["subject.rs", "bus/mod.rs", "mesh/accounts.rs"];
    for source in sources() {
        let words: BTreeSet<&str> = source.code.split(|c| !is_word(c)).collect();
        for word in ["Pull", "consumer_create", "consumer_next"] {
            if words.contains(word) && !apart.contains(&&*source.path) {
                users.insert(source.path.clone());
            }
        }
    }
    let users: Vec<&str> = users.iter().map(String::as_str).collect();
    assert_eq!(
        users,
        [
            "bus/pull.rs",
            "history/worker.rs",
            "hook/part.rs",
            "notifier/take.rs",
            "worker/take.rs"
        ]
    );
}

/// The reader of sources is itself read: a check that sees nothing passes for ever.
#[test]
fn uses_are_seen() {
    let code = "use crate::{\n    bus::{Record, x::Y},\n    model::Region, wire,\n};\nlet a = crate::auth::issue();\nmy_crate::no();";
    let used: Vec<String> = modules_used(code).into_iter().collect();
    assert_eq!(used, ["auth", "bus", "model", "wire"]);
    assert!(names("use axum;", "axum") && names("let x: axum::Router;", "axum"));
    assert!(!names(
        "use axum_extra::X; my_axum::x(); a::axum::b",
        "axum"
    ));
    assert!(layers()["cli"] < layers()["room"] && layers()["room"] < layers()["model"]);
}
