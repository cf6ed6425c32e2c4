//! Tokens and users that are refused although the signature is right.
//!
//! Rules come from the control buckets of all regions, in any order and repeatedly. Learning them is commutative:
//! revocations only grow, and of two rules about a block the later one counts. A rule contains its own end, since a
//! mirror may lose it without notice.

use std::{
    collections::HashMap,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use parking_lot::RwLock;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use super::Identity;

/// How much longer a revocation holds than the tokens it names, besides the leeway. The clock with which it was made
/// may be behind those of the edges, and behind that of the issuer, which determined the end of the tokens.
const CLOCKS: Duration = Duration::from_mins(5);

/// Who or what a rule is about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Whose {
    /// Tokens of a user.
    User(String),
    /// The token with this `jti`.
    Token(String),
    /// A user, whatever the token.
    Blocked(String),
}

/// Tokens that are no longer valid.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Revocation {
    /// For a user: tokens issued (`iat`) at this time or before, in unix seconds, and those without `iat`.
    pub before: u64,
    /// No such token expires (`exp`) later than this, in unix seconds. [`u64::MAX`]: not known, so the revocation has
    /// no end.
    pub until: u64,
}

impl Revocation {
    /// A revocation made at `now_s` (unix seconds) of tokens that are valid for at most `time`. `leeway`: how far the
    /// clock of their issuer may be ahead. Tokens with an `iat` up to that much later may already exist.
    #[must_use]
    pub fn new(now_s: u64, time: Duration, leeway: Duration) -> Self {
        Self {
            before: now_s.saturating_add(leeway.as_secs()),
            until: now_s
                .saturating_add(time.as_secs())
                .saturating_add(u64::from(time.subsec_nanos() > 0)),
        }
    }

    /// When it ends, in unix seconds: an edge with this leeway accepts none of these tokens after that. `None`: never.
    #[must_use]
    pub fn ends(&self, leeway: Duration) -> Option<u64> {
        self.until
            .checked_add(leeway.saturating_add(CLOCKS).as_secs())
    }

    /// Combines both: the later and the longer one hold.
    #[must_use]
    pub fn merge(self, other: Self) -> Self {
        Self {
            before: self.before.max(other.before),
            until: self.until.max(other.until),
        }
    }
}

/// Whether a user is blocked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Block {
    /// Whether the user is blocked.
    pub blocked: bool,
    /// When this was decided, in ms since 1970: the latest decision counts.
    pub at: u64,
}

impl Block {
    /// The same decision, such that it counts after `known`, even if the clock of that was ahead.
    #[must_use]
    pub fn after(self, known: Self) -> Self {
        Self {
            at: self.at.max(known.at.saturating_add(1)),
            ..self
        }
    }
}

/// The revocations that an edge knows. One instance for all shards.
#[derive(Debug, Default)]
pub struct Revocations {
    /// [`crate::config::Auth::leeway`].
    leeway: Duration,
    rules: RwLock<Rules>,
    /// Whether there is any rule. Without one, nothing is looked up.
    any: AtomicBool,
    changed: watch::Sender<()>,
}

#[derive(Debug, Default)]
struct Rules {
    users: HashMap<String, Revocation>,
    tokens: HashMap<String, Revocation>,
    blocks: HashMap<String, Block>,
}

impl Revocations {
    /// No revocations yet. Tokens are accepted for `leeway` after their end, so rules are kept for longer than the
    /// tokens.
    #[must_use]
    pub fn new(leeway: Duration) -> Self {
        Self {
            leeway,
            ..Self::default()
        }
    }

    /// Learns a rule from its value in a bucket.
    ///
    /// # Errors
    /// The value is not a rule; nothing changes.
    pub fn learn(&self, whose: Whose, value: &[u8]) -> Result<(), serde_json::Error> {
        let mut rules = self.rules.write();
        let news = match whose {
            Whose::User(user) => revoke(&mut rules.users, user, serde_json::from_slice(value)?),
            Whose::Token(jti) => revoke(&mut rules.tokens, jti, serde_json::from_slice(value)?),
            Whose::Blocked(user) => {
                let block: Block = serde_json::from_slice(value)?;
                let rank = |block: &Block| (block.at, block.blocked);
                let known = rules.blocks.get(&user);
                let news = known.is_none_or(|known| rank(known) < rank(&block));
                if news {
                    rules.blocks.insert(user, block);
                }
                news
            }
        };
        drop(rules);
        if news {
            self.any.store(true, Ordering::Release);
            self.changed.send_replace(());
        }
        Ok(())
    }

    /// Whether a token is revoked or its user blocked. `now_s`: unix seconds.
    #[must_use]
    pub fn refuse(&self, identity: &Identity, now_s: u64) -> bool {
        if !self.any.load(Ordering::Acquire) {
            return false;
        }
        let rules = self.rules.read();
        let user = &*identity.user;
        let of_token = identity
            .jti
            .as_deref()
            .and_then(|jti| rules.tokens.get(jti));
        let revoked = |rule: &Revocation| self.holds(rule, now_s);
        let too_old = |rule: &Revocation| identity.iat.is_none_or(|iat| iat <= rule.before);
        rules.blocks.get(user).is_some_and(|block| block.blocked)
            || of_token.is_some_and(revoked)
            || rules
                .users
                .get(user)
                .is_some_and(|rule| revoked(rule) && too_old(rule))
    }

