//! Configuration files of nats-server made from those in `nats/`, which are valid as they stand.

use serde_json::Value;

/// What takes the place of what the file says.
pub(crate) enum Part {
    /// Of the line marked with `# @name`.
    Line(String),
    /// Of the lines between one that is nothing but `# @name` and the next `# @end`.
    Block(Vec<String>),
}

/// Replaces what `part` knows the name of; all else stays as it is.
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
