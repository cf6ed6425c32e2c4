//! Serves requests over NATS: pages, searches, erasures, uploads, questions to the directory of rooms.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use serde_json::json;

use super::{
    Parts, directory,
    erase::Erasing,
    figures::Figures,
    pages::Pages,
    question::{PageRequest, decode, encode, endpoint, refused},
    uploads,
};
use crate::{
    bus::{Endpoint, ServeError, serve as serve_endpoints},
    protocol::Refused,
    subject::{HISTORY_SERVICE, Subjects},
};

/// The description in `nats micro ls`.
const DESCRIPTION: &str =
    "What was said in durable rooms: pages, searches, erasures, uploads; the directory of rooms";

/// Numbers of answers given by this instance.
#[derive(Debug, Default)]
struct Answered {
    full: AtomicU64,
    partial: AtomicU64,
    searches: AtomicU64,
    erasures: AtomicU64,
    uploads: AtomicU64,
    directory: AtomicU64,
    refused: AtomicU64,
}

impl Answered {
    fn figures(&self, writing: &Figures) -> serde_json::Value {
        let of = |count: &AtomicU64| count.load(Ordering::Relaxed);
        json!({
            "pages": of(&self.full),
            "partial_pages": of(&self.partial),
            "searches": of(&self.searches),
            "erasures": of(&self.erasures),
            "uploads": of(&self.uploads),
            "directory": of(&self.directory),
            "refused": of(&self.refused),
            "writing": writing.shown(),
        })
    }

    fn note<T>(&self, answer: Result<T, Refused>, what: &AtomicU64) -> Result<T, Refused> {
        let counter = if answer.is_ok() { what } else { &self.refused };
        counter.fetch_add(1, Ordering::Relaxed);
        answer
    }
}

/// Serves until the process stops. Several instances share the requests.
pub(super) async fn serve(parts: &Parts, erasing: Erasing) -> Result<(), ServeError> {
    let Parts {
        config,
        connection,
        reader,
        origins,
        store,
        tasks,
        figures,
        ..
    } = parts;
    let (reader, store) = (reader.clone(), Some(store.clone()));
    let pages = Arc::new(Pages::new(reader, Arc::clone(origins), store, config));
    let answered = Arc::new(Answered::default());
    let subjects = Subjects::new(&config.nats.prefix);
    let region = config.region();
    let page_at = |name| {
        let (pages, answered) = (Arc::clone(&pages), Arc::clone(&answered));
        let subject = subjects.history(&region, name);
        Endpoint::new(name, subject, move |question| {
            let (pages, answered) = (Arc::clone(&pages), Arc::clone(&answered));
            async move {
                let answer = async {
                    let request: PageRequest = decode(&question)?;
                    pages.page(&request).await
                };
                let answer = answer.await;
                let is_partial = answer.as_ref().is_ok_and(|answer| answer.partial);
                let what = if is_partial {
                    &answered.partial
                } else {
                    &answered.full
                };
                answered
                    .note(answer.and_then(|answer| encode(&answer)), what)
                    .map_err(|error| refused(&error))
            }
        })
    };
    let search = {
        let (pages, answered) = (Arc::clone(&pages), Arc::clone(&answered));
        let subject = subjects.history(&region, endpoint::SEARCH);
        Endpoint::new(endpoint::SEARCH, subject, move |question| {
            let (pages, answered) = (Arc::clone(&pages), Arc::clone(&answered));
            async move {
                let answer = async { encode(&pages.search(decode(&question)?).await?) };
                answered
                    .note(answer.await, &answered.searches)
                    .map_err(|error| refused(&error))
            }
        })
    };
    let erase = {
        let answered = Arc::clone(&answered);
        let subject = subjects.history(&region, endpoint::ERASE);
        Endpoint::new(endpoint::ERASE, subject, move |question| {
            let (erasing, answered) = (erasing.clone(), Arc::clone(&answered));
            async move {
                let answer = async { encode(&erasing.ask(decode(&question)?).await?) };
                answered
                    .note(answer.await, &answered.erasures)
                    .map_err(|error| refused(&error))
            }
        })
    };
    let upload = {
        let (answered, parts) = (Arc::clone(&answered), parts.clone());
        let subject = subjects.history(&region, endpoint::UPLOAD);
        Endpoint::new(endpoint::UPLOAD, subject, move |question| {
            let (parts, answered) = (parts.clone(), Arc::clone(&answered));
            async move {
                let answer = async { encode(&uploads::grant(&parts, &decode(&question)?).await?) };
                answered
                    .note(answer.await, &answered.uploads)
                    .map_err(|error| refused(&error))
            }
        })
    };
    let upload_state = {
        let (answered, parts) = (Arc::clone(&answered), parts.clone());
        let subject = subjects.history(&region, endpoint::UPLOAD_STATE);
        Endpoint::new(endpoint::UPLOAD_STATE, subject, move |question| {
            let (parts, answered) = (parts.clone(), Arc::clone(&answered));
            async move {
                let answer = async {
                    let upload: String = decode(&question)?;
                    encode(&uploads::state(&parts, &upload).await?)
                };
                answered
                    .note(answer.await, &answered.uploads)
                    .map_err(|error| refused(&error))
            }
        })
    };
    let rooms = {
        let (answered, parts) = (Arc::clone(&answered), parts.clone());
        let subject = subjects.history(&region, endpoint::ROOMS);
        Endpoint::new(endpoint::ROOMS, subject, move |question| {
            let (parts, answered) = (parts.clone(), Arc::clone(&answered));
            async move {
                let answer =
                    async { encode(&directory::answer(&parts, &decode(&question)?).await?) };
                answered
                    .note(answer.await, &answered.directory)
                    .map_err(|error| refused(&error))
            }
        })
    };
    let (page, thread) = (page_at(endpoint::PAGE), page_at(endpoint::THREAD));
    let endpoints = vec![page, thread, search, erase, upload, upload_state, rooms];
    let writing = Arc::clone(figures);
    let figures = move || answered.figures(&writing);
    serve_endpoints(
        connection,
        HISTORY_SERVICE,
        DESCRIPTION,
        endpoints,
        figures,
        tasks,
    )
    .await
}