    /// Forgets rules that have ended.
    pub fn forget(&self, now_s: u64) {
        if self.any.load(Ordering::Acquire) {
            let mut rules = self.rules.write();
            rules.users.retain(|_, rule| self.holds(rule, now_s));
            rules.tokens.retain(|_, rule| self.holds(rule, now_s));
        }
    }

    fn holds(&self, rule: &Revocation, now_s: u64) -> bool {
        rule.ends(self.leeway).is_none_or(|end| now_s < end)
    }

    /// Notifies of each new rule.
    #[must_use]
    pub fn changes(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }
}

fn revoke(rules: &mut HashMap<String, Revocation>, key: String, rule: Revocation) -> bool {
    let Some(known) = rules.get_mut(&key) else {
        rules.insert(key, rule);
        return true;
    };
    let merged = known.merge(rule);
    let news = merged != *known;
    *known = merged;
    news
}

#[cfg(test)]
mod tests {
    use super::{super::Claims, *};

    fn identity(user: &str, iat: Option<u64>, jti: Option<&str>) -> Identity {
        let mut claims = Claims::new(user, 9999);
        claims.iat = iat;
        claims.jti = jti.map(str::to_owned);
        Identity::from_claims(&claims).unwrap()
    }

    #[test]
    fn tokens_of_before_are_refused_until_the_revocation_ends() {
        /// The leeway, and the difference of clocks.
        const END: u64 = 900 + 30 + 300;
        let revocations = Revocations::new(Duration::from_secs(30));
        let kim = || Whose::User("kim".to_owned());
        revocations
            .learn(kim(), br#"{"before":100,"until":500}"#)
            .unwrap();
        // In any order: the later and the longer one hold.
        revocations
            .learn(kim(), br#"{"before":50,"until":900}"#)
            .unwrap();
        for (iat, now, refused) in [
            (Some(100), 200, true),
            (Some(101), 200, false),
            (None, 200, true),
            (Some(60), END - 1, true),
            (Some(60), END, false),
        ] {
            let kim = identity("kim", iat, None);
            assert_eq!(revocations.refuse(&kim, now), refused, "{iat:?} at {now}");
        }
        assert!(!revocations.refuse(&identity("lee", None, None), 200));
        revocations.forget(END - 1);
        assert!(!revocations.rules.read().users.is_empty());
        revocations.forget(END);
        assert!(revocations.rules.read().users.is_empty());
    }

    #[test]
    fn what_is_revoked_for_good_never_ends() {
        let rule = Revocation::new(100, Duration::MAX, Duration::from_secs(30));
        assert_eq!((rule.before, rule.until), (130, u64::MAX));
        assert_eq!(rule.ends(Duration::ZERO), None);
        let part = Revocation::new(100, Duration::from_millis(9_001), Duration::ZERO);
        assert_eq!(part.until, 110, "whole seconds, and not less");
        assert_eq!(part.merge(rule), rule);
        let revocations = Revocations::default();
        let rule = serde_json::to_vec(&rule).unwrap();
        revocations
            .learn(Whose::Token("t1".to_owned()), &rule)
            .unwrap();
        revocations.forget(u64::MAX);
        assert!(revocations.refuse(&identity("kim", Some(7), Some("t1")), u64::MAX));
    }

    #[test]
    fn one_token_is_revoked_by_its_name() {
        let revocations = Revocations::default();
        let token = Whose::Token("t1".to_owned());
        revocations
            .learn(token, br#"{"before":0,"until":500}"#)
            .unwrap();
        assert!(revocations.refuse(&identity("kim", Some(7), Some("t1")), 100));
        assert!(!revocations.refuse(&identity("kim", Some(7), Some("t2")), 100));
        assert!(!revocations.refuse(&identity("kim", Some(7), None), 100));
    }

    #[test]
    fn the_last_word_about_a_block_counts_in_whatever_order_it_comes() {
        let kim = || Whose::Blocked("kim".to_owned());
        let words = [r#"{"blocked":true,"at":5}"#, r#"{"blocked":false,"at":7}"#];
        for order in [[0, 1], [1, 0]] {
            let revocations = Revocations::default();
            let mut changes = revocations.changes();
            for word in order {
                revocations.learn(kim(), words[word].as_bytes()).unwrap();
            }
            assert!(changes.has_changed().unwrap());
            changes.mark_unchanged();
            assert!(!revocations.refuse(&identity("kim", Some(9999), None), 1));
            revocations
                .learn(kim(), br#"{"blocked":true,"at":9}"#)
                .unwrap();
            assert!(changes.has_changed().unwrap());
            assert!(revocations.refuse(&identity("kim", Some(9999), None), 1));
        }
    }

    #[test]
    fn a_word_that_is_said_over_another_counts_whatever_the_clocks_say() {
        let known = Block {
            blocked: true,
            at: 9,
        };
        for (at, counts) in [(5, 10), (9, 10), (12, 12)] {
            let word = Block { blocked: false, at }.after(known);
            assert_eq!((word.blocked, word.at), (false, counts));
        }
    }

    #[test]
    fn what_is_no_rule_changes_nothing() {
        let revocations = Revocations::default();
        let kim = || Whose::User("kim".to_owned());
        for text in ["", "{}", r#"{"before":-1,"until":3}"#, "x"] {
            assert!(revocations.learn(kim(), text.as_bytes()).is_err(), "{text}");
        }
        assert!(!revocations.refuse(&identity("kim", None, None), 1));
    }
}
