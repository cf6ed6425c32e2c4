//! The registry of uploads.

use natter::testing::store::{Claim, Upload, UploadState, Verdict};

use super::*;

fn upload(id: &str, user: &str, size: u64) -> Upload {
    Upload {
        id: id.to_owned(),
        room: RoomId::parse("chat:x").unwrap(),
        user: user.to_owned(),
        name: "a".to_owned(),
        media_type: "image/png".to_owned(),
        size,
    }
}

impl Own {
    async fn record(&self, id: &str) -> Fields {
        let uploads = self.database.collection::<Fields>("uploads");
        uploads.find_one(doc! { "_id": id }).await.unwrap().unwrap()
    }

    async fn claim(&self, id: &str, user: &str, message: &str) -> bool {
        let room = RoomId::parse("chat:x").unwrap();
        let claim = Claim {
            uploads: vec![id.to_owned()],
            room: &room,
            user: user.to_owned(),
            message,
            ts: 7,
        };
        self.store.claim_uploads(&[claim]).await.unwrap();
        self.record(id).await.get_str("message").ok() == Some(message)
    }
}

#[tokio::test]
async fn requests_at_the_same_time_never_exceed_the_limit_of_a_user() {
    let own = Own::new().await;
    let grants = (0..20).map(|n| {
        let store = own.store.clone();
        async move {
            store
                .grant_upload(&upload(&format!("u{n}"), "kim", 10_000), 50_000, false)
                .await
        }
    });
    let granted = futures_util::future::join_all(grants).await;
    let granted = granted.into_iter().filter(|one| matches!(one, Ok(Ok(()))));
    let granted = granted.count();
    assert!(granted <= 5, "{granted} of 10000 bytes, the limit is 50000");
    // What was refused does not count, and other users do not.
    for n in granted..5 {
        let more = upload(&format!("more{n}"), "kim", 10_000);
        assert_eq!(
            own.store.grant_upload(&more, 50_000, false).await.unwrap(),
            Ok(())
        );
    }
    let last = own
        .store
        .grant_upload(&upload("last", "kim", 1), 50_000, false)
        .await;
    assert_eq!(last.unwrap(), Err(50_000));
    let other = own
        .store
        .grant_upload(&upload("other", "lee", 10_000), 50_000, false)
        .await;
    assert_eq!(other.unwrap(), Ok(()));
}

#[tokio::test]
async fn an_upload_is_claimed_once_by_its_owner_or_removed_when_all_regions_say_so() {
    let own = Own::new().await;
    let regions = ["a", "b"].map(|name| Region::parse(name).unwrap());
    for id in ["u1", "u2", "u3"] {
        let granted = own
            .store
            .grant_upload(&upload(id, "kim", 1), 1 << 20, false)
            .await;
        assert_eq!(granted.unwrap(), Ok(()));
    }
    assert!(!own.claim("u1", "lee", "chat:x/lee/1").await);
    assert!(own.claim("u1", "kim", "chat:x/kim/1").await);
    assert!(!own.claim("u1", "kim", "chat:x/kim/2").await);
    let later = natter::testing::runtime::unix_ms() + 60_000;
    let unused = async |region: &Region, before| {
        own.store
            .unused_uploads(region, &regions, before)
            .await
            .unwrap()
    };
    assert_eq!(unused(&regions[0], 1).await, 0);
    assert_eq!(unused(&regions[0], later).await, 0);
    // A region that was cut off has a message that names it.
    assert!(own.claim("u2", "kim", "chat:x/kim/3").await);
    assert_eq!(unused(&regions[0], later).await, 0);
    assert_eq!(unused(&regions[1], later).await, 1);
    assert!(!own.claim("u3", "kim", "chat:x/kim/4").await);
    // One instance removes it; after the lease, another does.
    let lease = std::time::Duration::from_millis(1);
    let first = own.store.claim_file_removal(lease).await.unwrap().unwrap();
    assert_eq!((&*first.id, first.again), ("u3", false));
    let second = eventually("the lease ends", LONG, async || {
        let claimed = own
            .store
            .claim_file_removal(std::time::Duration::from_secs(600))
            .await;
        claimed.unwrap().ok_or("not yet".to_owned())
    })
    .await;
    assert_eq!(second, first);
    let minute = std::time::Duration::from_secs(60);
    let again = first.again_at(minute);
    assert!(again.is_some());
    own.store.file_removed(&first, again).await.unwrap();
    assert_eq!(own.store.claim_file_removal(minute).await.unwrap(), None);
    // A day later it is removed once more, since somebody could have uploaded it again, and is forgotten.
    let uploads = own.database.collection::<Fields>("uploads");
    let ago = Bson::DateTime(mongodb::bson::DateTime::from_millis(0));
    let past = doc! { "$set": { "at": ago.clone(), "due": ago } };
    uploads
        .update_one(doc! { "_id": "u3" }, past)
        .await
        .unwrap();
    let last = own.store.claim_file_removal(minute).await.unwrap().unwrap();
    assert!(last.again);
    assert_eq!(last.again_at(minute), None);
    own.store.file_removed(&last, None).await.unwrap();
    assert_eq!(
        uploads.count_documents(doc! { "_id": "u3" }).await.unwrap(),
        0
    );
}

#[tokio::test]
async fn verdicts_commute_and_need_neither_claim_nor_message() {
    let own = Own::new().await;
    let room = RoomId::parse("chat:x").unwrap();
    let other = RoomId::parse("chat:y").unwrap();
    let judge = async |id: &str, room: &RoomId, is_infected| {
        let upload = id.to_owned();
        let verdict = Verdict {
            upload,
            room,
            is_infected,
        };
        own.store.judge_uploads(&[verdict]).await.unwrap();
        own.store.upload_state(id).await.unwrap()
    };
    // As two regions would say them, in every order, each twice.
    let orders = [[false, false], [false, true], [true, false], [true, true]];
    for (n, order) in orders.into_iter().enumerate() {
        let id = format!("u{n}");
        let granted = upload(&id, "kim", 1);
        let granted = own.store.grant_upload(&granted, 1 << 20, true);
        assert_eq!(granted.await.unwrap(), Ok(()));
        let state = own.store.upload_state(&id).await.unwrap();
        assert_eq!(state, UploadState::Pending);
        assert_eq!(judge(&id, &other, true).await, UploadState::Pending);
        let mut state = UploadState::Pending;
        for is_infected in order.into_iter().chain(order) {
            state = judge(&id, &room, is_infected).await;
        }
        let expected = match order.contains(&true) {
            true => UploadState::Infected,
            false => UploadState::Clean,
        };
        assert_eq!(state, expected, "{order:?}");
        // A file that is infected goes; one that is clean can still be named.
        let is_clean = expected == UploadState::Clean;
        assert_eq!(own.record(&id).await.contains_key("due"), !is_clean);
        assert_eq!(own.claim(&id, "kim", "chat:x/kim/1").await, is_clean);
    }
    // Granted before files were checked.
    let old = upload("old", "kim", 1);
    let granted = own.store.grant_upload(&old, 1 << 20, false);
    assert_eq!(granted.await.unwrap(), Ok(()));
    assert_eq!(judge("old", &room, false).await, UploadState::Clean);
    assert_eq!(judge("old", &room, true).await, UploadState::Infected);
    // What nobody was granted is not made up.
    assert_eq!(judge("none", &room, false).await, UploadState::Gone);
}
