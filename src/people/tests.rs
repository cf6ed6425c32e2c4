//! Records under random changes in three regions, against a model that knows every write.

use std::{collections::BTreeMap, sync::Arc};

use figment::providers::{Format as _, Toml};
use proptest::prelude::*;

use super::{
    access::Standing,
    change::{Ask, Change, Create, Said},
    record::{Alert, Made, MemberState, Merge as _, Record, Role, RoomKind},
};
use crate::{
    auth::{Claims, Grant, Identity, Right, Verifier, issue},
    config::Config,
    model::{Region, RoomId},
    protocol::{ErrorCode, PutMember, Settings},
};

const SECRET: &str = "a secret of thirty-two bytes or more, for tests";

fn identity(user: &str, can: &[Right]) -> Arc<Identity> {
    let config = Config::with_defaults(Toml::string(&format!("auth.hs256_secret = '{SECRET}'")));
    let verifier = Verifier::from_config(&config.unwrap().auth).unwrap();
    let mut claims = Claims::new(user, 4_000_000_000);
    claims.grants = vec![Grant::new("*:*", can)];
    verifier
        .verify(&issue(&claims, SECRET).unwrap(), 1)
        .unwrap()
}

fn room() -> RoomId {
    RoomId::parse("crew:a").unwrap()
}

fn region(number: usize) -> Region {
    Region::parse(["oslo", "seoul", "virginia"][number]).unwrap()
}

fn new_record() -> Record {
    let made = Made {
        created: 1000,
        by: "boss".to_owned(),
    };
    Record::new(RoomKind::Group, None, made)
}

/// A change in one region, at the time of its clock.
#[derive(Debug, Clone)]
enum Step {
    Change(usize, Change),
    /// The first region gets what the second one has now, or had some changes ago.
    Sync(usize, usize, usize),
}

fn change() -> impl Strategy<Value = Change> {
    let user = prop::sample::select(vec!["ann", "bob", "cat", "dan"]);
    let role = prop::option::of(prop::sample::select(vec![
        Role::Reader,
        Role::Member,
        Role::Moderator,
        Role::Owner,
    ]));
    let state = prop::option::of(prop::sample::select(vec![
        MemberState::In,
        MemberState::Banned,
    ]));
    let put = (user.clone(), role, state, prop::option::of(0..5u64));
    let put = put.prop_map(|(user, role, state, muted_until)| Change::Put {
        user: user.to_owned(),
        what: PutMember {
            role,
            state,
            muted_until,
        },
    });
    let remove = user.prop_map(|user| Change::Remove {
        user: user.to_owned(),
    });
    let set = (
        prop::option::of("[a-c]"),
        prop::option::of(any::<bool>()),
        prop::option::of(0..3u32),
    );
    let set = set.prop_map(|(title, frozen, slow_mode_s)| {
        Change::Set(Box::new(Settings {
            title: Some(title.unwrap_or_default()),
            frozen,
            slow_mode_s,
            alert: slow_mode_s.filter(|seconds| *seconds == 0).map(|_| false),
            ..Settings::default()
        }))
    });
    let pin = ("[a-d]", any::<bool>()).prop_map(|(id, on)| Change::Pin {
        message: format!("ann/{id}"),
        on,
        said: None,
    });
    let alert = "[a-b]".prop_map(|id| {
        Change::Alert(Alert {
            worker: "mood".to_owned(),
            message: format!("ann/{id}"),
        })
    });
    prop_oneof![4 => put, 2 => remove, 3 => set, 1 => pin, 1 => alert]
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let one = prop_oneof![
        3 => (0..3usize, change()).prop_map(|(at, change)| Step::Change(at, change)),
        1 => (0..3usize, 0..3usize, 0..3usize).prop_map(|(to, from, back)| Step::Sync(to, from, back)),
    ];
    prop::collection::vec(one, 1..40)
}

