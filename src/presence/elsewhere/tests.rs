use super::*;

const LEASE: Duration = Duration::from_secs(10);

fn entry(key: &str, revision: u64, here: bool) -> Entry {
    Entry {
        key: key.to_owned(),
        value: here.then(bytes::Bytes::new),
        expired: false,
        revision,
        at: 0,
    }
}

fn names<'a>(leases: impl Iterator<Item = &'a Arc<str>>) -> Vec<&'a str> {
    leases.map(|lease| &**lease).collect()
}

/// Both mirrors have everything that the origin had at this time.
fn up(at: Instant) -> Link {
    let keys = Some(at);
    Link::Up { leases: at, keys }
}

#[test]
fn a_lease_that_vanished_behind_a_cut_is_unreachable_until_it_is_renewed() {
    let start = Instant::now();
    let mut table = Table::default();
    table.looked(&[entry("a", 5, true)], up(start), LEASE, start);
    assert_eq!(names(table.alive()), ["a"]);
    let late = start + LEASE + TICK;
    let look = table.looked(&[], Link::Cut, LEASE, late);
    assert_eq!(look, Look::default());
    assert_eq!(names(table.unreachable()), ["a"]);
    assert_eq!(names(table.alive()), [""; 0]);
    // The cut is over. The edge gets time to be heard of.
    let healed = late + LEASE;
    let look = table.looked(&[], up(healed), LEASE, healed);
    assert_eq!(look, Look::default());
    assert_eq!(names(table.unreachable()), ["a"]);
    table.renewed("a", 9, healed + TICK);
    assert_eq!(names(table.alive()), ["a"]);
    assert_eq!(names(table.unreachable()), [""; 0]);
}

#[test]
fn a_lease_whose_end_was_not_told_is_over_when_the_mirror_has_kept_up_for_long_enough() {
    let start = Instant::now();
    let mut table = Table::default();
    table.looked(&[entry("a", 5, true)], up(start), LEASE, start);
    let late = start + LEASE + TICK;
    table.looked(&[], Link::Cut, LEASE, late);
    table.looked(&[], up(late + TICK), LEASE, late + TICK);
    // A look with an unknown link starts the wait again.
    table.looked(&[], Link::Unknown, LEASE, late + LEASE);
    let heals = late + LEASE + TICK;
    table.looked(&[], up(heals), LEASE, heals);
    let look = table.looked(&[], up(heals + LEASE), LEASE, heals + LEASE);
    assert_eq!(look.missed, [""; 0].map(Arc::from));
    let over = heals + LEASE + TICK;
    let look = table.looked(&[], up(over), LEASE, over);
    assert_eq!(look.missed, [""; 0].map(Arc::from));
    // All keys written before have arrived.
    let over = over + TICK;
    let look = table.looked(&[], up(over), LEASE, over);
    assert_eq!(look.missed, [Arc::from("a")]);
    // Keys it has left are purged only when it has been over for long. An old renewal does not bring it back.
    table.renewed("a", 5, over);
    let found = [entry("used.a", 1, true)];
    let look = table.looked(&found, up(over + LEASE), LEASE, over + LEASE);
    assert_eq!(look.left, [""; 0].map(Arc::from));
    assert_eq!(names(table.alive()), [""; 0]);
    let long = over + REMEMBERED / 2;
    let look = table.looked(&found, up(long), LEASE, long);
    assert_eq!(look.left, [Arc::from("a")]);
    // A renewal refutes a concluded end, but not an announced one.
    table.renewed("a", 99, long);
    assert_eq!(names(table.alive()), ["a"]);
    table.ended("a", long);
    table.renewed("a", 100, long);
    let look = table.looked(&[], up(long + TICK), LEASE, long + TICK);
    assert_eq!(look.ended, [Arc::from("a")]);
    assert_eq!(names(table.alive()), [""; 0]);
}

#[test]
fn a_mirror_that_was_silent_while_a_lease_became_overdue_does_not_say_that_it_is_over() {
    let start = Instant::now();
    let mut table = Table::default();
    table.looked(&[entry("a", 5, true)], up(start), LEASE, start);
    table.renewed("a", 6, start + 2 * LEASE);
    // The cut begins right after the renewal, and is not known yet.
    let heard = start + 2 * LEASE + TICK;
    let late = start + 3 * LEASE + TICK;
    let look = table.looked(&[], up(heard), LEASE, late);
    assert_eq!(look, Look::default());
    let look = table.looked(&[], Link::Cut, LEASE, late + SILENT);
    assert_eq!(look, Look::default());
    assert_eq!(names(table.unreachable()), ["a"]);
}

#[test]
fn an_end_that_was_told_counts_when_the_keys_are_here_that_were_written_before() {
    let start = Instant::now();
    let mut table = Table::default();
    let found = [entry("used.a", 1, true), entry("a", 5, true)];
    table.looked(&found, up(start), LEASE, start);
    // The edge has taken another lease, and none of the keys under it have arrived.
    let told = start + TICK;
    table.ended("a", told);
    table.renewed("b", 8, told);
    let look_at = |table: &mut Table, after: Duration, keys: Option<Instant>| {
        let now = told + after;
        let leases = now;
        table.looked(&[], Link::Up { leases, keys }, LEASE, now)
    };
    let shown = |table: &Table| {
        let mut alive = names(table.alive()).join(" ").into_bytes();
        alive.sort_unstable();
        (alive, names(table.unreachable()).join(" "))
    };
    for keys in [Some(start), None] {
        assert_eq!(look_at(&mut table, TICK, keys), Look::default());
        assert_eq!(shown(&table), (b" ab".to_vec(), String::new()));
    }
    assert_eq!(table.every(LEASE, told + TICK), TICK / 2);
    let look = table.looked(&[], Link::Cut, LEASE, told + SILENT);
    assert_eq!(look, Look::default());
    assert_eq!(shown(&table), (b"b".to_vec(), "a".to_owned()));
    let caught_up = Some(told + LEASE);
    let look = look_at(&mut table, LEASE, caught_up);
    assert_eq!(look, Look::default());
    let look = look_at(&mut table, LEASE + TICK, caught_up);
    assert_eq!(look.ended, [Arc::from("a")]);
    assert_eq!(shown(&table), (b"b".to_vec(), String::new()));
}

