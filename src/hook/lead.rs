//! One hook in this process: it waits until the process has the lease, and then its partitions are taken.

use std::{sync::Arc, time::Duration};

use tokio::{sync::oneshot, time::sleep};
use tokio_util::sync::CancellationToken;

use super::{
    Hook, Parts,
    gate::Gate,
    part,
    source::Source,
    state::{self, Lease},
};
use crate::{
    outbound::pause, subject::hook_lease_key, taking::STREAM_PAUSES, taking::set_gauge,
    telemetry::metrics::Gauge,
};

/// Interval of the looks whether a disabled hook was enabled.
const LOOK: Duration = Duration::from_secs(1);

/// A hook whose events this process sends.
#[derive(Debug)]
pub(super) struct Leading {
    pub parts: Parts,
    pub hook: Arc<Hook>,
    pub gate: Gate,
    /// Nothing more may be sent.
    pub over: CancellationToken,
}

/// Runs a hook until the process shuts down. Tells `opened` when its consumers are there.
pub(super) async fn run(
    parts: Parts,
    hook: Arc<Hook>,
    instance: String,
    opened: oneshot::Sender<()>,
) {
    let lease = Lease::new(&parts.bucket, hook_lease_key(hook.name()), &instance);
    let tasks = parts.tasks.clone();
    tokio::select! {
        () = make_consumers(&parts, &hook) => {}
        () = tasks.stopping() => return,
    }
    // Nobody waits any more when the process is about to end.
    let _unheard = opened.send(());
    loop {
        let begun = async {
            loop {
                wait_until_enabled(&parts, &hook).await;
                let held = lease.acquire().await;
                // The one who held it before may have disabled the hook.
                match state::off(&parts.bucket, hook.name()).await {
                    Ok(None) => break held,
                    Ok(Some(_)) | Err(_) => lease.release().await,
                }
            }
        };
        let held = tokio::select! {
            held = begun => held,
            () = tasks.stopping() => return,
        };
        let leading = Arc::new(Leading {
            gate: Gate::new(hook.config.concurrency),
            over: CancellationToken::new(),
            parts: parts.clone(),
            hook: Arc::clone(&hook),
        });
        let all = Source::all(&parts).into_iter();
        let all = all.map(|source| part::take(&leading, source));
        let all = futures_util::future::join_all(all);
        tracing::info!(hook = hook.name(), "this process sends the events");
        let ended = {
            // They end by themselves soon after it is over, and give back what is in hand.
            let mut all = std::pin::pin!(all);
            tokio::select! {
                ended = &mut all => ended,
                () = lease.keep(held) => {
                    tracing::warn!(hook = hook.name(), "the lease is lost: another process sends the events");
                    leading.over.cancel();
                    all.await
                }
            }
        };
        if let Some(reason) = ended.into_iter().flatten().next() {
            disable(&parts, &hook, &reason).await;
        }
        lease.release().await;
    }
}

/// Creates the consumers, so that nothing is missed that is stored from now on.
async fn make_consumers(parts: &Parts, hook: &Hook) {
    for source in Source::all(parts) {
        let mut failures = 0;
        while let Err(error) = part::make_consumer(parts, hook, source).await {
            if failures == 0 {
                tracing::warn!(hook = hook.name(), %error, "a hook has no consumer yet");
            }
            failures += 1;
            sleep(pause(failures, STREAM_PAUSES, None)).await;
        }
    }
}

async fn wait_until_enabled(parts: &Parts, hook: &Hook) {
    let mut told = false;
    loop {
        match state::off(&parts.bucket, hook.name()).await {
            Ok(None) => break,
            Ok(Some(off)) if !told => {
                let reason = off.reason;
                tracing::error!(
                    hook = hook.name(),
                    reason,
                    "the hook is disabled: natter hooks enable"
                );
                told = true;
            }
            Ok(Some(_)) => {}
            Err(error) => {
                tracing::debug!(hook = hook.name(), %error, "whether it is disabled is not known")
            }
        }
        show(hook, told);
        sleep(LOOK).await;
    }
    show(hook, false);
}

fn show(hook: &Hook, is_off: bool) {
    if let Some(label) = hook.label {
        set_gauge(Gauge::HookDisabled(label), u64::from(is_off));
    }
}

/// Writes down that the receiver is gone for good.
async fn disable(parts: &Parts, hook: &Hook, reason: &str) {
    show(hook, true);
    let mut failures = 0;
    loop {
        match state::disable(&parts.bucket, hook.name(), reason).await {
            Ok(()) => return,
            Err(error) => tracing::warn!(hook = hook.name(), %error, "a hook can't be disabled"),
        }
        failures += 1;
        tokio::select! {
            () = sleep(pause(failures, STREAM_PAUSES, None)) => {}
            // The receiver says it again.
            () = parts.tasks.stopping() => return,
        }
    }
}
