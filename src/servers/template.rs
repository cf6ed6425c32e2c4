//! Makes configuration files of nats-server from those in `nats/`, which are valid by themselves.

use serde_json::Value;

/// A replacement for a part of the file.
pub(crate) enum Part {
    /// For the line marked with `# @name`.
    Line(String),
    /// For the lines between a line that is only `# @name` and the next `# @end`.
    Block(Vec<String>),
}

/// Replaces the parts for whose names `part` returns something; all other lines stay as they are.
pub(crate) fn render(template: &str, part: impl Fn(&str) -> Option<Part>) -> String {
    let mut text = String::with_capacity(template.len());
    let mut replaced = false;
    for line in template.lines() {
        let indent: String = line.chars().take_while(|c| *c == ' ').collect();
        match line.rsplit_once("# @").map(|(_, name)| name) {
            Some("end") => replaced = false,
            _ if replaced => continue,
            Some(name) => match part(name) {
                Some(Part::Line(line)) => {
                    text.push_str(&format!("{indent}{line} # @{name}\n"));
                    continue;
                }
                Some(Part::Block(lines)) => {
                    replaced = true;
                    text.push_str(line);
                    text.push('\n');
                    for line in lines {
                        text.push_str(&format!("{indent}{line}\n"));
                    }
                    continue;
                }
                None => {}
            },
            None => {}
        }
        text.push_str(line);
        text.push('\n');
    }
    text
}

/// A string of a NATS configuration: double quotes, with the escapes of JSON.
pub(crate) fn quoted(text: &str) -> String {
    Value::from(text).to_string()
}
