//! The chat page and the operators' page of `web/`, and the SDK for JavaScript of `sdk/js/`, embedded in the binary.

use axum::{
    Router,
    http::header,
    response::{Html, IntoResponse},
    routing::get,
};

const PAGES: [(&str, &str); 3] = [
    ("/", include_str!("../web/index.html")),
    // On the SDK; it takes the place of the page at `/` once it can do as much.
    ("/app", include_str!("../web/app.html")),
    ("/operate", include_str!("../web/operate.html")),
];

const STYLES: [(&str, &str); 3] = [
    ("/app.css", include_str!("../web/app.css")),
    ("/page.css", include_str!("../web/page.css")),
    ("/operate.css", include_str!("../web/operate.css")),
];

/// The scripts, by the names under which the pages load them.
const SCRIPTS: [(&str, &str); 24] = [
    ("/create.js", include_str!("../web/create.js")),
    ("/app.js", include_str!("../web/app.js")),
    ("/inbox.js", include_str!("../web/inbox.js")),
    ("/timeline.js", include_str!("../web/timeline.js")),
    ("/message.js", include_str!("../web/message.js")),
    ("/composer.js", include_str!("../web/composer.js")),
    ("/words-app.js", include_str!("../web/words-app.js")),
    ("/page.js", include_str!("../web/page.js")),
    ("/natter.js", include_str!("../web/natter.js")),
    ("/log.js", include_str!("../web/log.js")),
    ("/past.js", include_str!("../web/past.js")),
    ("/rooms.js", include_str!("../web/rooms.js")),
    ("/panel.js", include_str!("../web/panel.js")),
    ("/files.js", include_str!("../web/files.js")),
    ("/http.js", include_str!("../web/http.js")),
    ("/notify.js", include_str!("../web/notify.js")),
    // Beside the page, so that its scope is all of it.
    ("/sw.js", include_str!("../web/sw.js")),
    ("/words.js", include_str!("../web/words.js")),
    ("/operate.js", include_str!("../web/operate.js")),
    ("/operate-list.js", include_str!("../web/operate-list.js")),
    ("/operate-model.js", include_str!("../web/operate-model.js")),
    ("/operate-talk.js", include_str!("../web/operate-talk.js")),
    (
        "/operate-people.js",
        include_str!("../web/operate-people.js"),
    ),
    ("/operate-words.js", include_str!("../web/operate-words.js")),
];

/// The SDK, as far as a page without React needs it. The files import each other.
const SDK: [(&str, &str); 11] = [
    ("/sdk/natter.js", include_str!("../sdk/js/natter.js")),
    ("/sdk/store.js", include_str!("../sdk/js/store.js")),
    (
        "/sdk/connection.js",
        include_str!("../sdk/js/connection.js"),
    ),
    ("/sdk/emitter.js", include_str!("../sdk/js/emitter.js")),
    ("/sdk/fold.js", include_str!("../sdk/js/fold.js")),
    ("/sdk/messages.js", include_str!("../sdk/js/messages.js")),
    ("/sdk/outbox.js", include_str!("../sdk/js/outbox.js")),
    ("/sdk/protocol.js", include_str!("../sdk/js/protocol.js")),
    ("/sdk/room.js", include_str!("../sdk/js/room.js")),
    ("/sdk/snapshot.js", include_str!("../sdk/js/snapshot.js")),
    ("/sdk/watch.js", include_str!("../sdk/js/watch.js")),
];

/// What the pages may load and connect to: their own server, and the storage of uploads, if that is elsewhere.
fn policy(storage: Option<&str>) -> String {
    let storage = storage
        .map(|origin| format!(" {origin}"))
        .unwrap_or_default();
    format!(
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'{storage}; \
         img-src 'self' data:{storage}; base-uri 'none'; form-action 'none'; \
         frame-ancestors 'none'"
    )
}

/// Adds `/` and `/operate`, and the files that they load. `storage`: the origin of uploads, if it is not the edge.
pub(crate) fn routes<S: Clone + Send + Sync + 'static>(
    router: Router<S>,
    storage: Option<&str>,
) -> Router<S> {
    let policy = policy(storage);
    let router = PAGES.into_iter().fold(router, |router, (path, html)| {
        let policy = policy.clone();
        let page = move || async move { ([(header::CONTENT_SECURITY_POLICY, policy)], Html(html)) };
        router.route(path, get(page))
    });
    let styles = STYLES.into_iter().map(|one| ("text/css", one));
    let scripts = SCRIPTS
        .into_iter()
        .chain(SDK)
        .map(|one| ("text/javascript", one));
    styles
        .chain(scripts)
        .fold(router, |router, (media_type, (path, text))| {
            router.route(path, get(move || async move { file(media_type, text) }))
        })
}

fn file(media_type: &str, text: &'static str) -> impl IntoResponse + use<> {
    let media_type = format!("{media_type}; charset=utf-8");
    ([(header::CONTENT_TYPE, media_type)], text)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A page that loads one of them gets all of them.
    #[test]
    fn what_the_sdk_imports_is_served_beside_it() {
        for (path, text) in SDK {
            let imported = text.lines().filter_map(|line| {
                let words = ["import ", "export "];
                let rest = words.iter().find_map(|word| line.strip_prefix(word))?;
                let (_, file) = rest.split_once(" from \"./")?;
                file.strip_suffix("\";")
            });
            for file in imported {
                let wanted = format!("/sdk/{file}");
                assert!(
                    SDK.iter().any(|(known, _)| *known == wanted),
                    "{path} imports {file}"
                );
            }
        }
    }

    #[test]
    fn what_the_pages_load_is_served() {
        let served = || {
            STYLES
                .iter()
                .chain(&SCRIPTS)
                .chain(&SDK)
                .map(|(path, _)| path)
        };
        for (page, text) in PAGES.iter().chain(&SCRIPTS) {
            let loaded = text.split('"').filter_map(|word| {
                let file = word.strip_prefix("./").unwrap_or(word);
                let is_file = file.ends_with(".js") || file.ends_with(".css");
                is_file.then(|| format!("/{file}"))
            });
            for file in loaded {
                assert!(
                    served().any(|known| **known == *file),
                    "{page} loads {file}"
                );
            }
        }
    }

    #[test]
    fn the_page_may_use_the_storage_and_nothing_else() {
        let own = policy(None);
        assert!(own.contains("connect-src 'self';") && own.contains("img-src 'self' data:;"));
        let s3 = policy(Some("https://files.example.org"));
        for source in ["connect-src 'self'", "img-src 'self' data:"] {
            let allowed = format!("{source} https://files.example.org;");
            assert!(s3.contains(&allowed), "{s3}");
        }
        for policy in [own, s3] {
            assert!(policy.starts_with("default-src 'none';") && !policy.contains("unsafe"));
            assert!(policy.ends_with("; frame-ancestors 'none'"), "{policy}");
        }
    }
}