#[test]
fn an_edge_has_time_to_take_another_lease_when_one_expired() {
    let start = Instant::now();
    let mut table = Table::default();
    let found = [entry("a", 5, true), entry("b", 6, true)];
    table.looked(&found, up(start), LEASE, start);
    let expired = Entry {
        expired: true,
        ..entry("a", 7, false)
    };
    let found = [expired, entry("b", 8, false)];
    let told = start + TICK;
    table.looked(&found, up(told), LEASE, told);
    // A lease that was given up ends at once.
    let mut look_at = |after| {
        let now = told + after;
        table.looked(&found, up(now), LEASE, now).ended
    };
    assert_eq!(look_at(TICK), [Arc::from("b")]);
    let late = renewed_every(LEASE);
    assert_eq!(look_at(late - TICK / 2), [""; 0].map(Arc::from));
    assert_eq!(look_at(late), [""; 0].map(Arc::from));
    assert_eq!(look_at(late + TICK), [Arc::from("a")]);
}

#[test]
fn a_purge_that_has_left_something_is_not_repeated_at_every_look() {
    let start = Instant::now();
    let mut table = Table::default();
    let found = [entry("used.a", 1, true), entry("a", 5, true)];
    table.looked(&found, up(start), LEASE, start);
    table.ended("a", start);
    let mut look_at = |after| {
        let now = start + after;
        table.looked(&found[..1], up(now), LEASE, now)
    };
    let [a, nothing] = [vec![Arc::from("a")], vec![]];
    let look = look_at(TICK);
    assert_eq!((&look.ended, &look.left), (&a, &nothing));
    assert_eq!(look_at(LOOK).left, nothing);
    let again = TICK + PURGED_AGAIN;
    assert_eq!(look_at(again).left, a);
    assert_eq!(look_at(again + LOOK).left, nothing);
    assert_eq!(look_at(again + PURGED_AGAIN).left, a);
}

#[test]
fn a_mirror_of_keys_that_stays_behind_keeps_an_end_for_a_while() {
    let start = Instant::now();
    let mut table = Table::default();
    table.looked(&[entry("a", 5, true)], up(start), LEASE, start);
    table.ended("a", start);
    let look_at = |table: &mut Table, now: Instant| {
        let behind = Link::Up {
            leases: now,
            keys: None,
        };
        table.looked(&[], behind, LEASE, now).ended
    };
    let heals = start + KEPT;
    table.looked(&[], Link::Cut, LEASE, heals);
    assert_eq!(
        look_at(&mut table, heals + KEPT - TICK),
        [""; 0].map(Arc::from)
    );
    assert_eq!(look_at(&mut table, heals + KEPT), [Arc::from("a")]);
}

#[test]
fn an_end_that_was_told_counts_also_if_it_was_found() {
    let start = Instant::now();
    let mut table = Table::default();
    let found = [entry("used.a", 1, true), entry("a", 5, true)];
    table.looked(&found, up(start), LEASE, start);
    table.looked(&found[..1], Link::Cut, LEASE, start + LEASE + TICK);
    let found = [entry("used.a", 1, true), entry("a", 8, false)];
    let healed = start + 2 * LEASE;
    assert_eq!(
        table.looked(&found, up(healed), LEASE, healed),
        Look::default()
    );
    assert_eq!(names(table.unreachable()), ["a"]);
    let later = healed + TICK;
    let look = table.looked(&found, up(later), LEASE, later);
    assert_eq!(look.ended, [Arc::from("a")]);
    assert_eq!(names(table.unreachable()), [""; 0]);
}

#[test]
fn who_begins_behind_a_cut_knows_the_leases_that_were_taken_before() {
    let start = Instant::now();
    let mut table = Table::default();
    let found = [entry("used.a", 1, true)];
    table.looked(&found, Link::Unknown, LEASE, start);
    assert_eq!(names(table.unreachable()), [""; 0]);
    table.looked(&found, Link::Cut, LEASE, start + TICK);
    assert_eq!(names(table.unreachable()), ["a"]);
    assert_eq!(names(table.alive()), [""; 0]);
}

#[test]
fn only_a_long_cut_makes_an_edge_announce_its_users_anew() {
    let start = Instant::now();
    let mut table = Table::default();
    table.looked(&[], Link::Cut, LEASE, start);
    let look = table.looked(&[], up(start + LONG_CUT / 2), LEASE, start + LONG_CUT / 2);
    assert!(!look.healed);
    let cut = start + LONG_CUT;
    table.looked(&[], Link::Cut, LEASE, cut);
    table.looked(&[], Link::Unknown, LEASE, cut + LONG_CUT);
    let look = table.looked(&[], up(cut + LONG_CUT), LEASE, cut + LONG_CUT);
    assert!(look.healed);
    let look = table.looked(&[], up(cut + 2 * LONG_CUT), LEASE, cut + 2 * LONG_CUT);
    assert!(!look.healed);
}