/// What a model knows of a record: the last write of each field, as text, with its stamp.
type Model = BTreeMap<String, ((u64, Region), String)>;

/// The fields of a record as text, by name, each with its stamp.
fn fields(record: &Record) -> Model {
    let mut all = Model::new();
    let json = serde_json::to_value(record).unwrap();
    let mut add = |name: String, value: &serde_json::Value| {
        let stamp = (
            value["at"].as_u64().unwrap(),
            Region::parse(value["origin"].as_str().unwrap()).unwrap(),
        );
        all.insert(name, (stamp, value.to_string()));
    };
    for name in ["title", "frozen", "slow_mode_s", "alert", "pins"] {
        if let Some(value) = json.get(name) {
            add(name.to_owned(), value);
        }
    }
    for (user, value) in json["members"].as_object().into_iter().flatten() {
        add(format!("member {user}"), value);
    }
    all
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// After any changes in three regions, with clocks that differ, and any exchange between them, late, repeated or
    /// never: when everybody has heard of everything, all have the last write of every field.
    #[test]
    fn regions_end_equal_to_the_model(steps in steps(), skews in prop::array::uniform3(0..50u64)) {
        let boss = identity("boss", &[Right::Manage]);
        let (room, regions) = (room(), [region(0), region(1), region(2)]);
        let mut records = [new_record(), new_record(), new_record()];
        let mut histories: [Vec<Record>; 3] = std::array::from_fn(|at| vec![records[at].clone()]);
        let mut model = Model::new();
        let mut clock = 2000;
        for step in steps {
            match step {
                Step::Change(at, change) => {
                    clock += 1;
                    let ask = Ask {
                        room: &room,
                        identity: &boss,
                        members_only: true,
                        users_create: false,
                        room_members: 100,
                        now: clock + skews[at],
                        origin: &regions[at],
                    };
                    // What is refused changes nothing.
                    let Ok(Some((new, _))) = ask.apply(Some(&records[at]), &change) else { continue };
                    let before = fields(&records[at]);
                    for (name, written) in fields(&new) {
                        if before.get(&name) != Some(&written) {
                            prop_assert!(before.get(&name).is_none_or(|old| old.0 < written.0), "time goes on");
                            let last = model.entry(name).or_insert_with(|| written.clone());
                            if written.0 > last.0 {
                                *last = written;
                            }
                        }
                    }
                    records[at] = new;
                    let now = records[at].clone();
                    histories[at].push(now);
                }
                Step::Sync(to, from, back) => {
                    let history = &histories[from];
                    let old = history[history.len().saturating_sub(1 + back)].clone();
                    records[to].merge_from(&old);
                    let now = records[to].clone();
                    histories[to].push(now);
                }
            }
        }
        let merged = |order: [usize; 3]| {
            let mut all = records[order[0]].clone();
            all.merge_from(&records[order[1]]);
            all.merge_from(&records[order[2]]);
            all
        };
        let all = merged([0, 1, 2]);
        for order in [[0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]] {
            prop_assert_eq!(&merged(order), &all, "commutative");
        }
        let mut right = records[1].clone();
        right.merge_from(&records[2]);
        let mut nested = records[0].clone();
        nested.merge_from(&right);
        prop_assert_eq!(&nested, &all, "associative");
        let mut twice = all.clone();
        for record in &records {
            twice.merge_from(record);
        }
        prop_assert_eq!(&twice, &all, "idempotent");
        prop_assert_eq!(fields(&all), model);
        let read: Record = serde_json::from_str(&all.to_json()).unwrap();
        prop_assert_eq!(&read, &all);
        prop_assert_eq!(read.version(), all.version());
    }
}

