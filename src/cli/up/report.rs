//! The report of `natter up` about what runs: a line of JSON for programs, a page for people.

use serde::Serialize;

/// Everything that runs. Its JSON is an interface: `natter up --json`.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Report {
    pub regions: Vec<RegionReport>,
    pub mongodb: Option<String>,
    pub mongod_pid: Option<u32>,
    /// A development token for every room, with the rights read, write, presence and history.
    pub token: String,
    /// Process id of `natter up` itself.
    pub pid: u32,
}

#[derive(Debug, Clone, Serialize)]
pub(super) struct RegionReport {
    pub name: String,
    pub nats: String,
    pub nats_pid: Option<u32>,
    /// The spine, which connects it to the others, if there are several regions.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub spine_pid: Option<u32>,
    pub edges: Vec<EdgeReport>,
    pub history: Vec<HealthReport>,
    /// The process that runs the workers, if there are some.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub workers: Vec<HealthReport>,
    /// The process that sends the events, if there are hooks.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub hooks: Vec<HealthReport>,
    /// The process that notifies users who are away, if push is configured.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub notifiers: Vec<HealthReport>,
}

#[derive(Debug, Clone, Serialize)]
pub(super) struct EdgeReport {
    pub id: String,
    pub http: String,
    pub ws: String,
    pub pid: Option<u32>,
}

#[derive(Debug, Clone, Serialize)]
pub(super) struct HealthReport {
    pub pid: Option<u32>,
    /// URL of `/healthz`, `/readyz` and `/metrics`.
    pub http: String,
}

impl Report {
    /// The text for a person who has just started it.
    pub(super) fn for_people(&self) -> String {
        let mut text = String::from("\nnatter is up.\n\n");
        let mut line = |what: &str, value: &str| {
            text.push_str(&format!("  {what:<10} {value}\n"));
        };
        for region in &self.regions {
            if self.regions.len() > 1 {
                line("region", &region.name);
            }
            for edge in &region.edges {
                line("page", &format!("{}/", edge.http));
                line("WebSocket", &edge.ws);
            }
            line("NATS", &region.nats);
            for history in &region.history {
                line("history", &format!("{}/metrics", history.http));
            }
            for workers in &region.workers {
                line("workers", &format!("{}/metrics", workers.http));
            }
            for hooks in &region.hooks {
                line("hooks", &format!("{}/metrics", hooks.http));
            }
            for notifier in &region.notifiers {
                line("notifier", &format!("{}/metrics", notifier.http));
            }
        }
        line("MongoDB", self.mongodb.as_deref().unwrap_or("not running"));
        text.push_str(
            "\nA development token, valid for 30 days, for every room, with the rights read, write, presence and history:\n\n  ",
        );
        text.push_str(&self.token);
        text.push_str("\n\n");
        if let Some(edge) = self.regions.iter().flat_map(|region| &region.edges).next() {
            text.push_str(&format!(
                "Try it: open {}/ in two tabs, or `natter tail chat:lobby` in another terminal.\n\
                 Or with the nats CLI: nats -s {} pub natter.pub.chat.lobby '{{\"text\":\"hi\"}}'\n",
                edge.http,
                self.regions
                    .first()
                    .map_or("", |region| region.nats.as_str())
            ));
        }
        if let [first, _, ..] = self.regions.as_slice() {
            text.push_str(&format!(
                "Cut a region off from the others with `natter dev cut {0}`, and `natter dev heal {0}`.\n",
                first.name
            ));
        }
        text.push_str("Ctrl-C stops all of it; what was said is kept.\n");
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_json_has_the_documented_shape() {
        let report = Report {
            regions: vec![RegionReport {
                name: "local".to_owned(),
                nats: "nats://127.0.0.1:4222".to_owned(),
                nats_pid: Some(2),
                spine_pid: None,
                edges: vec![EdgeReport {
                    id: "local-1".to_owned(),
                    http: "http://127.0.0.1:8080".to_owned(),
                    ws: "ws://127.0.0.1:8080/ws".to_owned(),
                    pid: Some(3),
                }],
                history: vec![HealthReport {
                    pid: Some(4),
                    http: "http://127.0.0.1:8090".to_owned(),
                }],
                workers: Vec::new(),
                hooks: Vec::new(),
                notifiers: Vec::new(),
            }],
            mongodb: None,
            mongod_pid: None,
            token: "t".to_owned(),
            pid: 1,
        };
        assert_eq!(
            serde_json::to_string(&report).unwrap(),
            r#"{"regions":[{"name":"local","nats":"nats://127.0.0.1:4222","nats_pid":2,"edges":[{"id":"local-1","http":"http://127.0.0.1:8080","ws":"ws://127.0.0.1:8080/ws","pid":3}],"history":[{"pid":4,"http":"http://127.0.0.1:8090"}]}],"mongodb":null,"mongod_pid":null,"token":"t","pid":1}"#
        );
        assert!(report.for_people().contains("http://127.0.0.1:8080/"));
    }
}
