//! Who may send now: a bounded number of requests at once, of which no service and no user has all.
//!
//! A service whose answer has taken long, or did not come, shares a quarter of the turns with all others of that kind,
//! until it answers in time. So services that hang hold up each other, and hardly anybody else.

use std::{
    collections::HashMap,
    sync::{Arc, Weak},
    time::Duration,
};

use parking_lot::Mutex;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, timeout},
};

use crate::people::Device;

/// Requests for one user at once. Where they go is what the user has said.
const OF_A_USER: usize = 4;

/// A service that takes as long for an answer counts as slow.
const SLOW: Duration = Duration::from_secs(3);

/// How long it does, if nothing is heard of it.
const SLOW_FOR: Duration = Duration::from_secs(600);

/// Slow services that are known at once.
const MOST_SLOW: usize = 10_000;

/// Longest wait for a turn: of a slow service, and of others. The message does not keep its place for longer.
const WAIT: [Duration; 2] = [Duration::from_secs(2), Duration::from_secs(20)];

/// The turns of a process.
#[derive(Debug)]
pub(super) struct Turns {
    all: Arc<Semaphore>,
    /// Those of all slow services together.
    of_slow: Arc<Semaphore>,
    /// At most for one service that is not known to be slow.
    of_a_service: usize,
    known: Mutex<Known>,
}

#[derive(Debug, Default)]
struct Known {
    /// The turns of each service and user that somebody uses or waits for.
    by: HashMap<String, Weak<Semaphore>>,
    /// Size of `by` at which what nobody uses is forgotten.
    sweep_at: usize,
    /// Services that were slow, and when.
    slow: HashMap<String, Instant>,
}

/// Permission for one request.
#[derive(Debug)]
pub(super) struct Turn<'t> {
    turns: &'t Turns,
    service: String,
    /// When the request began, if it has.
    began: Option<Instant>,
    /// Whether it has ended, however.
    is_over: bool,
    _permits: [Option<OwnedSemaphorePermit>; 4],
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
            of_slow: Arc::new(Semaphore::new((at_once / 4).max(1))),
            of_a_service: (at_once - at_once / 4).max(1),
            known: Mutex::default(),
        }
    }

    fn of(&self, key: String, at_once: usize) -> Arc<Semaphore> {
        let mut known = self.known.lock();
        if let Some(its) = known.by.get(&key).and_then(Weak::upgrade) {
            return its;
        }
        if known.by.len() >= known.sweep_at {
            known.by.retain(|_, its| its.strong_count() > 0);
            known.sweep_at = 2 * known.by.len() + 16;
        }
        let made = Arc::new(Semaphore::new(at_once));
        known.by.insert(key, Arc::downgrade(&made));
        made
    }

    fn is_slow(&self, service: &str) -> bool {
        let known = self.known.lock();
        let since = known.slow.get(service);
        since.is_some_and(|since| since.elapsed() < SLOW_FOR)
    }

    /// Waits for a turn; `None`: there was none in time. The wider ones come last, so nobody holds a place of all while
    /// waiting for one of a service.
    pub(super) async fn turn(&self, user: &str, device: &Device) -> Option<Turn<'_>> {
        let service = service(device);
        let is_slow = self.is_slow(&service);
        let [slow, other] = WAIT;
        let permits = async {
            let of_user = self.of(format!("@{user}"), OF_A_USER).acquire_owned().await;
            let of_service = self.of(service.clone(), self.of_a_service);
            let of_service = of_service.acquire_owned().await;
            let of_slow = match is_slow {
                true => Arc::clone(&self.of_slow).acquire_owned().await.ok(),
                false => None,
            };
            let any = Arc::clone(&self.all).acquire_owned().await;
            // None of them is ever closed.
            [of_user.ok(), of_service.ok(), of_slow, any.ok()]
        };
        let permits = timeout(if is_slow { slow } else { other }, permits).await;
        Some(Turn {
            turns: self,
            service,
            began: None,
            is_over: false,
            _permits: permits.ok()?,
        })
    }
}

impl Turn<'_> {
    /// The request begins. What was done for it before says nothing of the service.
    pub(super) fn begin(&mut self) {
        self.began = Some(Instant::now());
    }

    /// The request has ended.
    pub(super) fn over(mut self) {
        self.is_over = true;
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let Some(began) = self.began else {
            return;
        };
        let mut known = self.turns.known.lock();
        if began.elapsed() < SLOW {
            if self.is_over {
                known.slow.remove(&self.service);
            }
            return;
        }
        if known.slow.len() >= MOST_SLOW {
            known.slow.retain(|_, since| since.elapsed() < SLOW_FOR);
        }
        if known.slow.len() < MOST_SLOW {
            known.slow.insert(self.service.clone(), Instant::now());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::people::Subscription;

    fn browser(host: &str) -> Device {
        Device::Webpush {
            subscription: Subscription::new(&format!("https://{host}/x"), "", ""),
        }
    }

    async fn is_free(turns: &Turns, user: &str, device: &Device) -> bool {
        turns.turn(user, device).await.is_some()
    }

    #[tokio::test(start_paused = true)]
    async fn a_service_that_does_not_answer_leaves_turns_for_the_others() {
        let turns = Turns::new(8);
        let mut open = Vec::new();
        for user in 0..6 {
            let (user, host) = (format!("u{user}"), browser("hangs.example"));
            open.push(turns.turn(&user, &host).await.unwrap());
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
    async fn services_that_hang_share_a_quarter_until_they_answer() {
        let turns = Turns::new(8);
        let hosts = ["a.example", "b.example", "c.example"].map(browser);
        for host in &hosts {
            let mut turn = turns.turn("kim", host).await.unwrap();
            turn.begin();
            tokio::time::sleep(SLOW).await;
            drop(turn);
        }
        let mut one = turns.turn("u1", &hosts[0]).await.unwrap();
        one.begin();
        let two = turns.turn("u2", &hosts[1]).await.unwrap();
        assert!(!is_free(&turns, "u3", &hosts[2]).await, "two of eight");
        assert!(is_free(&turns, "u3", &browser("works.example")).await);
        one.over();
        let mut open = Vec::new();
        for user in 0..3 {
            // It has answered in time.
            let user = format!("v{user}");
            open.push(turns.turn(&user, &hosts[0]).await.unwrap());
        }
        drop(two);
    }

    #[tokio::test(start_paused = true)]
    async fn a_user_with_many_services_takes_few_turns() {
        let turns = Turns::new(64);
        let mut open = Vec::new();
        for n in 0..OF_A_USER {
            let host = browser(&format!("h{n}.example"));
            let turn = turns.turn("mallory", &host).await;
            open.push(turn.unwrap());
        }
        assert!(!is_free(&turns, "mallory", &browser("other.example")).await);
        assert!(is_free(&turns, "kim", &browser("other.example")).await);
    }

    #[tokio::test(start_paused = true)]
    async fn what_nobody_uses_is_forgotten() {
        let turns = Turns::new(4);
        for n in 0..1000 {
            let host = browser(&format!("h{n}.example"));
            drop(turns.turn(&format!("u{n}"), &host).await);
        }
        let known = turns.known.lock();
        assert!(known.by.len() <= 32, "{}", known.by.len());
    }
}