/// The record of a group with an owner, a moderator, a member, a reader, and somebody who was banned.
fn crew() -> Record {
    let boss = identity("boss", &[Right::Manage]);
    let (room, origin) = (room(), region(0));
    let mut record = new_record();
    let put = |role, state| PutMember {
        role: Some(role),
        state: Some(state),
        muted_until: None,
    };
    for (user, role, state) in [
        ("owner", Role::Owner, MemberState::In),
        ("moderator", Role::Moderator, MemberState::In),
        ("member", Role::Member, MemberState::In),
        ("other", Role::Member, MemberState::In),
        ("reader", Role::Reader, MemberState::In),
        ("banned", Role::Member, MemberState::Banned),
    ] {
        let change = Change::Put {
            user: user.to_owned(),
            what: put(role, state),
        };
        let ask = ask(&boss, &room, &origin);
        record = ask.apply(Some(&record), &change).unwrap().unwrap().0;
    }
    record
}

fn ask<'a>(identity: &'a Identity, room: &'a RoomId, origin: &'a Region) -> Ask<'a> {
    Ask {
        room,
        identity,
        members_only: true,
        users_create: true,
        room_members: 100,
        now: 5000,
        origin,
    }
}

/// Everything that a user's token may grant who is no manager.
const ALL: [Right; 6] = [
    Right::Read,
    Right::Write,
    Right::Presence,
    Right::History,
    Right::Moderate,
    Right::Erase,
];

#[test]
fn a_role_narrows_what_a_token_grants() {
    let record = crew();
    let room = room();
    let standing = Standing::of(Some(&record), true);
    for (user, allowed) in [
        ("owner", &ALL[..]),
        ("moderator", &ALL[..5]),
        ("member", &ALL[..4]),
        ("reader", &[Right::Read, Right::Presence, Right::History]),
        ("banned", &[]),
        ("stranger", &[]),
    ] {
        let identity = identity(user, &ALL);
        for right in ALL {
            let checked = standing.check(&identity, right, &room, 5000);
            assert_eq!(
                checked.is_ok(),
                allowed.contains(&right),
                "{user} {right}: {checked:?}"
            );
        }
    }
    // Where grants say who is in a room, only a ban and the role of a reader take something away.
    let standing = Standing::of(Some(&record), false);
    for (user, allowed) in [
        ("stranger", &ALL[..]),
        ("member", &ALL[..]),
        (
            "reader",
            &[
                Right::Read,
                Right::Presence,
                Right::History,
                Right::Moderate,
                Right::Erase,
            ],
        ),
        ("banned", &[]),
    ] {
        let identity = identity(user, &ALL);
        for right in ALL {
            let checked = standing.check(&identity, right, &room, 5000);
            assert_eq!(
                checked.is_ok(),
                allowed.contains(&right),
                "{user} {right}: {checked:?}"
            );
        }
    }
}

