//! Who may send now: a bounded number of requests at once, of which no service and no user has all.

use std::{
    collections::HashMap,
    sync::{Arc, Weak},
};

use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::people::Device;

/// Requests for one user at once. Where they go is what the user has said.
const OF_A_USER: usize = 4;

/// The turns of a process.
#[derive(Debug)]
pub(super) struct Turns {
    all: Arc<Semaphore>,
    /// At most for one service: a quarter is left for the others, if it does not answer.
    of_a_service: usize,
    /// Those of each service and user that somebody uses or waits for.
    by: Mutex<HashMap<String, Weak<Semaphore>>>,
}

/// Permission for one request.
#[derive(Debug)]
pub(super) struct Turn {
    _permits: [Option<OwnedSemaphorePermit>; 3],
}

/// What a device is reached by: the host of a browser's push service, or one of the services of the configuration.
fn service(device: &Device) -> String {
    match device {
        Device::Webpush { subscription } => {
            let url: Option<hyper::Uri> = subscription.endpoint.parse().ok();
            let host = url.as_ref().and_then(|url| url.authority());
            host.map(|host| format!("//{host}")).unwrap_or_default()
        }
        device => device.kind().to_owned(),
    }
}

impl Turns {
    pub(super) fn new(at_once: usize) -> Self {
        Self {
            all: Arc::new(Semaphore::new(at_once)),
            of_a_service: (at_once - at_once / 4).max(1),
            by: Mutex::default(),
        }
    }

    fn of(&self, key: String, at_once: usize) -> Arc<Semaphore> {
        let mut by = self.by.lock();
        if let Some(known) = by.get(&key).and_then(Weak::upgrade) {
            return known;
        }
        // Not often: as many are in it as requests are open or waiting.
        by.retain(|_, its| its.strong_count() > 0);
        let made = Arc::new(Semaphore::new(at_once));
        by.insert(key, Arc::downgrade(&made));
        made
    }

    /// Waits for a turn. The wider ones come last, so nobody holds a place of all while waiting for one of a service.
    pub(super) async fn turn(&self, user: &str, device: &Device) -> Turn {
        let of_user = self.of(format!("@{user}"), OF_A_USER).acquire_owned().await;
        let of_service = self.of(service(device), self.of_a_service);
        let of_service = of_service.acquire_owned().await;
        let any = Arc::clone(&self.all).acquire_owned().await;
        Turn {
            // None of them is ever closed.
            _permits: [of_user.ok(), of_service.ok(), any.ok()],
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;
    use crate::people::Subscription;

    fn browser(host: &str) -> Device {
        Device::Webpush {
            subscription: Subscription::new(&format!("https://{host}/x"), "", ""),
        }
    }

    async fn is_free(turns: &Turns, user: &str, device: &Device) -> bool {
        let wait = timeout(Duration::from_secs(1), turns.turn(user, device));
        wait.await.is_ok()
    }

    #[tokio::test(start_paused = true)]
    async fn a_service_that_does_not_answer_leaves_turns_for_the_others() {
        let turns = Turns::new(8);
        let mut open = Vec::new();
        for user in 0..6 {
            open.push(
                turns
                    .turn(&format!("u{user}"), &browser("hangs.example"))
                    .await,
            );
        }
        assert!(!is_free(&turns, "kim", &browser("hangs.example")).await);
        assert!(is_free(&turns, "kim", &browser("works.example")).await);
        let fcm = Device::Fcm {
            token: "x".to_owned(),
        };
        assert!(is_free(&turns, "kim", &fcm).await);
        open.pop();
        assert!(is_free(&turns, "kim", &browser("hangs.example")).await);
    }

    #[tokio::test(start_paused = true)]
    async fn a_user_with_many_services_takes_few_turns() {
        let turns = Turns::new(64);
        let mut open = Vec::new();
        for n in 0..OF_A_USER {
            open.push(
                turns
                    .turn("mallory", &browser(&format!("h{n}.example")))
                    .await,
            );
        }
        assert!(!is_free(&turns, "mallory", &browser("other.example")).await);
        assert!(is_free(&turns, "kim", &browser("other.example")).await);
    }

    #[tokio::test(start_paused = true)]
    async fn what_nobody_uses_is_forgotten() {
        let turns = Turns::new(4);
        for n in 0..1000 {
            drop(
                turns
                    .turn(&format!("u{n}"), &browser(&format!("h{n}.example")))
                    .await,
            );
        }
        assert!(turns.by.lock().len() <= 4, "{}", turns.by.lock().len());
    }
}
