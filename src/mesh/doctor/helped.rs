//! Whether stalled mirrors can be restarted after a cut: with which user, and at which servers.

use std::{collections::BTreeSet, error::Error};

use futures_util::future::join_all;

use super::{Check, Finding, Level, permissions};
use crate::{config::Config, mesh::mirrors::nudge, model::Region};

/// Tries it at each server of `mirrors.leafnodes`. This makes the servers check their mirrors and changes nothing else.
/// Without `mirrors.leafnodes` there is nothing to check.
pub(super) async fn examine(config: &Config, regions: &BTreeSet<Region>) -> Vec<Finding> {
    if config.mirrors.leafnodes.is_empty() {
        return Vec::new();
    }
    let problem = |check, error: &dyn Error, advice| {
        let cause = error.source().map(|cause| format!(": {cause}"));
        let cause = cause.unwrap_or_default();
        let what = format!("mirrors can't be restarted after a cut: {error}{cause}");
        Finding::new(Level::Problem, check, what, advice)
    };
    let mut findings = match permissions::examine_mirrors(config, regions).await {
        Ok(findings) => findings,
        Err(error) => vec![problem(
            Check::Permission,
            &error,
            "see nats.url, mirrors.user and mirrors.password",
        )],
    };
    let nats = config.nats_of_mirrors();
    let nudges = config.mirrors.leafnodes();
    let nudges = join_all(nudges.map(|address| nudge(address, &nats))).await;
    findings.extend(nudges.into_iter().filter_map(Result::err).map(|error| {
        problem(
            Check::Mirror,
            &error,
            "see mirrors.leafnodes, mirrors.user and mirrors.password; whether the servers listen for leaf nodes there, with a certificate that this machine trusts; and whether the user may connect as one (allowed_connection_types)",
        )
    }));
    findings
}