#[test]
fn who_may_change_what() {
    let record = crew();
    let (room, origin) = (room(), region(0));
    let user = |user: &str| user.to_owned();
    let put = |name: &str, role, state, muted_until| Change::Put {
        user: user(name),
        what: PutMember {
            role,
            state,
            muted_until,
        },
    };
    let frozen = Change::Set(Box::new(Settings {
        frozen: Some(true),
        ..Settings::default()
    }));
    let titled = Change::Set(Box::new(Settings {
        title: Some(user("x")),
        ..Settings::default()
    }));
    let changes = [
        ("add", put("new", None, None, None)),
        ("mute", put("member", None, None, Some(9000))),
        ("ban", put("other", None, Some(MemberState::Banned), None)),
        (
            "remove",
            Change::Remove {
                user: user("other"),
            },
        ),
        ("unban", put("banned", None, Some(MemberState::In), None)),
        ("freeze", frozen),
        (
            "pin",
            Change::Pin {
                message: user("member/1"),
                on: true,
                said: None,
            },
        ),
        ("title", titled),
        ("promote", put("member", Some(Role::Moderator), None, None)),
        ("mute a moderator", put("moderator", None, None, Some(9000))),
        (
            "remove a moderator",
            Change::Remove {
                user: user("moderator"),
            },
        ),
        (
            "ban the owner",
            put("owner", None, Some(MemberState::Banned), None),
        ),
        ("close", Change::Close),
    ];
    for (who, may) in [
        ("owner", 13),
        ("moderator", 7),
        ("member", 0),
        ("reader", 0),
        ("banned", 0),
        ("stranger", 0),
    ] {
        let identity = identity(who, &ALL);
        for (at, (name, change)) in changes.iter().enumerate() {
            let oneself = matches!(change, Change::Remove { user } if user == who);
            let done = ask(&identity, &room, &origin).apply(Some(&record), change);
            match done {
                Ok(Some(_)) => assert!(at < may || oneself, "{who}: {name}"),
                Ok(None) => panic!("{who}: {name} changes nothing"),
                Err(refused) => {
                    assert!(at >= may && !oneself, "{who}: {name}: {refused}");
                    assert_eq!(refused.code, ErrorCode::Forbidden, "{who}: {name}");
                }
            }
        }
    }
    // Without the right in the token, no role helps.
    let without = identity("owner", &[Right::Read, Right::Write]);
    let refused = ask(&without, &room, &origin).apply(Some(&record), &changes[0].1);
    assert_eq!(refused.unwrap_err().code, ErrorCode::Forbidden);
    // A manager is no member, and may do everything but what needs `erase`.
    let manager = identity("manager", &[Right::Manage]);
    for (at, (name, change)) in changes.iter().enumerate() {
        let done = ask(&manager, &room, &origin).apply(Some(&record), change);
        assert_eq!(done.is_ok(), at != 12, "{name}: {done:?}");
    }
}

#[test]
fn rooms_are_made_once_and_direct_rooms_keep_their_members() {
    let (room, origin) = (room(), region(0));
    let kim = identity("kim", &ALL);
    let create = |kind, members: &[&str]| {
        Change::Create(Create {
            kind,
            about: Some("item/1".to_owned()),
            members: members.iter().map(|user| (*user).to_owned()).collect(),
            title: None,
            info: None,
        })
    };
    let dm = create(RoomKind::Dm, &["kim", "lee"]);
    let (record, told) = ask(&kim, &room, &origin).apply(None, &dm).unwrap().unwrap();
    assert_eq!(told["action"], "created");
    assert_eq!(
        ask(&kim, &room, &origin).apply(Some(&record), &dm),
        Ok(None)
    );
    let refused = |change: &Change, code| {
        let refused = ask(&kim, &room, &origin)
            .apply(Some(&record), change)
            .unwrap_err();
        assert_eq!(refused.code, code, "{refused}");
    };
    // Users make direct rooms with themselves in them, and nothing else.
    refused(&create(RoomKind::Dm, &["ann", "lee"]), ErrorCode::Forbidden);
    refused(&create(RoomKind::Group, &["kim"]), ErrorCode::Forbidden);
    // Who leaves comes back by making it again.
    let leave = Change::Remove {
        user: "kim".to_owned(),
    };
    let (left, _) = ask(&kim, &room, &origin)
        .apply(Some(&record), &leave)
        .unwrap()
        .unwrap();
    assert_eq!(left.member("kim").unwrap().state, MemberState::Out);
    let (back, _) = ask(&kim, &room, &origin)
        .apply(Some(&left), &dm)
        .unwrap()
        .unwrap();
    assert_eq!(back.member("kim").unwrap().state, MemberState::In);
    assert!(back.newest() > left.newest());
    let boss = identity("boss", &[Right::Manage, Right::Erase]);
    let add = Change::Put {
        user: "ann".to_owned(),
        what: PutMember::default(),
    };
    let added = ask(&boss, &room, &origin).apply(Some(&record), &add);
    assert_eq!(added.unwrap_err().code, ErrorCode::BadRequest);
    let (closed, _) = ask(&boss, &room, &origin)
        .apply(Some(&record), &Change::Close)
        .unwrap()
        .unwrap();
    for change in [&dm, &leave] {
        let refused = ask(&kim, &room, &origin)
            .apply(Some(&closed), change)
            .unwrap_err();
        assert_eq!(refused.code, ErrorCode::Forbidden);
    }
}

