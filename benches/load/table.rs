//! Tables of results, and the place where they are kept.

use std::fmt::Write as _;

const RESULTS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/RESULTS.md");

/// A table of results.
#[derive(Debug)]
pub(crate) struct Table {
    pub(crate) title: &'static str,
    pub(crate) columns: &'static [&'static str],
    pub(crate) rows: Vec<Vec<String>>,
}

impl Table {
    pub(crate) fn text(&self) -> String {
        let mut text = format!("\n{}\n\n", self.title);
        let line = |text: &mut String, cells: &[String]| {
            writeln!(text, "| {} |", cells.join(" | ")).unwrap();
        };
        let head: Vec<String> = self.columns.iter().map(|&name| name.to_owned()).collect();
        line(&mut text, &head);
        line(&mut text, &vec!["---".to_owned(); head.len()]);
        for row in &self.rows {
            line(&mut text, row);
        }
        text
    }
}

/// Replaces the part of the results between the marks of this benchmark and name.
pub(crate) fn save(bench: &str, name: &str, text: &str) {
    let results = std::fs::read_to_string(RESULTS).unwrap();
    let (begin, end) = (
        format!("<!-- {bench} {name} -->"),
        format!("<!-- end of {bench} {name} -->"),
    );
    let (before, rest) = results
        .split_once(&begin)
        .unwrap_or_else(|| panic!("{RESULTS} has no mark {begin}"));
    let (_, after) = rest
        .split_once(&end)
        .unwrap_or_else(|| panic!("{RESULTS} has no mark {end}"));
    std::fs::write(RESULTS, format!("{before}{begin}\n{text}\n{end}{after}")).unwrap();
}