#[test]
fn an_info_that_no_parser_reads_is_refused() {
    let boss = identity("boss", &[Right::Manage]);
    let (room, origin) = (room(), region(0));
    let ask = ask(&boss, &room, &origin);
    let made = new_record();
    for (levels, is_taken) in [(1, true), (32, true), (33, false), (126, false)] {
        let text = format!("{}1{}", "{\"a\":".repeat(levels), "}".repeat(levels));
        let set = Change::Set(Box::new(Settings {
            info: Some(serde_json::from_str(&text).unwrap()),
            ..Settings::default()
        }));
        match ask.apply(Some(&made), &set) {
            Ok(changed) => {
                let text = serde_json::to_string(&changed.unwrap().0).unwrap();
                assert!(is_taken && serde_json::from_str::<Record>(&text).is_ok());
            }
            Err(refused) => {
                assert_eq!(refused.code, ErrorCode::BadRequest);
                assert!(
                    !is_taken && refused.message.starts_with("info "),
                    "{refused:?}"
                );
            }
        }
    }
}

#[test]
fn a_repeated_pin_makes_up_for_a_lost_write_and_undoes_nothing() {
    let boss = identity("boss", &[Right::Manage]);
    let (room, origin) = (room(), region(0));
    let ask = ask(&boss, &room, &origin);
    let pin = |on, ts, again| Change::Pin {
        message: "ann/1".to_owned(),
        on,
        said: Some(Said { ts, again }),
    };
    let made = new_record();
    // The clock of the edge is behind the one of the stream.
    let (pinned, _) = ask
        .apply(Some(&made), &pin(true, 9000, false))
        .unwrap()
        .unwrap();
    assert_eq!(pinned.pins(), ["ann/1"]);
    assert_eq!(pinned.newest(), 9000);
    let unpin = Change::Pin {
        message: "ann/1".to_owned(),
        on: false,
        said: None,
    };
    let (unpinned, _) = ask.apply(Some(&pinned), &unpin).unwrap().unwrap();
    for record in [&pinned, &unpinned] {
        assert_eq!(ask.apply(Some(record), &pin(true, 9000, true)), Ok(None));
    }
    // The first attempt has only reached the log.
    let (again, _) = ask
        .apply(Some(&made), &pin(true, 9000, true))
        .unwrap()
        .unwrap();
    assert_eq!(again.pins(), ["ann/1"]);
}

#[test]
fn muted_frozen_and_slow_rooms() {
    let room = room();
    let (mut record, member) = (crew(), identity("member", &ALL));
    let moderator = identity("moderator", &ALL);
    let may_write = |record: &Record, who: &Identity, now| {
        Standing::of(Some(record), true)
            .check(who, Right::Write, &room, now)
            .is_ok()
    };
    record.members.get_mut("member").unwrap().muted_until = 6000;
    assert!(!may_write(&record, &member, 5999));
    assert!(may_write(&record, &member, 6000));
    let origin = region(0);
    let set = |record: &Record, settings| {
        let ask = ask(&moderator, &room, &origin);
        let change = Change::Set(Box::new(settings));
        ask.apply(Some(record), &change).unwrap().unwrap().0
    };
    let frozen = set(
        &record,
        Settings {
            frozen: Some(true),
            ..Settings::default()
        },
    );
    assert!(!may_write(&frozen, &member, 7000));
    assert!(may_write(&frozen, &moderator, 7000));
    let slow = set(
        &record,
        Settings {
            slow_mode_s: Some(30),
            ..Settings::default()
        },
    );
    let standing = Standing::of(Some(&slow), true);
    assert_eq!(standing.slow_mode(&member, &room), Some(30_000));
    assert_eq!(standing.slow_mode(&moderator, &room), None);
}

#[test]
fn bounds_are_named() {
    let (room, origin) = (room(), region(0));
    let boss = identity("boss", &[Right::Manage]);
    let limited = |record: &Record, change: &Change| {
        let ask = Ask {
            room_members: 3,
            ..ask(&boss, &room, &origin)
        };
        ask.apply(Some(record), change)
            .map_err(|refused| refused.code)
    };
    let put = |user: &str| Change::Put {
        user: user.to_owned(),
        what: PutMember::default(),
    };
    let mut record = new_record();
    for user in ["a", "b", "c"] {
        record = limited(&record, &put(user)).unwrap().unwrap().0;
    }
    assert_eq!(limited(&record, &put("d")), Err(ErrorCode::Limit));
    // Whoever left makes room, but not for ever.
    for (gone, next) in [("a", "d"), ("b", "e"), ("c", "f")] {
        let remove = Change::Remove {
            user: gone.to_owned(),
        };
        record = limited(&record, &remove).unwrap().unwrap().0;
        record = limited(&record, &put(next)).unwrap().unwrap().0;
    }
    let remove = Change::Remove {
        user: "d".to_owned(),
    };
    record = limited(&record, &remove).unwrap().unwrap().0;
    assert_eq!(limited(&record, &put("g")), Err(ErrorCode::Limit));
    assert!(
        limited(&record, &put("d")).is_ok(),
        "who was there comes back"
    );
    for (settings, what) in [
        (
            Settings {
                title: Some("x".repeat(257)),
                ..Settings::default()
            },
            "title",
        ),
        (
            Settings {
                title: Some("a\nb".to_owned()),
                ..Settings::default()
            },
            "title",
        ),
        (
            Settings {
                slow_mode_s: Some(86_401),
                ..Settings::default()
            },
            "slow_mode_s",
        ),
        (Settings::default(), "one of title"),
    ] {
        let ask = ask(&boss, &room, &origin);
        let refused = ask
            .apply(Some(&record), &Change::Set(Box::new(settings)))
            .unwrap_err();
        assert!(refused.message.contains(what), "{refused}");
    }
    for user in ["", "$natter"] {
        assert_eq!(limited(&record, &put(user)), Err(ErrorCode::BadRequest));
    }
}

#[test]
fn an_alert_stands_until_a_moderator_has_seen_to_it() {
    let (room, origin) = (room(), region(0));
    let worker = Identity::of_back_end("$worker.mood");
    let alert = |id: &str| {
        Change::Alert(Alert {
            worker: "mood".to_owned(),
            message: format!("ann/{id}"),
        })
    };
    let ask_as = |identity, record: &Record, change: &Change| {
        ask(identity, &room, &origin).apply(Some(record), change)
    };
    let (marked, told) = ask_as(&worker, &crew(), &alert("m1")).unwrap().unwrap();
    assert_eq!(told["action"], "alert");
    assert_eq!(marked.alert().unwrap().message, "ann/m1");
    assert_eq!(ask_as(&worker, &marked, &alert("m1")), Ok(None));
    let (marked, _) = ask_as(&worker, &marked, &alert("m2")).unwrap().unwrap();
    let seen = |alert| {
        Change::Set(Box::new(Settings {
            alert: Some(alert),
            ..Settings::default()
        }))
    };
    let member = identity("member", &ALL);
    let refused = ask_as(&member, &marked, &seen(false)).unwrap_err();
    assert_eq!(refused.code, ErrorCode::Forbidden);
    let moderator = identity("moderator", &ALL);
    let refused = ask_as(&moderator, &marked, &seen(true)).unwrap_err();
    assert_eq!(refused.code, ErrorCode::BadRequest);
    let (over, _) = ask_as(&moderator, &marked, &seen(false)).unwrap().unwrap();
    assert_eq!(over.alert(), None);
    assert_eq!(ask_as(&moderator, &over, &seen(false)), Ok(None));
}
